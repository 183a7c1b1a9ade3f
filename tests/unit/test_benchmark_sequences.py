import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.network import FEATURES, MODEL, weights_file
from benchmarks.packed_lstm import PackedLstm
from benchmarks.peers import KSERVE, MOSEC, TRITON
from benchmarks.peers.http import Connections
from benchmarks.sequence_load import Answered, Floats, Turn, closed_loop, open_loop, random_sequence, uniform
from benchmarks.sequence_report import (
    BUCKETED,
    OURS,
    PADDED,
    PRODUCTS,
    Row,
    best_peer,
    closed_table,
    compared_table,
    open_table,
    ratio,
    write,
)
from benchmarks.sequences import check, connected, write_network
from benchmarks.turns import Server
from tests.support.reference import Reference, assert_close
from tests.support.server import free_port


def turn(sequences: int, *, latency_s: float = 0.01, steps: int = 10, client_core: float = 0.5) -> Turn:
    """One of a second, due at even intervals."""
    due_s = [number / sequences for number in range(sequences)]
    return Turn([Answered(steps, at_s, at_s + latency_s) for at_s in due_s], 1.0, client_core)


def closed(server: str, *per_s: int, in_flight: int = 64) -> Row:
    return Row(server, "uniform", in_flight, turns=[turn(each, latency_s=1e-6) for each in per_s])


def opened(server: str, latency_s: float, *, lengths: str = "uniform", share: float = 0.5, turns: int = 1) -> Row:
    return Row(server, lengths, share=share, turns=[turn(100, latency_s=latency_s) for _ in range(turns)])


def as_dicts(table: tuple[list[str], list[list[str]]]) -> list[dict[str, str]]:
    head, lines = table
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_a_ratio_is_that_of_turns_beside_each_other() -> None:
    assert ratio(closed(OURS, 10, 100, 1000), closed(PADDED, 20, 25, 500)) == pytest.approx(2)


def test_what_was_due_before_a_turn_is_not_offered_in_it_and_what_is_answered_after_it_is_not_answered() -> None:
    before, within, late = Answered(10, -0.2, 0.3), Answered(20, 0.1, 0.9), Answered(40, 0.8, 1.1)
    one = Turn([Answered(80, -0.3, -0.1), before, within, late], 1.0)
    assert (one.answered, one.offered, one.unanswered) == ([before, within], [within, late], 1)


def test_the_best_peer_is_the_fastest_in_closed_loop() -> None:
    rows = [closed(OURS, 900), closed(BUCKETED, 500), closed(MOSEC, 200), closed(TRITON, 300), closed(KSERVE, 100)]
    best = best_peer(rows)
    assert best is not None
    assert best.server == TRITON


def test_the_best_peer_in_open_loop_has_the_least_p90_of_those_that_keep_up() -> None:
    best = best_peer([opened(MOSEC, 0.03), opened(TRITON, 0.02), opened(KSERVE, 0.05)])
    assert best is not None
    assert best.server == TRITON
    quick_for_most = Turn([*turn(80).sequences, *[Answered(100, 0.5, 1.5)] * 7], 1.0)
    behind = Row(TRITON, "uniform", share=0.5, turns=[quick_for_most])
    best = best_peer([opened(MOSEC, 0.03), behind])
    assert best is not None
    assert best.server == MOSEC
    assert best_peer([behind]) is None


def test_a_line_of_comparison_has_every_other_server_and_the_name_of_the_best_peer() -> None:
    rows = [closed(PRODUCTS, 800), closed(OURS, 400), closed(PADDED, 100), closed(BUCKETED, 200), closed(MOSEC, 160)]
    (line,) = as_dicts(compared_table(rows))
    assert (line["÷ products"], line["÷ padded"], line["÷ bucketed"]) == ("0.50", "4.00", "2.00")
    assert line["÷ best peer"] == "2.50 (mosec)"


def test_latency_is_compared_with_none_that_falls_behind() -> None:
    rows = [opened(OURS, 0.02), opened(PADDED, 0.5), opened(BUCKETED, 0.04)]
    (line,) = as_dicts(compared_table(rows))
    assert (line["÷ padded"], line["÷ bucketed"]) == ("padded falls behind", "0.50")
    assert (line["÷ products"], line["÷ best peer"]) == ("", "")


def test_without_rnnserve_nothing_is_compared() -> None:
    assert compared_table([closed(MOSEC, 100)])[1] == []
    (line,) = as_dicts(closed_table([closed(MOSEC, 100)]))
    assert (line["÷ products"], line["rnnserve ÷ it"]) == ("", "")


def test_a_server_that_falls_behind_is_marked_with_what_it_left_unanswered() -> None:
    slow, fast = as_dicts(open_table([opened(PADDED, 0.5, turns=2), opened(OURS, 0.002, turns=2)]))
    assert (slow["offered/s"], slow["answered/s"]) == ("100", "50 falls behind")
    assert slow["unanswered at the end"] == "100 of 200"
    assert (fast["answered/s"], fast["unanswered at the end"]) == ("100", "0 of 200")


def test_a_client_that_is_the_bottleneck_is_marked() -> None:
    row = Row(OURS, "uniform", 1, turns=[turn(10, client_core=0.95)])
    (line,) = as_dicts(closed_table([row]))
    assert line["client"] == "95% bottleneck"


async def test_an_open_loop_offers_a_slow_server_no_less_and_nothing_else_than_a_fast_one() -> None:
    release, waiting, waited = asyncio.Event(), 0, 0

    async def at_once(values: Floats) -> bytes:
        return b""

    async def at_the_end(values: Floats) -> bytes:
        nonlocal waiting
        waiting += 1
        await release.wait()
        return b""

    def let_go() -> None:
        nonlocal waited
        waited = waiting
        release.set()

    fast = await open_loop(uniform, 20_000, 0.1, seed=3, predict=at_once)
    asyncio.get_running_loop().call_later(0.8, let_go)
    slow = await open_loop(uniform, 20_000, 0.1, seed=3, predict=at_the_end)
    assert [one.steps for one in slow.sequences] == [one.steps for one in fast.sequences]
    assert waited == len(slow.sequences)
    assert slow.answered == []
    assert slow.unanswered == len(slow.offered) > 0
    assert fast.unanswered == 0


async def test_a_closed_loop_has_so_many_sequences_in_flight() -> None:
    under_way = most = 0

    async def predict(values: Floats) -> bytes:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return b""

    one = await closed_loop(uniform, 5, 0.05, seed=0, predict=predict)
    assert most == 5
    assert len(one.sequences) > 5
    assert all(10 <= answered.steps <= 200 for answered in one.sequences)


def test_packed_sequences_of_different_lengths_are_answered_as_each_by_itself(tmp_path: Path) -> None:
    write_network(tmp_path)
    rng, reference = np.random.default_rng(0), Reference(tmp_path / MODEL / "1")
    sequences = [random_sequence(steps, rng) for steps in (5, 40, 1, 40)]
    outputs = PackedLstm(weights_file(tmp_path)).run([torch.from_numpy(values) for values in sequences])
    for values, found in zip(sequences, outputs, strict=True):
        assert_close(found, reference.predict(values))


async def test_a_server_with_other_weights_does_not_pass_the_check(tmp_path: Path) -> None:
    write_network(tmp_path)
    reference = Reference(tmp_path / MODEL / "1")

    async def right(values: Floats) -> bytes:
        return reference.predict(values).tobytes()

    async def wrong(values: Floats) -> bytes:
        return (reference.predict(values) + 0.01).tobytes()

    await check(right, tmp_path)
    with pytest.raises(RuntimeError, match="50 steps are answered with"):
        await check(wrong, tmp_path)


async def test_what_a_server_fails_is_said_in_a_line() -> None:
    async def work(predict: object) -> None:
        raise ExceptionGroup("calls", [RuntimeError("refused")])

    server = Server(f"127.0.0.1:{free_port()}", pid=0)
    with pytest.raises(RuntimeError, match=r"^refused$"):
        await connected(server, work, 10)
    with pytest.raises(RuntimeError, match="no end after 0 s"):
        await connected(server, lambda predict: asyncio.Event().wait(), 0)
    with pytest.raises(RuntimeError, match=r"^[^\n]*connect[^\n]*$"):
        await connected(server, lambda predict: predict(np.zeros((1, FEATURES), np.float32)), 10)


async def test_connections_are_as_many_as_requests_under_way_and_are_kept() -> None:
    opened, waiting = 0, asyncio.Queue[asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        while await reader.read(1000):
            await waiting.put(writer)

    async def answer(body: bytes) -> None:
        (await waiting.get()).write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        connections = Connections(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        for bodies in ([b"one", b"two"], [b"three"], [b"four", b"five"]):
            posts = [asyncio.create_task(connections.post(b"body")) for _ in bodies]
            for body in bodies:
                await answer(body)
            assert sorted(await asyncio.gather(*posts)) == sorted(bodies)
        assert opened == 2
        await connections.close()


def test_a_report_has_all_tables_both_plots_and_what_failed(tmp_path: Path) -> None:
    rows = [closed(name, 100, 120, in_flight=n) for n in (1, 16) for name in (OURS, MOSEC, PRODUCTS)]
    rows += [opened(OURS, 0.02, lengths=lengths) for lengths in ("uniform", "heavy-tailed")]
    write(tmp_path, rows, {"triton": "does not start: no"}, "command", ["mosec==1"])
    said = (tmp_path / "sequences.md").read_text()
    assert "- triton does not start: no" in said
    for plot in ("sequences.svg", "sequences_latency.svg"):
        assert f"![]({plot})" in said
        assert (tmp_path / plot).read_text().startswith("<?xml")

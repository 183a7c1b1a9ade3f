from typing import Any

import pytest

from benchmarks import turns
from benchmarks.load import Streamed
from benchmarks.turns import Row, Server, figures_of, last_line, ratio, ratio_interval, turn


def streamed(steps: list[int], *, latency_s: float, server_cpu_s: float = 1.0, client_cpu_s: float = 1.0) -> Streamed:
    latencies_s = [latency_s] * sum(steps)
    return Streamed(latencies_s, steps, duration_s=2.0, server_cpu_s=server_cpu_s, client_cpu_s=client_cpu_s)


def test_two_clients_at_the_same_time_count_together_but_use_one_server() -> None:
    figures = figures_of([
        streamed([100, 50], latency_s=0.001, server_cpu_s=1.5, client_cpu_s=0.5),
        streamed([150], latency_s=0.003, server_cpu_s=1.5, client_cpu_s=1.9),
    ])  # fmt: skip
    assert figures["steps_per_s"] == pytest.approx(150)
    assert figures["server_cpu_us_per_step"] == pytest.approx(5_000)  # 0.75 of a core for 150 steps/s
    assert figures["client_core"] == pytest.approx(0.95)  # of the busier one
    assert figures["fairness"] == pytest.approx(50 / 150)
    assert [figures["p50_ms"], figures["p99_ms"]] == pytest.approx([2, 3])


def test_a_ratio_is_that_of_turns_beside_each_other() -> None:
    over, under = Row("one", 1), Row("other", 1)
    over.turns = [{"steps_per_s": value} for value in (10.0, 100.0, 1000.0)]
    under.turns = [{"steps_per_s": value} for value in (20.0, 25.0, 500.0)]
    assert ratio(over, under) == 2


def interval_of(ratios: list[float]) -> tuple[float, float]:
    over, under = Row("one", 1), Row("other", 1)
    over.turns = [{"steps_per_s": value} for value in ratios]
    under.turns = [{"steps_per_s": 1.0} for _ in ratios]
    return ratio_interval(over, under)


def test_the_interval_of_a_ratio_is_what_its_turns_leave_open() -> None:
    assert interval_of([0.9] * 5) == (0.9, 0.9)
    assert interval_of([0.9] * 30 + [5.0]) == (0.9, 0.9), "one turn that was disturbed says nothing"
    few_low, few_high = interval_of([0.8, 1.0, 1.2])
    many_low, many_high = interval_of([0.8, 1.0, 1.2] * 20)
    assert (few_low, few_high) == (0.8, 1.2)
    assert 0.8 <= many_low <= 1.0 <= many_high <= 1.2
    assert many_high - many_low < few_high - few_low


@pytest.mark.parametrize(("said", "last"), [("Traceback\nValueError: no\n", "ValueError: no"), ("", "it said nothing")])
def test_why_a_process_failed_is_its_last_line(said: str, last: str) -> None:
    assert last_line(said) == last


def row_after_turns(monkeypatch: pytest.MonkeyPatch, busy: list[float], **of_row: Any) -> Row:
    """Where each client process in turn was busy for such a share, on a machine with a core for a second one."""

    def load(server: Server, row: Row, seconds: float) -> list[Streamed]:
        return [
            streamed([10], latency_s=0.001, client_cpu_s=2.0 * busy.pop(0) if client == 0 else 0.0)
            for client in range(row.clients)
        ]

    monkeypatch.setattr(turns, "_load", load)
    monkeypatch.setattr(turns, "CLIENT_CORES", [1, 2])
    row = Row("server", **of_row)
    while busy:
        turn(Server("target", pid=1), row, seconds=2.0)
    return row


def test_a_second_client_is_there_in_all_turns_or_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    busy_at_once = row_after_turns(monkeypatch, [0.95, 0.6, 0.5, 0.95], streams=64)
    assert (busy_at_once.clients, [turn["steps_per_s"] for turn in busy_at_once.turns]) == (2, [10, 10, 10])
    busy_later = row_after_turns(monkeypatch, [0.5, 0.95, 0.95], streams=64)
    assert (busy_later.clients, [turn["steps_per_s"] for turn in busy_later.turns]) == (1, [5, 5, 5])


def test_sessions_on_one_stream_have_one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for of_row in ({"streams": 1}, {"streams": 64, "ahead": 2}):
        row = row_after_turns(monkeypatch, [0.95, 0.95], **of_row)
        assert (row.clients, len(row.turns)) == (1, 2)

import pytest

from benchmarks.peers.http import body_of
from benchmarks.peers.report import AHEAD, HEAD, OURS, best_peers, lines_of
from benchmarks.turns import PERCENTILES, Row


def row(server: str, streams: int, *steps_per_s: float, p99_ms: float, ahead: int = 0) -> Row:
    percentiles = {f"p{p:g}_ms": p99_ms for p in PERCENTILES}
    turns = [
        {"steps_per_s": each, **percentiles, "server_cpu_us_per_step": 50.0, "client_core": 0.5} for each in steps_per_s
    ]
    return Row(server, streams, ahead=ahead, turns=turns)


def test_the_best_peer_is_the_fastest_of_those_at_the_same_number_of_streams() -> None:
    said = best_peers([
        row(OURS, 1, 300, p99_ms=1), row("slow", 1, 100, p99_ms=4), row("fast", 1, 200, p99_ms=5),
        row(OURS, 64, 500, p99_ms=8), row("slow", 64, 1_000, p99_ms=4),
    ])  # fmt: skip
    assert said == [
        "1 stream: 1.50 × the steps/s of the best (fast), 0.25 × the least p99 (slow)",
        "64 streams: 0.50 × the steps/s of the best (slow), 2.00 × the least p99 (slow)",
    ]


def test_multiplexed_sessions_are_compared_with_the_best_peer_at_as_many_streams() -> None:
    rows = [row(OURS, 256, 100, p99_ms=1), row("peer", 256, 200, p99_ms=1), row(OURS, 256, 900, p99_ms=1, ahead=AHEAD)]
    (said,) = best_peers(rows)
    assert said.endswith("; multiplexed 4.5 × the steps/s")


def test_where_rnnserve_or_all_peers_failed_nothing_is_compared() -> None:
    assert best_peers([row(OURS, 1, 100, p99_ms=1)]) == []
    assert best_peers([row("peer", 1, 100, p99_ms=1)]) == []
    (line,) = lines_of([row("peer", 1, 100, p99_ms=1)])
    assert (line[HEAD.index("server")], line[HEAD.index("rnnserve ÷ it")]) == ("peer", "")


def test_a_line_has_the_median_its_range_and_the_ratio_within_turns() -> None:
    rows = [row(OURS, 16, 10, 40, 90, p99_ms=2), row("peer", 16, 10, 20, 30, p99_ms=8)]
    line = dict(zip(HEAD, lines_of(rows)[1], strict=True))
    assert line["steps/s"] == "20 (10–30)"
    assert line["rnnserve ÷ it"] == "2.00"
    assert line["rnnserve's p99 ÷ its"] == "0.25"


ANSWER = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Length: 8\r\n\r\n\r\n\r\nabcd"


def test_an_answer_over_http_is_whole_once_all_of_its_length_has_come() -> None:
    whole = [body_of(ANSWER[:received]) for received in range(len(ANSWER) + 1)]
    assert whole == [None] * len(ANSWER) + [b"\r\n\r\nabcd"]


def test_an_answer_that_is_not_200_is_an_error_with_what_was_said() -> None:
    with pytest.raises(RuntimeError, match=r"http/1\.1 500 internal server error no 200 here"):
        body_of(b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 11\r\n\r\nno 200 here")

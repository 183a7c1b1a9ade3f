import pytest

from benchmarks.load import Streamed
from benchmarks.turns import Row, figures_of, last_line, ratio


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


@pytest.mark.parametrize(("said", "last"), [("Traceback\nValueError: no\n", "ValueError: no"), ("", "it said nothing")])
def test_why_a_process_failed_is_its_last_line(said: str, last: str) -> None:
    assert last_line(said) == last

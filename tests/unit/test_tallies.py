import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from service.tallies import TallyCounter, TallyHistogram

BUCKETS = (0.1, 1, 10)
LABELS = ("model", "version")


def page(registry: CollectorRegistry) -> list[str]:
    """What Prometheus reads, but when each was first counted."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_a_counter_reads_as_one_of_prometheus_client() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = TallyCounter("steps_total", "Steps.", LABELS, ours)
    counter = Counter("steps_total", "Steps.", LABELS, registry=theirs)
    for labels, amount in ((("a", 1), 2), (("b", 2), 1), (("a", 1), 5)):
        tally.inc(labels, amount)
        counter.labels(*labels).inc(amount)
    assert page(ours) == page(theirs)


@pytest.mark.parametrize("values", [(), (0.05,), (0.1, 0.11, 1, 9.5, 10, 11)], ids=str)
def test_a_histogram_reads_as_one_of_prometheus_client(values: tuple[float, ...]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = TallyHistogram("step_seconds", "Duration.", LABELS, ours, BUCKETS)
    histogram = Histogram("step_seconds", "Duration.", LABELS, registry=theirs, buckets=BUCKETS)
    for value in values:
        tally.observe(("a", 1), value)
        histogram.labels("a", 1).observe(value)
    assert page(ours) == page(theirs)


def test_a_name_is_taken_once() -> None:
    registry = CollectorRegistry()
    TallyCounter("steps_total", "Steps.", LABELS, registry)
    with pytest.raises(ValueError, match="steps"):
        Counter("steps_total", "Steps.", LABELS, registry=registry)

"""What `rnnserve top` makes of pages of metrics."""

import io
import math
from textwrap import dedent

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from rnnserve.cli.outcome import BadInput
from rnnserve.cli.rates import ModelLoad, Reading, Span, increase, quantile
from rnnserve.cli.scrape import checked_url, default_url
from rnnserve.cli.top import Column, chosen, picture
from rnnserve.metrics_page import Page, parse

VANILLA = 'model="vanilla",version="1"'


def reading(page: str, *, at_s: float = 0.0, uptime_s: float | None = None, model: str = "vanilla") -> Reading:
    return Reading(((model, 1),), Page(parse(dedent(page))), at_s, uptime_s)


def load(name: str, *, streams: int = 0, steps_per_s: float | None = None, p99_s: float | None = None) -> ModelLoad:
    return ModelLoad(
        name=name, version=1, streams=streams, parked=0, steps_per_s=steps_per_s, tick_sessions=None,
        p50_s=None, p99_s=p99_s, sequences_per_s=None,
    )  # fmt: skip


def drawn(span: Span, width: int) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width).print(picture(span, span.models()))
    return screen.getvalue().splitlines()


def test_a_page_is_read_as_the_library_of_prometheus_reads_it() -> None:
    registry = CollectorRegistry()
    awkward = 'a "quote", a \\ and \\n, a\nline, } = { # \u2028 \x0b é'
    Counter("counted", "With a\nline.", ["one", "two"], registry=registry).labels(awkward, "").inc(1e-7)
    Gauge("flag", "Whether.", registry=registry).set(math.inf)
    Histogram("took_seconds", "How long.", ["model"], registry=registry).labels("a").observe(0.3)
    text = generate_latest(registry).decode()
    read = [(sample.name, dict(sample.labels), sample.value) for sample in parse(text)]
    families = text_string_to_metric_families(text)
    assert read == [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
    assert ("counted_total", {"one": awkward, "two": ""}, 1e-7) in read


def test_spaces_and_times_of_a_page_do_no_harm() -> None:
    text = '# a comment\n\n  steps { model = "a" , version="1", } 3 1395066363000\nup\t1\nnothing{} -Inf\n'
    assert [tuple(sample) for sample in parse(text)] == [
        ("steps", {"model": "a", "version": "1"}, 3.0),
        ("up", {}, 1.0),
        ("nothing", {}, -math.inf),
    ]


@pytest.mark.parametrize("text", ["<html>", "steps", "steps one", 'steps{model="a} 1', "1 2"])
def test_what_is_no_page_of_metrics_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no line of|could not convert"):
        list(parse(text))


@pytest.mark.parametrize(
    ("share", "up_to", "expected"),
    [
        (0.5, {1: 10, 2: 30, 4: 40, math.inf: 40}, 1.5),  # the 20th is the 10th of 20 between 1 and 2
        (0.99, {1: 10, 2: 30, 4: 40, math.inf: 40}, 3.92),  # 9.6 of 10 between 2 and 4
        (0.25, {1: 10, 2: 30, 4: 40, math.inf: 40}, 1.0),  # the last one of its bucket
        (0.5, {0.5: 10, math.inf: 10}, 0.25),  # the first bucket begins at 0
        (0.5, {1: 0, 2: 0, 4: 8, math.inf: 8}, 3.0),  # empty buckets do not count
        (0.5, {4: 8, math.inf: 8, 2: 0, 1: 0}, 3.0),  # whatever their order
        (0.9, {1: 1, 2: 2, math.inf: 10}, 2.0),  # no more is known than that it is beyond
        (0.5, {1: 0, math.inf: 0}, None),
        (0.5, {}, None),
    ],
)
def test_a_quantile_is_found_within_its_bucket(share: float, up_to: dict[float, float], expected: float | None) -> None:
    assert quantile(share, up_to) == (None if expected is None else pytest.approx(expected))


def test_counters_grow_from_where_they_were_or_from_nothing_where_they_are_new() -> None:
    assert increase({"a": 7, "b": 2}, {"a": 4}) == {"a": 3, "b": 2}


@pytest.mark.parametrize("now", [{"a": 3, "b": 9}, {"b": 9}])
def test_counters_of_a_server_that_was_started_again_grow_from_nothing(now: dict[str, float]) -> None:
    assert increase(now, {"a": 4, "b": 5}) == now


STEPS_BEFORE = f"""\
    rnnserve_steps_total{{{VANILLA}}} 100
    rnnserve_steps_total{{model="vanilla",version="2"}} 5000
    rnnserve_sequences_total{{{VANILLA}}} 4
    rnnserve_tick_sessions_sum{{{VANILLA}}} 100
    rnnserve_tick_sessions_count{{{VANILLA}}} 100
    rnnserve_step_seconds_bucket{{{VANILLA},le="0.001"}} 100
    rnnserve_step_seconds_bucket{{{VANILLA},le="0.002"}} 100
    rnnserve_step_seconds_bucket{{{VANILLA},le="+Inf"}} 100
    rnnserve_refusals_total{{reason="QUEUE_FULL"}} 3
    rnnserve_refusals_total{{reason="NOT_FINITE"}} 0
    rnnserve_refusals_total{{reason="DRAINING"}} 1
"""
STEPS_NOW = f"""\
    rnnserve_sessions{{{VANILLA}}} 3
    rnnserve_sessions{{model="vanilla",version="2"}} 2
    rnnserve_parked_sessions{{{VANILLA}}} 6
    rnnserve_session_limit 1000
    rnnserve_store_up 0
    rnnserve_durable_lag_seconds 0.25
    rnnserve_build_info{{version="0.1.0",torch="2",python="3"}} 1
    rnnserve_steps_total{{{VANILLA}}} 160
    rnnserve_steps_total{{model="vanilla",version="2"}} 9000
    rnnserve_sequences_total{{{VANILLA}}} 5
    rnnserve_tick_sessions_sum{{{VANILLA}}} 160
    rnnserve_tick_sessions_count{{{VANILLA}}} 120
    rnnserve_step_seconds_bucket{{{VANILLA},le="0.001"}} 100
    rnnserve_step_seconds_bucket{{{VANILLA},le="0.002"}} 160
    rnnserve_step_seconds_bucket{{{VANILLA},le="+Inf"}} 160
    rnnserve_refusals_total{{reason="QUEUE_FULL"}} 7
    rnnserve_refusals_total{{reason="NOT_FINITE"}} 0
    rnnserve_refusals_total{{reason="DRAINING"}} 1
"""


def test_numbers_are_about_the_time_between_two_readings() -> None:
    span = Span(reading(STEPS_NOW, at_s=12.0, uptime_s=90.0), reading(STEPS_BEFORE, at_s=10.0, uptime_s=88.0))
    (vanilla,) = span.models()
    assert (vanilla.streams, vanilla.parked) == (3, 6)
    assert (vanilla.steps_per_s, vanilla.sequences_per_s, vanilla.tick_sessions) == (30.0, 0.5, 3.0)
    assert vanilla.p50_s == pytest.approx(0.0015)
    assert vanilla.p99_s == pytest.approx(0.00199)
    assert span.totals().refusals_per_s == {"QUEUE_FULL": 2.0}


def test_what_a_model_writes_counts_as_its_steps() -> None:
    symbols = f"rnnserve_generated_symbols_total{{{VANILLA}}} 20"
    (vanilla,) = Span(reading(f"{STEPS_NOW}\n{symbols}", at_s=12.0), reading(STEPS_BEFORE, at_s=10.0)).models()
    assert vanilla.steps_per_s == 30.0 + 10.0


def test_numbers_of_the_first_reading_are_about_the_time_since_the_start() -> None:
    (vanilla,) = Span(reading(STEPS_NOW, at_s=12.0, uptime_s=80.0), None).models()
    assert vanilla.steps_per_s == 2.0
    assert vanilla.tick_sessions == pytest.approx(4 / 3)
    assert vanilla.p50_s == pytest.approx(0.0008)


def test_without_a_time_of_the_start_the_first_reading_has_latencies_but_no_rates() -> None:
    span = Span(reading(STEPS_NOW), None)
    (vanilla,) = span.models()
    assert (vanilla.steps_per_s, vanilla.sequences_per_s, span.totals().refusals_per_s) == (None, None, None)
    assert vanilla.p50_s == pytest.approx(0.0008)


def test_a_model_that_does_nothing_has_no_latency_and_no_mean_tick() -> None:
    (vanilla,) = Span(reading(STEPS_NOW, at_s=12.0), reading(STEPS_NOW, at_s=10.0)).models()
    assert (vanilla.steps_per_s, vanilla.tick_sessions, vanilla.p50_s, vanilla.p99_s) == (0.0, None, None, None)


def test_totals_are_about_all_models() -> None:
    totals = Span(reading(STEPS_NOW, uptime_s=80.0), None).totals()
    assert (totals.server_version, totals.uptime_s, totals.streams, totals.stream_limit) == ("0.1.0", 80.0, 5, 1000)
    assert (totals.parked, totals.store_up, totals.durable_lag_s) == (6, False, 0.25)
    assert totals.refusals == {"QUEUE_FULL": 7, "DRAINING": 1}


def test_a_page_that_says_little_is_no_error() -> None:
    totals = Span(reading("rnnserve_tasks 3"), None).totals()
    assert (totals.server_version, totals.stream_limit, totals.store_up, totals.durable_lag_s) == (None,) * 4
    assert (totals.streams, totals.parked, totals.refusals) == (0, 0, {})


def test_the_lines_above_the_table_say_what_happens_now_and_happened_before() -> None:
    span = Span(reading(STEPS_NOW, at_s=12.0, uptime_s=3_723.0), reading(STEPS_BEFORE, at_s=10.0))
    assert [line.rstrip() for line in drawn(span, 100)[:3]] == [
        "rnnserve 0.1.0 · up 1:02:03 · over the last 2.0 s",
        "streams 5 of 1,000 · parked 6 · store down · durable lag 0.25 s",
        "refusals 2.0/s · since the start QUEUE_FULL 7 (2.0/s), DRAINING 1",
    ]


@pytest.mark.parametrize("width", [80, 100])
def test_a_long_name_gives_way_and_every_number_stays_whole(width: int) -> None:
    name = "s" * 64
    page = STEPS_NOW.replace('"vanilla"', f'"{name}"').replace(" 160", " 160000000")
    *_, line = drawn(Span(reading(page, at_s=1.0, model=name), reading("", at_s=0.0)), width)
    assert len(line) <= width
    shown, version, *numbers = line.split()
    assert (shown[:4], shown[-1], version) == ("ssss", "…", "v1")
    assert numbers == ["3", "6", "160,000,000", "1,333,333", "1.5", "2.0", "5.0"]


@pytest.mark.parametrize(
    ("width", "numbers"),
    [
        (60, ["3", "160,000,000", "1.5", "2.0"]),
        (40, ["160,000,000", "2.0"]),
        (24, ["2.0"]),
    ],
)
def test_a_narrow_terminal_has_fewer_columns_and_the_name_still(width: int, numbers: list[str]) -> None:
    page = STEPS_NOW.replace(" 160", " 160000000")
    *_, headings, line = drawn(Span(reading(page, at_s=1.0), reading("", at_s=0.0)), width)
    assert len(line) <= width
    assert line.split()[:2] == ["vanilla", "v1"]
    assert [number for number in line.split()[2:] if number != "1,333,333"] == numbers
    assert "…" not in headings + line


@pytest.mark.parametrize(
    ("sort", "expected"), [("name", "abc"), ("steps", "cab"), ("p99", "bac"), ("streams", "cab"), ("sequences", "abc")]
)
def test_numbers_fall_unknown_ones_are_last_and_equal_ones_stay_by_name(sort: Column, expected: str) -> None:
    models = [
        load("a", streams=1, steps_per_s=0.0),
        load("b", streams=0, p99_s=0.5),
        load("c", streams=2, steps_per_s=9.5),
    ]
    assert "".join(model.name for model in chosen(models, "", sort)) == expected


def test_a_part_of_the_name_chooses_models() -> None:
    models = [load("speaker"), load("speaker-deep"), load("activity")]
    assert [model.name for model in chosen(models, "EAKER", "name")] == ["speaker", "speaker-deep"]


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("example.com:50051", "http://example.com:9464/metrics"),
        ("dns:///example.com:1", "http://example.com:9464/metrics"),
        ("[::1]:50051", "http://[::1]:9464/metrics"),
        ("unix:/run/rnnserve.sock", "http://localhost:9464/metrics"),
    ],
)
def test_the_page_is_looked_for_on_the_host_of_the_target(target: str, url: str) -> None:
    assert default_url(target) == url == checked_url(url)


@pytest.mark.parametrize("url", ["file:///etc/hosts", "localhost:9464", "http://", "http://a:b/metrics", "http://[::1"])
def test_a_url_that_is_none_of_http_is_never_opened(url: str) -> None:
    with pytest.raises(BadInput, match="--metrics is a URL such as http://localhost:9464/metrics"):
        checked_url(url)

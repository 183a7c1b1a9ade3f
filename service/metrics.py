"""Every Prometheus metric of the service. The parts that count are handed small Protocols of their own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from models.manifest import ModelKey
from service.errors import reasons
from service.sessions.limits import EVICTING
from service.tallies import TallyCounter, TallyHistogram

DURATION_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600,
)  # fmt: skip
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
METHOD = ("grpc_type", "grpc_service", "grpc_method")
MODEL = ("model", "version")


class Metrics:
    """All metrics in one registry. Labels are bounded: never a session id."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._declare_calls()
        self._declare_work()
        ProcessCollector(registry=self.registry)  # memory, processor time, file handles
        self._tasks = Gauge("rnnserve_tasks", "Tasks of the event loop.", registry=self.registry)

    def _declare_calls(self) -> None:
        r = self.registry
        self._started = Counter("grpc_server_started_total", "Calls begun.", METHOD, registry=r)
        self._handled = Counter("grpc_server_handled_total", "Calls ended.", (*METHOD, "grpc_code"), registry=r)
        self._received = TallyCounter("grpc_server_msg_received_total", "Messages received.", METHOD, r)
        self._sent = TallyCounter("grpc_server_msg_sent_total", "Messages sent.", METHOD, r)
        self._handling = Histogram(
            "grpc_server_handling_seconds", "Duration of calls.", METHOD, registry=r, buckets=DURATION_BUCKETS_S
        )
        self._refusals = Counter("rnnserve_refusals_total", "Calls and messages refused.", ("reason",), registry=r)
        for reason in reasons():
            self._refusals.labels(reason)  # from 0 on, so that the first one shows as a rise
        self._build = Info("rnnserve_build", "The running version.", registry=r)
        self._build.info({"version": _version()})

    def _declare_work(self) -> None:
        r = self.registry
        self._steps = TallyCounter("rnnserve_steps_total", "Steps applied to a session.", MODEL, r)
        self._step_s = TallyHistogram(
            "rnnserve_step_seconds", "From a message of steps to its answer.", MODEL, r, DURATION_BUCKETS_S
        )
        self._sessions = Gauge("rnnserve_sessions", "Sessions that have a stream now.", MODEL, registry=r)
        self._opened = Counter("rnnserve_sessions_opened_total", "Sessions begun.", MODEL, registry=r)
        self._resumed = Counter(
            "rnnserve_sessions_resumed_total", "Sessions given to another stream.", MODEL, registry=r
        )
        self._parked = Gauge("rnnserve_parked_sessions", "Sessions kept without a stream.", registry=r)
        self._parked_bytes = Gauge("rnnserve_parked_bytes", "Their states and answers.", registry=r)
        self._evictions = Counter("rnnserve_evictions_total", "Sessions that met a limit.", ("limit",), registry=r)
        for limit in EVICTING:
            self._evictions.labels(limit)
        self._store_up = Gauge("rnnserve_store_up", "1 while the session store answers.", registry=r)
        self._store_up.set(1)
        self._checkpoint_sessions = Histogram(
            "rnnserve_checkpoint_sessions", "Sessions written at a time.", registry=r, buckets=COUNT_BUCKETS
        )
        self._checkpoint_s = Histogram(
            "rnnserve_checkpoint_seconds", "Duration of such a write.", registry=r, buckets=DURATION_BUCKETS_S
        )
        self._tick_sessions = TallyHistogram(
            "rnnserve_tick_sessions", "Sessions that shared a tick.", MODEL, r, COUNT_BUCKETS
        )
        self._tick_s = TallyHistogram("rnnserve_tick_seconds", "Duration of a tick.", MODEL, r, DURATION_BUCKETS_S)
        self._sequences = Counter("rnnserve_sequences_total", "Whole sequences computed.", MODEL, registry=r)
        self._sequence_s = Histogram(
            "rnnserve_sequence_seconds", "From whole sequences to their answers.", MODEL, registry=r,
            buckets=DURATION_BUCKETS_S,
        )  # fmt: skip
        self._batch_sequences = Histogram(
            "rnnserve_batch_sequences", "Sequences that shared a tick.", MODEL, registry=r, buckets=COUNT_BUCKETS
        )
        self._batch_s = Histogram(
            "rnnserve_batch_seconds", "Duration of such a tick.", MODEL, registry=r, buckets=DURATION_BUCKETS_S
        )
        self._queued = Gauge("rnnserve_queued_sequences", "Whole sequences that wait or run.", registry=r)
        self._recordings = Gauge("rnnserve_recordings", "Sequences in parts of which something is kept.", registry=r)
        self._generations = Gauge("rnnserve_generations", "Outputs being written.", MODEL, registry=r)
        self._generations_ended = Counter(
            "rnnserve_generations_ended_total", "Outputs that are over, and why.", (*MODEL, "finish"), registry=r
        )
        self._symbols = TallyCounter("rnnserve_generated_symbols_total", "Symbols of outputs.", MODEL, r)
        self._models = Gauge("rnnserve_models", "Models served, always 1.", MODEL, registry=r)

    def call_started(self, method: tuple[str, str, str]) -> None:
        self._started.labels(*method).inc()

    def call_ended(self, method: tuple[str, str, str], code: str, duration_s: float) -> None:
        self._handled.labels(*method, code).inc()
        self._handling.labels(*method).observe(duration_s)

    def message_received(self, method: tuple[str, str, str]) -> None:
        self._received.inc(method)

    def message_sent(self, method: tuple[str, str, str]) -> None:
        self._sent.inc(method)

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def model_loaded(self, model: ModelKey, loaded: bool) -> None:
        if loaded:
            self._models.labels(*model).set(1)
        else:
            self._models.remove(*model)

    def session_opened(self, model: ModelKey) -> None:
        self._opened.labels(*model).inc()

    def session_resumed(self, model: ModelKey) -> None:
        self._resumed.labels(*model).inc()

    def live_sessions(self, model: ModelKey, sessions: int) -> None:
        self._sessions.labels(*model).set(sessions)

    def parked(self, sessions: int, size_bytes: int) -> None:
        self._parked.set(sessions)
        self._parked_bytes.set(size_bytes)

    def evicted(self, limit: str) -> None:
        self._evictions.labels(limit).inc()

    def store_available(self, available: bool) -> None:
        self._store_up.set(available)

    def checkpoint(self, sessions: int, duration_s: float) -> None:
        self._checkpoint_sessions.observe(sessions)
        self._checkpoint_s.observe(duration_s)

    def steps(self, model: ModelKey, applied: int) -> None:
        self._steps.inc(model, applied)

    def steps_answered(self, model: ModelKey, duration_s: float) -> None:
        self._step_s.observe(model, duration_s)

    def tick(self, model: ModelKey, sessions: int, duration_s: float) -> None:
        self._tick_sessions.observe(model, sessions)
        self._tick_s.observe(model, duration_s)

    def generations(self, model: ModelKey, running: int) -> None:
        self._generations.labels(*model).set(running)

    def generation_ended(self, model: ModelKey, finish: str) -> None:
        self._generations_ended.labels(*model, finish).inc()

    def symbol_generated(self, model: ModelKey) -> None:
        self._symbols.inc(model)

    def count_tasks(self, count: Callable[[], int]) -> None:
        """Ask there at each scrape."""
        self._tasks.set_function(count)

    def queued(self, sequences: int) -> None:
        self._queued.set(sequences)

    def recordings(self, count: int) -> None:
        self._recordings.set(count)

    def batch(self, model: ModelKey, sequences: int, duration_s: float) -> None:
        self._batch_sequences.labels(*model).observe(sequences)
        self._batch_s.labels(*model).observe(duration_s)

    def sequence(self, model: ModelKey) -> None:
        self._sequences.labels(*model).inc()

    def sequences_answered(self, model: ModelKey, duration_s: float) -> None:
        self._sequence_s.labels(*model).observe(duration_s)


def _version() -> str:
    try:
        return version("rnnserve")
    except PackageNotFoundError:
        return "unknown"

"""Every Prometheus metric of a process that serves. The parts that count are handed small Protocols of their own."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import ProcessCollector

from models.manifest import ModelKey
from service.declarations import COUNT_BUCKETS, RESTARTS, Declarations
from service.errors import reasons
from service.sessions.limits import EVICTING

OPERATIONS = (
    *("write", "read", "erase", "probe"),
    *("take", "find", "want", "renew", "bury", "after", "longest_parked", "parked_totals", "totals"),
)
"""Of session stores; all but the first four only of those that several processes use."""
METHOD = ("grpc_type", "grpc_service", "grpc_method")
MODEL = ("model", "version")


class Metrics:
    """All metrics in one registry. Labels are bounded: never a session id, never anything that a client chose."""

    def __init__(self, session_store: str = "memory") -> None:
        """`session_store` is the setting: what is parked in Redis, several services count."""
        declarations = Declarations()
        self._session_store = session_store
        self.registry = declarations.registry
        self.declared = declarations.declared
        self._declare_calls(declarations)
        self._declare_steps(declarations)
        self._declare_sessions(declarations)
        self._declare_store(declarations)
        self._declare_sequences(declarations)
        self._declare_generations(declarations)
        self._declare_models(declarations)
        self._declare_process(declarations)

    def _declare_calls(self, d: Declarations) -> None:
        d.section = "Calls"
        self._started = d.counter("grpc_server_started_total", "Calls begun.", METHOD)
        self._handled = d.counter("grpc_server_handled_total", "Calls ended.", (*METHOD, "grpc_code"))
        self._received = d.tally("grpc_server_msg_received_total", "Messages received.", METHOD)
        self._sent = d.tally("grpc_server_msg_sent_total", "Messages sent.", METHOD)
        self._handling = d.histogram("grpc_server_handling_seconds", "Duration of calls.", METHOD)
        self._refusals = d.counter("rnnserve_refusals_total", "Calls and messages refused.", ("reason",))
        for reason in reasons():
            self._refusals.labels(reason)  # from 0 on, so that the first one shows as a rise

    def _declare_steps(self, d: Declarations) -> None:
        d.section = "Steps of streams"
        self._steps = d.tally("rnnserve_steps_total", "Steps applied to a session.", MODEL)
        self._step_s = d.tally_histogram(
            "rnnserve_step_seconds",
            "From a message of steps, once it is read, to its answer, sent; of a multiplexed stream from the first of "
            "the messages whose steps are answered together.",
            MODEL,
        )
        self._step_queue_s = d.tally_histogram(
            "rnnserve_step_queue_seconds",
            "The wait for a tick, for each tick that a message takes; that of symbols being written, too.",
            MODEL,
        )
        self._tick_s = d.tally_histogram(
            "rnnserve_tick_seconds",
            "Computing a tick, whatever shares it: steps of streams, symbols being written.",
            MODEL,
        )
        self._step_send_s = d.tally_histogram(
            "rnnserve_step_send_seconds", "Of a message of steps: handing the answer to the transport.", MODEL
        )
        self._tick_sessions = d.tally_histogram(
            "rnnserve_tick_sessions", "Sessions, and outputs being written, that shared a tick.", MODEL, COUNT_BUCKETS
        )
        self._queued_steps = d.gauge("rnnserve_queued_steps", "Steps that wait for a tick, looked at once a second.")
        self._queue_age_s = d.gauge("rnnserve_step_queue_age_seconds", "How long the first of them has waited.")

    def _declare_sessions(self, d: Declarations) -> None:
        d.section = "Sessions"
        self._sessions = d.gauge("rnnserve_sessions", "Sessions that have a stream now.", MODEL)
        self._parked = d.gauge(
            "rnnserve_parked_sessions",
            "Sessions kept without a stream, counted about once a second. All services that share a store `redis` say "
            "the same of it.",
            (*MODEL, "store"),
        )
        self._parked_bytes = d.gauge(
            "rnnserve_parked_bytes", "Their states and answers, counted with them.", ("store",)
        )
        self._session_limit = d.gauge(
            "rnnserve_session_limit", "As many may have a stream: the lesser of max_streams and max_sessions."
        )
        self._opened = d.counter("rnnserve_sessions_opened_total", "Sessions begun.", MODEL)
        self._resumed = d.counter("rnnserve_sessions_resumed_total", "Sessions given to another stream.", MODEL)
        self._streams_ended = d.counter(
            "rnnserve_streams_ended_total",
            "Streams of a session that are over: CLOSED and CLIENT_GONE are the client's doing, the rest refusals.",
            (*MODEL, "reason"),
        )
        self._evictions = d.counter("rnnserve_evictions_total", "Sessions that met a limit.", ("limit",))
        for limit in EVICTING:
            self._evictions.labels(limit)

    def _declare_store(self, d: Declarations) -> None:
        d.section = "Session store"
        self._store_up = d.gauge("rnnserve_store_up", "1 while the session store answers.")
        self._store_up.set(1)
        self._store_s = d.histogram("rnnserve_store_seconds", "Duration of what the store was asked.", ("operation",))
        self._store_errors = d.counter(
            "rnnserve_store_errors_total",
            "What it failed to do, and, but for writes, what it did not do in time.",
            ("operation",),
        )
        for operation in OPERATIONS:
            self._store_errors.labels(operation)
        self._checkpoint_interval_s = d.gauge(
            "rnnserve_checkpoint_interval_seconds",
            "From one write of what has changed to the next: checkpoint_interval_s.",
        )
        self._durable_lag_s = d.gauge(
            "rnnserve_durable_lag_seconds", "All that is older is durable; 0 while nothing waits to be written."
        )
        self._unwritten = d.gauge("rnnserve_unwritten_sessions", "Sessions that wait to be written.")
        self._checkpoint_sessions = d.histogram(
            "rnnserve_checkpoint_sessions", "Sessions written at a time.", buckets=COUNT_BUCKETS
        )
        self._checkpoint_s = d.histogram("rnnserve_checkpoint_seconds", "Duration of such a write.")

    def _declare_sequences(self, d: Declarations) -> None:
        d.section = "Whole sequences"
        self._sequences = d.counter("rnnserve_sequences_total", "Whole sequences computed.", MODEL)
        self._sequence_s = d.histogram("rnnserve_sequence_seconds", "From whole sequences to their answers.", MODEL)
        self._sequence_queue_s = d.histogram(
            "rnnserve_sequence_queue_seconds", "Of that: the wait until one is computed.", MODEL
        )
        self._queued = d.gauge("rnnserve_queued_sequences", "Whole sequences that wait or run.")
        self._sequence_age_s = d.gauge(
            "rnnserve_sequence_queue_age_seconds", "How long the first of those has waited that do not run yet."
        )
        self._batch_sequences = d.histogram(
            "rnnserve_batch_sequences", "Sequences that shared a tick.", MODEL, COUNT_BUCKETS
        )
        self._batch_s = d.histogram("rnnserve_batch_seconds", "Duration of such a tick.", MODEL)
        self._batch_steps = d.counter(
            "rnnserve_batch_steps_total", "Steps that such ticks have computed, in each direction.", MODEL
        )
        self._batch_padding = d.counter("rnnserve_batch_padding_total", "Of these, in vain: behind an end.", MODEL)
        self._abandoned = d.counter(
            "rnnserve_sequences_abandoned_total", "Sequences that were computed when their caller left.", MODEL
        )
        self._recordings = d.gauge("rnnserve_recordings", "Sequences in parts of which something is kept.")

    def _declare_generations(self, d: Declarations) -> None:
        d.section = "Outputs that are written"
        self._generations = d.gauge("rnnserve_generations", "Outputs being written.", MODEL)
        self._generations_ended = d.counter(
            "rnnserve_generations_ended_total", "Outputs that are over, and why.", (*MODEL, "finish")
        )
        self._symbols = d.tally("rnnserve_generated_symbols_total", "Symbols of outputs.", MODEL)

    def _declare_models(self, d: Declarations) -> None:
        d.section = "Models"
        self._models = d.gauge("rnnserve_models", "Models served, always 1.", MODEL)
        self._model_bytes = d.gauge("rnnserve_model_bytes", "Memory of the weights, of all workers together.", MODEL)
        self._model_load_s = d.gauge("rnnserve_model_load_seconds", "How long it took to load and verify.", MODEL)

    def _declare_process(self, d: Declarations) -> None:
        d.section = "Processes"
        running = {name: running_version(package) for name, package in (("version", "rnnserve"), ("torch", "torch"))}
        d.info("rnnserve_build", "What is running.", running | {"python": platform.python_version()})
        self._lane_deaths = d.counter(*RESTARTS).labels("lane", "died")
        self._tasks = d.gauge("rnnserve_tasks", "Tasks of the event loop.")
        self._loop_lag_s = d.gauge("rnnserve_loop_lag_seconds", "How late the event loop was, of late.")
        ProcessCollector(registry=d.registry)  # memory, processor time, file handles

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

    def model_loaded(self, model: ModelKey, size_bytes: int, load_s: float) -> None:
        self._models.labels(*model).set(1)
        self._model_bytes.labels(*model).set(size_bytes)
        self._model_load_s.labels(*model).set(load_s)
        for counter in (self._opened, self._resumed, self._abandoned):
            counter.labels(*model)

    def model_unloaded(self, model: ModelKey) -> None:
        for gauge in (self._models, self._model_bytes, self._model_load_s):
            gauge.remove(*model)

    def settings(self, *, max_streams: int, max_sessions: int, checkpoint_interval_s: float) -> None:
        self._session_limit.set(min(max_streams, max_sessions))
        self._checkpoint_interval_s.set(checkpoint_interval_s)

    def session_opened(self, model: ModelKey) -> None:
        self._opened.labels(*model).inc()

    def session_resumed(self, model: ModelKey) -> None:
        self._resumed.labels(*model).inc()

    def stream_ended(self, model: ModelKey, reason: str) -> None:
        self._streams_ended.labels(*model, reason).inc()

    def live_sessions(self, model: ModelKey, sessions: int) -> None:
        self._sessions.labels(*model).set(sessions)

    def parked(self, sessions: Mapping[ModelKey, int], size_bytes: int) -> None:
        for model, count in sessions.items():
            self._parked.labels(*model, self._session_store).set(count)
        self._parked_bytes.labels(self._session_store).set(size_bytes)

    def evicted(self, limit: str) -> None:
        self._evictions.labels(limit).inc()

    def store_available(self, available: bool) -> None:
        self._store_up.set(available)

    def store_asked(self, operation: str, duration_s: float) -> None:
        self._store_s.labels(operation).observe(duration_s)

    def store_failed(self, operation: str) -> None:
        self._store_errors.labels(operation).inc()

    def durable_lag(self, sessions: int, lag_s: float) -> None:
        self._unwritten.set(sessions)
        self._durable_lag_s.set(lag_s)

    def checkpoint(self, sessions: int, duration_s: float) -> None:
        self._checkpoint_sessions.observe(sessions)
        self._checkpoint_s.observe(duration_s)

    def steps(self, model: ModelKey, applied: int) -> None:
        self._steps.inc(model, applied)

    def steps_answered(self, model: ModelKey, duration_s: float, send_s: float) -> None:
        self._step_s.observe(model, duration_s)
        self._step_send_s.observe(model, send_s)

    def waited(self, model: ModelKey, duration_s: float) -> None:
        self._step_queue_s.observe(model, duration_s)

    def tick(self, model: ModelKey, sessions: int, duration_s: float) -> None:
        self._tick_sessions.observe(model, sessions)
        self._tick_s.observe(model, duration_s)

    def step_queue(self, steps: int, age_s: float) -> None:
        self._queued_steps.set(steps)
        self._queue_age_s.set(age_s)

    def generations(self, model: ModelKey, running: int) -> None:
        self._generations.labels(*model).set(running)

    def generation_ended(self, model: ModelKey, finish: str) -> None:
        self._generations_ended.labels(*model, finish).inc()

    def symbol_generated(self, model: ModelKey) -> None:
        self._symbols.inc(model)

    def count_tasks(self, count: Callable[[], int]) -> None:
        """Ask there at each scrape."""
        self._tasks.set_function(count)

    def loop_lag(self, lag_s: float) -> None:
        self._loop_lag_s.set(lag_s)

    def queued(self, sequences: int) -> None:
        self._queued.set(sequences)

    def sequence_queue_age(self, age_s: float) -> None:
        self._sequence_age_s.set(age_s)

    def recordings(self, count: int) -> None:
        self._recordings.set(count)

    def sequence_begun(self, model: ModelKey, queued_s: float) -> None:
        self._sequence_queue_s.labels(*model).observe(queued_s)

    def sequence_abandoned(self, model: ModelKey) -> None:
        self._abandoned.labels(*model).inc()

    def lane_died(self) -> None:
        self._lane_deaths.inc()

    def batch(self, model: ModelKey, sequences: int, duration_s: float, steps: int, padding: int) -> None:
        self._batch_sequences.labels(*model).observe(sequences)
        self._batch_s.labels(*model).observe(duration_s)
        self._batch_steps.labels(*model).inc(steps)
        self._batch_padding.labels(*model).inc(padding)

    def sequence(self, model: ModelKey) -> None:
        self._sequences.labels(*model).inc()

    def sequences_answered(self, model: ModelKey, duration_s: float) -> None:
        self._sequence_s.labels(*model).observe(duration_s)


def running_version(package: str) -> str:
    """Of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"

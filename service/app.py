"""The whole service: the only file that knows every part. Build, start, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, start_http_server

from models.bundle import Bundle
from models.manifest import ModelKey
from rnnserve.v1 import model_service_pb2, real_time_service_pb2, sequence_service_pb2, session_service_pb2
from rnnserve.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from rnnserve.v1.real_time_service_pb2_grpc import add_RealTimeServiceServicer_to_server
from rnnserve.v1.sequence_service_pb2_grpc import add_SequenceServiceServicer_to_server
from rnnserve.v1.session_service_pb2_grpc import add_SessionServiceServicer_to_server
from service import logs, spill_dir, state_dir
from service.addresses import StartError, check_address, why_not_bound
from service.api.calls import CallInterceptor, Refusals
from service.api.drain import RETRY_ALONE_S, RETRY_AMONG_OTHERS_S, Drain
from service.api.generations import Generations
from service.api.limits import Limits
from service.api.models import ModelService
from service.api.real_time import RealTimeService
from service.api.sequences import SequenceService
from service.api.sessions import SessionService
from service.catalog.catalog import Bfloat16, Catalog, load_catalog
from service.catalog.loading import Change, Loader
from service.engine.executor import TorchExecutor, usable_device
from service.engine.sequence_lane import Lane, SequenceLane
from service.engine.sequence_worker import LoadBundle, ProcessWorker, Worker
from service.engine.step_engine import StepEngine
from service.metrics import Metrics, running_version
from service.sessions.checkpoints import Checkpointer
from service.sessions.copies import SessionCopies
from service.sessions.limits import SessionLimits
from service.sessions.registry import SessionRegistry
from service.sessions.shared import Sharing
from service.sessions.snapshots import SnapshotKeys
from service.sessions.stores.daemon_thread import DaemonThread
from service.sessions.stores.memory import MemoryStore
from service.sessions.stores.redis import RedisStore
from service.sessions.stores.shared import SharedStore
from service.sessions.stores.shared_sqlite import SharedSqliteStore
from service.sessions.stores.sqlite import SqliteStore
from service.sessions.stores.store import SessionStore, StoreError
from service.settings import Settings
from service.stopping import finished_before
from service.tracing import exporter

log = logging.getLogger(__name__)

SERVICES = [
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (real_time_service_pb2, "RealTimeService"),
        (sequence_service_pb2, "SequenceService"),
        (model_service_pb2, "ModelService"),
        (session_service_pb2, "SessionService"),
    )
]
PENDING_CALLS = 1_000  # besides streams
TRANSPORT_SLACK_BYTES = 2**20  # a message this far above our limit still reaches us, so that it gets a reason
SHUTDOWN_S = 0.25
OBSERVE_EVERY_S = 1.0
FLUSH_S = 1.0  # for the last spans, wherever they go
ENDING_S = 2.0  # of the time for a drain: for last words, the sessions' last checkpoint and the end itself
REDIS_SLACK_S = 600.0  # a service that is down for so long still finds what was parked
STORE_HEALTH = "session-store"
SEQUENCE_SERVICE = SERVICES[1]
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


class Service:
    """All parts, put together."""

    _stopping: asyncio.Task[None]

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        *,
        owner: str = "",
        lane: Lane | None = None,
        change: Callable[[Change], Awaitable[None]] | None = None,
    ) -> None:
        """`owner` is our name in a store that others use, too; `lane` that of all workers, and `change` changes the
        models of them all. Alone we have a lane of our own, and change ours."""
        self.settings = settings
        self.catalog = catalog
        self._shares_port = lane is not None
        self.metrics = Metrics(settings.session_store)
        self.metrics.settings(
            max_streams=settings.max_streams,
            max_sessions=settings.max_sessions,
            checkpoint_interval_s=settings.checkpoint_interval_s,
        )
        self.drain = Drain(RETRY_AMONG_OTHERS_S if self._shares_port else RETRY_ALONE_S)
        self.health = health.aio.HealthServicer()
        self._device = _device(settings)
        self.engine = StepEngine(
            {
                b.manifest.key: TorchExecutor(b.predictor, self._device)
                for b in catalog
                if b.manifest.network.streamable
            },
            max_tick_sessions=settings.max_tick_sessions,
            metrics=self.metrics,
            prepare_thread=partial(torch.set_num_threads, settings.step_threads),  # each thread has its own number
        )
        niceness = settings.sequence_niceness
        self.lane = lane or sequence_lane(settings, self.metrics, partial(ProcessWorker, niceness=niceness))
        self.loader = Loader(catalog, self.lane, self)
        refusals = Refusals(self.metrics)
        self._spans = exporter(settings.trace_sample_ratio, running_version("rnnserve"))
        tracing = self._spans.tracing
        limits = Limits(
            max_message_bytes=settings.max_message_bytes,
            max_steps_per_message=settings.max_steps_per_message,
            max_outstanding_steps=settings.max_outstanding_steps,
            max_sequence_steps=settings.max_sequence_steps,
            max_recording_steps=settings.max_recording_steps,
            part_timeout_s=settings.part_timeout_s,
            max_queued_sequences=settings.max_queued_sequences,
            max_bulk_sequences=settings.max_bulk_sequences,
            idle_timeout_s=settings.idle_timeout_s,
        )
        self.sessions = SessionRegistry(
            self.engine,
            _store(settings, owner),
            {bundle.manifest.key: bundle.manifest for bundle in catalog},
            SessionLimits(
                max_streams=settings.max_streams,
                max_sessions=settings.max_sessions,
                max_sessions_per_tenant=settings.max_sessions_per_tenant,
                max_parked_bytes=settings.max_parked_bytes,
                max_held_bytes=settings.max_held_bytes,
                resume_window_s=settings.resume_window_s,
                idle_timeout_s=settings.idle_timeout_s,
                max_age_s=settings.max_session_age_s,
            ),
            checkpoint_interval_s=settings.checkpoint_interval_s,
            checkpoint_steps=settings.checkpoint_steps,
            store_timeout_s=settings.store_timeout_s,
            metrics=self.metrics,
            sharing=Sharing(owner, settings.session_lease_s) if owner else None,
        )
        copies = SessionCopies(self.sessions, _snapshot_keys(settings), lifetime_s=settings.snapshot_lifetime_s)
        self.generations = Generations(settings.max_generations, self.metrics)
        self.real_time = RealTimeService(
            catalog, self.sessions, self.engine, self.generations, limits, refusals, self.metrics, self.drain, tracing
        )
        self.server = self._server(CallInterceptor(self.metrics, refusals, self.drain, tracing))
        add_RealTimeServiceServicer_to_server(self.real_time, self.server)
        add_SequenceServiceServicer_to_server(
            SequenceService(catalog, self.lane, limits, refusals, self.metrics), self.server
        )
        add_ModelServiceServicer_to_server(ModelService(catalog, change or self.loader.change), self.server)
        add_SessionServiceServicer_to_server(SessionService(self.sessions, copies, limits), self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self.server)

    def _server(self, interceptor: CallInterceptor) -> grpc.aio.Server:
        return grpc.aio.server(
            interceptors=[interceptor],
            options=[
                ("grpc.so_reuseport", int(self._shares_port)),  # alone, a port in use is an error
                ("grpc.max_receive_message_length", self.settings.max_message_bytes + TRANSPORT_SLACK_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients with keepalive are welcome
                ("grpc.keepalive_permit_without_calls", 1),
                # When all clients come back at once, gRPC cancels calls that wait behind the first 1,000.
                ("grpc.server.max_pending_requests", PENDING_CALLS + self.settings.max_streams),
                ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS + self.settings.max_streams),
            ],
        )

    async def run(
        self, stop: asyncio.Event, serving: Callable[[int], AbstractContextManager[None]], dead: Sequence[str] = ()
    ) -> None:
        """Serve until `stop`, then drain. `serving` is entered with the port once it is open. Raises StartError.

        Where `stop` comes before that, the port is never opened.

        `dead` are owners of sessions that no longer live.
        """
        event_loop = asyncio.get_running_loop()
        self.metrics.count_tasks(lambda: len(asyncio.all_tasks(event_loop)))
        await self._start_sessions()
        await self.sessions.bury(dead)
        loops = [asyncio.create_task(part.run()) for part in (self.lane, self.sessions)]
        for name, part in ((STORE_HEALTH, self.sessions.checkpoints), (SEQUENCE_SERVICE, self.lane)):
            loops.append(asyncio.create_task(self._report_health(name, part)))
        loops.append(asyncio.create_task(self._observe()))
        try:
            if not await finished_before(stop, self.lane.warm_up([bundle.folder for bundle in self.catalog])):
                return
            port = self._bind()  # only now, for clients that connect would wait until we serve
            await self.server.start()
            await self._set_health()
            gc.freeze()  # what lives until the end need not be searched again and again
            with serving(port):
                await self._until(stop, loops)
                await self._drain()
        finally:
            await self.server.stop(SHUTDOWN_S)
            for loop in loops:
                loop.cancel()
            self.engine.close()
            self.lane.close()
            await self.sessions.stop(SHUTDOWN_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await DaemonThread("spans").do(self._spans.flush)

    def _bind(self) -> int:
        host, port = self.settings.host, self.settings.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return self.server.add_insecure_port(address)
        except RuntimeError:
            raise StartError(f"host, port: {address} cannot be bound") from None

    def model_names(self) -> str:
        """All that is served, for the log."""
        return ", ".join(f"{bundle.manifest.name}/{bundle.manifest.version}" for bundle in self.catalog)

    async def add_model(self, bundle: Bundle) -> None:
        """Serve it from now on."""
        manifest = bundle.manifest
        if manifest.network.streamable:
            self.engine.add(manifest.key, TorchExecutor(bundle.predictor, self._device))
        self.sessions.serve(manifest)
        self.catalog.add(bundle)
        await self._report_model(manifest.key)

    async def remove_model(self, model: ModelKey) -> None:
        """Serve it no more."""
        self.catalog.remove(model)
        self.sessions.retire(model)
        self.generations.retire(model)
        self.engine.remove(model)
        await self._report_model(model)

    def set_log_level(self, level: str) -> None:
        """Of this process and of its lane."""
        logs.set_level(level)
        self.lane.set_log_level(level)

    def streams_of(self, model: ModelKey) -> int:
        """How many live ones there are, and outputs being written."""
        return self.sessions.live_of(model) + self.generations.running_of(model)

    async def _report_model(self, model: ModelKey) -> None:
        """To the metrics and to whoever asks for its health, which is one for all its versions."""
        if model in self.catalog:
            bundle = self.catalog.find(*model)
            self.metrics.model_loaded(model, bundle.weights_bytes, bundle.load_s)
        else:
            self.metrics.model_unloaded(model)
        names = {bundle.manifest.name for bundle in self.catalog}
        await self.health.set(f"models/{model.name}", SERVING if model.name in names else NOT_SERVING)

    async def _set_health(self) -> None:
        for bundle in self.catalog:
            await self._report_model(bundle.manifest.key)
        for name in ("", *SERVICES, STORE_HEALTH):
            await self.health.set(name, SERVING)

    async def _until(self, stop: asyncio.Event, loops: list[asyncio.Task[None]]) -> None:
        """Wait for the signal; a loop that ends before it takes the service down loudly."""
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([stopping, *loops], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _drain(self) -> None:
        """Within the time for it: end the calls, then write what the sessions have become."""
        total_s = self.settings.drain_timeout_s
        deadline_s = time.monotonic() + total_s
        log.info("draining for up to %g s", total_s)
        await self.health.enter_graceful_shutdown()
        if self._shares_port:  # who comes back must meet another worker, not us again over a connection that it has
            self._stopping = asyncio.create_task(self.server.stop(total_s))
        ending_s = min(ENDING_S, total_s / 2)
        await self.drain.run(total_s - ending_s, self.real_time.notify_draining, last_words_s=ending_s / 4)
        await self.sessions.park_all(max(deadline_s - ending_s / 2 - time.monotonic(), SHUTDOWN_S))
        log.info("drained")

    async def _start_sessions(self) -> None:
        try:
            await self.sessions.start()
        except StoreError as error:
            raise StartError(f"session_store: {error}") from None

    async def _observe(self) -> None:
        """What is counted by looking at it."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + OBSERVE_EVERY_S
            await asyncio.sleep(OBSERVE_EVERY_S)
            self.metrics.loop_lag(loop.time() - due_s)
            self.metrics.step_queue(*self.engine.queue())
            self.metrics.sequence_queue_age(self.lane.queue_age_s())
            self.metrics.durable_lag(*self.sessions.checkpoints.lag())

    async def _report_health(self, name: str, part: Lane | Checkpointer) -> None:
        """Of what is down at times."""
        while True:
            await part.available_changed.wait()
            part.available_changed.clear()
            await self.health.set(name, SERVING if part.available else NOT_SERVING)


def sequence_lane(
    settings: Settings, metrics: Metrics, worker: Callable[[int, int, LoadBundle, Path | None], Worker]
) -> SequenceLane:
    """The lane for whole sequences, as it is set.

    `worker` begins one, given the most sequences of a tick, its threads, what loads a bundle, and where to spill.
    """
    load = Bfloat16(settings.bfloat16_models, settings.max_bfloat16_loss_points).load
    return SequenceLane(
        partial(worker, settings.max_batch_sequences, settings.sequence_threads, load, settings.spill_dir),
        max_queued=settings.max_queued_sequences,
        max_batch_steps=settings.max_batch_steps,
        max_recordings=settings.max_recordings,
        metrics=metrics,
    )


def _device(settings: Settings) -> torch.device:
    try:
        return usable_device(settings.device)
    except ValueError as error:
        raise StartError(f"device: {settings.device!r} cannot be used: {error}") from None


def _store(settings: Settings, owner: str) -> SessionStore | SharedStore:
    file = settings.state_dir / "sessions.sqlite"
    if settings.session_store == "memory":
        return MemoryStore()
    if settings.session_store == "redis":
        return _redis_store(settings)
    if owner:
        return SharedSqliteStore(file, power_loss_safe=settings.power_loss_safe)
    return SqliteStore(file, power_loss_safe=settings.power_loss_safe)


def _snapshot_keys(settings: Settings) -> SnapshotKeys | None:
    file = settings.snapshot_key_file
    try:
        return None if file is None else SnapshotKeys.parse(file.read_text("utf-8", "replace"))
    except OSError as error:
        raise StartError(f"snapshot_key_file: {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StartError(f"snapshot_key_file: {file}: {error}") from None


def _redis_store(settings: Settings) -> RedisStore:
    """Raises StartError."""
    try:
        return RedisStore(
            settings.redis_url.get_secret_value(),
            prefix=settings.redis_prefix,
            ttl_s=2 * settings.resume_window_s + REDIS_SLACK_S,
            timeout_s=settings.store_timeout_s,
        )
    except StoreError as error:
        raise StartError(str(error)) from None


def stop_on_signals() -> asyncio.Event:
    """Set by the first SIGTERM, SIGINT or SIGHUP; the second one kills, as it would have without us."""
    stop = asyncio.Event()

    def stop_or_end(number: int) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop_or_end, number)
    return stop


@contextmanager
def metrics_page(settings: Settings, registry: CollectorRegistry) -> Iterator[int]:
    """Serves /metrics; its port. Raises StartError."""
    host, port = settings.host, settings.metrics_port
    try:
        page, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise StartError(f"metrics_port: {port} on {host} {why_not_bound(error)}") from None
    try:
        yield page.server_port
    finally:
        page.shutdown()
        page.server_close()
        thread.join()


def prepare_threads(settings: Settings) -> None:
    """Before gRPC starts its threads, which take over how this one is scheduled.

    They wake up for each event on the network. As batch jobs they let the event loop finish what it does, so that more
    events share a wakeup and more steps a tick; on one core that is worth half of the throughput or more.
    """
    torch.set_num_threads(settings.step_threads)
    if sys.platform == "linux":
        with suppress(OSError):  # some sandboxes do not let anybody choose
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


async def serve(settings: Settings) -> None:
    """Build and run the service in this process, until SIGTERM or SIGINT. Raises StartError and CatalogError."""
    prepare_threads(settings)
    stop = stop_on_signals()
    spill_dir.check(settings.spill_dir)
    bfloat16 = Bfloat16(settings.bfloat16_models, settings.max_bfloat16_loss_points)
    catalog = load_catalog(settings.model_repository, bfloat16=bfloat16)
    with state_dir.locked(settings.state_dir):
        owner = uuid.uuid4().hex if settings.session_store == "redis" else ""
        service = Service(settings, catalog, owner=owner)
        logs.change_level_on_signals(service.set_log_level)
        check_address(settings.host, settings.port)
        dead = state_dir.former_owners(settings.state_dir)
        if owner:
            state_dir.keep_owners(settings.state_dir, [owner])
        with metrics_page(settings, service.metrics.registry) as metrics_port:

            def serving(port: int) -> AbstractContextManager[None]:
                page = f"http://{settings.host}:{metrics_port}/metrics"
                log.info("serving %s on %s:%d, metrics on %s", service.model_names(), settings.host, port, page)
                return state_dir.announced(settings.state_dir, pid=os.getpid(), port=port, metrics_port=metrics_port)

            await service.run(stop, serving, dead)

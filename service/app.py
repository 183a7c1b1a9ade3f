"""The whole service: the only file that knows every part. Build, start, drain."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from rnnserve.v1 import model_service_pb2, real_time_service_pb2, sequence_service_pb2, session_service_pb2
from rnnserve.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from rnnserve.v1.real_time_service_pb2_grpc import add_RealTimeServiceServicer_to_server
from rnnserve.v1.sequence_service_pb2_grpc import add_SequenceServiceServicer_to_server
from rnnserve.v1.session_service_pb2_grpc import add_SessionServiceServicer_to_server
from service.api.calls import CallInterceptor, Refusals
from service.api.drain import Drain
from service.api.limits import Limits
from service.api.models import ModelService
from service.api.real_time import RealTimeService
from service.api.sequences import SequenceService
from service.api.sessions import SessionService
from service.catalog.catalog import Catalog, load_catalog
from service.engine.executor import TorchExecutor
from service.engine.sequence_lane import SequenceLane
from service.engine.step_engine import StepEngine
from service.metrics import Metrics
from service.sessions.copies import SessionCopies
from service.sessions.limits import SessionLimits
from service.sessions.registry import SessionRegistry
from service.sessions.snapshots import SnapshotKeys
from service.sessions.stores.memory import MemoryStore
from service.sessions.stores.sqlite import SqliteStore
from service.sessions.stores.store import SessionStore, StoreError
from service.settings import Settings

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
ENDING_S = 2.0  # of the time for a drain: for last words, the sessions' last checkpoint and the end itself
STORE_HEALTH = "session-store"


class StartError(RuntimeError):
    """The service cannot start; the message says why in a sentence."""


class Service:
    """All parts, put together."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self.settings = settings
        self.catalog = catalog
        self.metrics = Metrics()
        self.drain = Drain()
        self.health = health.aio.HealthServicer()
        self.engine = StepEngine(
            {b.manifest.key: TorchExecutor(b.predictor) for b in catalog if b.manifest.network.streamable},
            max_tick_sessions=settings.max_tick_sessions,
            metrics=self.metrics,
        )
        self.lane = SequenceLane(
            threads=settings.sequence_threads,
            niceness=settings.sequence_niceness,
            max_queued=settings.max_queued_sequences,
            max_batch=settings.max_batch_sequences,
            max_batch_steps=settings.max_batch_steps,
            metrics=self.metrics,
        )
        refusals = Refusals(self.metrics)
        limits = Limits(
            max_message_bytes=settings.max_message_bytes,
            max_steps_per_message=settings.max_steps_per_message,
            max_sequence_steps=settings.max_sequence_steps,
            max_queued_sequences=settings.max_queued_sequences,
            max_bulk_sequences=settings.max_bulk_sequences,
        )
        self.sessions = SessionRegistry(
            self.engine,
            _store(settings),
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
        )
        copies = SessionCopies(self.sessions, _snapshot_keys(settings), lifetime_s=settings.snapshot_lifetime_s)
        self.real_time = RealTimeService(catalog, self.sessions, limits, refusals, self.metrics)
        self.server = self._server(CallInterceptor(self.metrics, refusals, self.drain))
        add_RealTimeServiceServicer_to_server(self.real_time, self.server)
        add_SequenceServiceServicer_to_server(
            SequenceService(catalog, self.lane, limits, refusals, self.metrics), self.server
        )
        add_ModelServiceServicer_to_server(ModelService(catalog), self.server)
        add_SessionServiceServicer_to_server(SessionService(self.sessions, copies, limits), self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self.server)

    def _server(self, interceptor: CallInterceptor) -> grpc.aio.Server:
        return grpc.aio.server(
            interceptors=[interceptor],
            options=[
                ("grpc.so_reuseport", 0),  # a port in use is an error, not shared
                ("grpc.max_receive_message_length", self.settings.max_message_bytes + TRANSPORT_SLACK_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients with keepalive are welcome
                ("grpc.keepalive_permit_without_calls", 1),
                # When all clients come back at once, gRPC cancels calls that wait behind the first 1,000.
                ("grpc.server.max_pending_requests", PENDING_CALLS + self.settings.max_streams),
                ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS + self.settings.max_streams),
            ],
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once. Raises StartError."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, _stop_or_end, stop, number)
        event_loop = asyncio.get_running_loop()
        self.metrics.count_tasks(lambda: len(asyncio.all_tasks(event_loop)))
        with self._state_dir_locked():
            await self._start_sessions()
            await self._serve(stop, self._bind())

    async def _serve(self, stop: asyncio.Event, port: int) -> None:
        loops = [asyncio.create_task(part.run()) for part in (self.engine, self.lane, self.sessions)]
        loops.append(asyncio.create_task(self._report_store_health()))
        with self._metrics_page() as metrics_port:
            try:
                await self.lane.warm_up([bundle.folder for bundle in self.catalog])
                await self.server.start()
                await self._set_health()
                with self._announced(port, metrics_port):
                    await self._until(stop, loops)
                    await self._drain()
            finally:
                await self.server.stop(SHUTDOWN_S)
                for loop in loops:
                    loop.cancel()
                self.engine.close()
                self.lane.close()
                await self.sessions.stop(SHUTDOWN_S)

    def _bind(self) -> int:
        host, port = self.settings.host, self.settings.port
        _check_address(host, port)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return self.server.add_insecure_port(address)
        except RuntimeError:
            raise StartError(f"host, port: {address} cannot be bound") from None

    @contextmanager
    def _metrics_page(self) -> Iterator[int]:
        host, port = self.settings.host, self.settings.metrics_port
        try:
            page, thread = start_http_server(port, host, self.metrics.registry)
        except OSError as error:
            raise StartError(f"metrics_port: {port} on {host} {_why_not_bound(error)}") from None
        try:
            yield page.server_port
        finally:
            page.shutdown()
            page.server_close()
            thread.join()

    async def _set_health(self) -> None:
        for bundle in self.catalog:
            self.metrics.model_loaded(bundle.manifest.key)
        names = {f"models/{bundle.manifest.name}" for bundle in self.catalog}
        for name in ("", *SERVICES, STORE_HEALTH, *sorted(names)):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)

    @contextmanager
    def _announced(self, port: int, metrics_port: int) -> Iterator[None]:
        """Say where we serve: in the log and in a file."""
        host = self.settings.host
        log.info("serving %s on %s:%d, metrics on http://%s:%d/metrics", self._names(), host, port, host, metrics_port)
        file = self.settings.state_dir / "server.json"
        try:
            _write_whole(file, json.dumps({"pid": os.getpid(), "port": port, "metrics_port": metrics_port}))
        except OSError as error:
            raise StartError(f"state_dir: {file} cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            file.unlink(missing_ok=True)

    def _names(self) -> str:
        return ", ".join(f"{bundle.manifest.name}/{bundle.manifest.version}" for bundle in self.catalog)

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
        ending_s = min(ENDING_S, total_s / 2)
        await self.drain.run(total_s - ending_s, self.real_time.notify_draining, last_words_s=ending_s / 4)
        await self.sessions.park_all(max(deadline_s - ending_s / 2 - time.monotonic(), SHUTDOWN_S))
        log.info("drained")

    async def _start_sessions(self) -> None:
        try:
            await self.sessions.start()
        except StoreError as error:
            raise StartError(f"session_store: {error}") from None

    @contextmanager
    def _state_dir_locked(self) -> Iterator[None]:
        """Two servers in one folder would write each other's sessions over."""
        folder = self.settings.state_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
        except OSError as error:
            raise StartError(f"state_dir: {folder} cannot be written: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StartError(f"state_dir: {folder} is in use by another server") from None
            yield

    async def _report_store_health(self) -> None:
        changed = self.sessions.checkpoints.available_changed
        while True:
            await changed.wait()
            changed.clear()
            status = health_pb2.HealthCheckResponse
            available = self.sessions.checkpoints.available
            await self.health.set(STORE_HEALTH, status.SERVING if available else status.NOT_SERVING)


def _store(settings: Settings) -> SessionStore:
    if settings.session_store == "memory":
        return MemoryStore()
    return SqliteStore(settings.state_dir / "sessions.sqlite", power_loss_safe=settings.power_loss_safe)


def _snapshot_keys(settings: Settings) -> SnapshotKeys | None:
    file = settings.snapshot_key_file
    try:
        return None if file is None else SnapshotKeys.parse(file.read_text("utf-8", "replace"))
    except OSError as error:
        raise StartError(f"snapshot_key_file: {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise StartError(f"snapshot_key_file: {file}: {error}") from None


def _check_address(host: str, port: int) -> None:
    """A plain socket says why an address cannot be bound; gRPC writes lines of its own and says only that."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise StartError(f"host: {host!r} cannot be resolved") from None
    errors = [error for family, *_, address in addresses if (error := _try_to_bind(family, address))]
    if len(errors) == len(addresses):  # gRPC, too, is content with one that works
        field, what = ("host", host) if errors[0].errno == errno.EADDRNOTAVAIL else ("port", f"{port} on {host}")
        raise StartError(f"{field}: {what} {_why_not_bound(errors[0])}")


def _try_to_bind(family: socket.AddressFamily, address: tuple[Any, ...]) -> OSError | None:
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _why_not_bound(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "is in use by another program"
    if error.errno == errno.EADDRNOTAVAIL:
        return "is no address of this machine"
    return f"cannot be bound: {error.strerror}"


def _stop_or_end(stop: asyncio.Event, number: int) -> None:
    """The first signal stops; the second one kills, as it would have without us."""
    if stop.is_set():
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    stop.set()


def _write_whole(file: Path, text: str) -> None:
    """Readers see all of it or none."""
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)


async def serve(settings: Settings) -> None:
    """Build and run the service. Raises StartError and CatalogError."""
    torch.set_num_threads(settings.step_threads)
    await Service(settings, load_catalog(settings.model_repository)).run()

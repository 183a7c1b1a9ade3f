"""The whole service: the only file that knows every part. Build, start, drain."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from rnnserve.v1 import model_service_pb2, real_time_service_pb2, sequence_service_pb2
from rnnserve.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from rnnserve.v1.real_time_service_pb2_grpc import add_RealTimeServiceServicer_to_server
from rnnserve.v1.sequence_service_pb2_grpc import add_SequenceServiceServicer_to_server
from service.api.calls import CallInterceptor, Refusals
from service.api.drain import Drain
from service.api.limits import Limits
from service.api.models import ModelService
from service.api.real_time import RealTimeService
from service.api.sequences import SequenceService
from service.catalog.catalog import Catalog, load_catalog
from service.engine.executor import TorchExecutor
from service.engine.sequence_lane import SequenceLane
from service.engine.step_engine import StepEngine
from service.metrics import Metrics
from service.sessions.registry import SessionRegistry
from service.settings import Settings

log = logging.getLogger(__name__)

SERVICES = [
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (real_time_service_pb2, "RealTimeService"),
        (sequence_service_pb2, "SequenceService"),
        (model_service_pb2, "ModelService"),
    )
]
TRANSPORT_SLACK_BYTES = 2**20  # a message this far above our limit still reaches us, so that it gets a reason
SHUTDOWN_S = 0.25


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
        sessions = SessionRegistry(self.engine, max_sessions=settings.max_sessions, metrics=self.metrics)
        self.real_time = RealTimeService(catalog, sessions, limits, refusals, self.metrics)
        self.server = self._server(CallInterceptor(self.metrics, refusals, self.drain))
        add_RealTimeServiceServicer_to_server(self.real_time, self.server)
        add_SequenceServiceServicer_to_server(
            SequenceService(catalog, self.lane, limits, refusals, self.metrics), self.server
        )
        add_ModelServiceServicer_to_server(ModelService(catalog), self.server)
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
            ],
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Raises StartError."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        port = self._bind()
        loops = [asyncio.create_task(self.engine.run()), asyncio.create_task(self.lane.run())]
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

    def _bind(self) -> int:
        address = f"{self.settings.host}:{self.settings.port}"
        try:
            return self.server.add_insecure_port(address)
        except RuntimeError:
            raise StartError(f"host, port: {address} cannot be bound; is another server running there?") from None

    @contextmanager
    def _metrics_page(self) -> Iterator[int]:
        host, port = self.settings.host, self.settings.metrics_port
        try:
            page, thread = start_http_server(port, host, self.metrics.registry)
        except OSError as error:
            raise StartError(f"metrics_port: {host}:{port} cannot be bound: {error.strerror}") from None
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
        for name in ("", *SERVICES, *sorted(names)):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)

    @contextmanager
    def _announced(self, port: int, metrics_port: int) -> Iterator[None]:
        """Say where we serve: in the log and, if there is a folder for it, in a file."""
        host = self.settings.host
        log.info("serving %s on %s:%d, metrics on http://%s:%d/metrics", self._names(), host, port, host, metrics_port)
        if self.settings.state_dir is None:
            yield
            return
        file = self.settings.state_dir / "server.json"
        try:
            self.settings.state_dir.mkdir(parents=True, exist_ok=True)
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
        log.info("draining for up to %g s", self.settings.drain_timeout_s)
        await self.health.enter_graceful_shutdown()
        await self.drain.run(self.settings.drain_timeout_s, self.real_time.notify_draining)
        log.info("drained")


def _write_whole(file: Path, text: str) -> None:
    """Readers see all of it or none."""
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)


async def serve(settings: Settings) -> None:
    """Build and run the service. Raises StartError and CatalogError."""
    torch.set_num_threads(settings.step_threads)
    await Service(settings, load_catalog(settings.model_repository)).run()

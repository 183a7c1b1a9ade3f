"""Several workers on one port, and a lane for whole sequences: starts them, watches them, and speaks for all.

Neither torch nor gRPC is imported here, so that the processes begin fresh.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest, start_http_server

from service import state_dir
from service.addresses import StartError, reserve_shared_port, why_not_bound
from service.control import Channel
from service.merged_metrics import MergedMetrics, registry_of
from service.settings import Settings

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
ASK_EVERY_S = 0.2
METRICS_EVERY_S = 1.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
CALM_AFTER_S = 60.0  # a process that has served for so long is started again at once
LAST_WORDS_S = 2.0
SCRAPE_TIMEOUT_S = 2.0


class Child:
    """A worker, or the lane: one process, from its start to its end."""

    def __init__(self, name: str, module: str) -> None:
        self.name = name
        self.owner = uuid.uuid4().hex  # of the sessions that it will have; never used again
        self.page = ""  # the last that it said of its metrics
        self.live = 0
        self.served = asyncio.Event()
        self.heard_s = time.monotonic()
        self.started_s = self.heard_s
        self.ending = False
        self.killed = False
        self._module = module
        self._paged = asyncio.Event()

    async def start(self, arguments: list[str]) -> None:
        """As a fresh interpreter, in a session of its own, so that Ctrl-C reaches us alone."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", self._module, str(theirs.fileno()), *arguments]
            self.process = await asyncio.create_subprocess_exec(
                *command, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self.channel = await Channel.of(ours)
        self._listening = asyncio.create_task(self._listen())

    async def wait_until_serving(self) -> None:
        """Raises StartError if it ends before, or does not begin in time."""
        ended = asyncio.create_task(self.process.wait())
        serving = asyncio.create_task(self.served.wait())
        await asyncio.wait([ended, serving], timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        serving.cancel()
        if not self.served.is_set():
            raise StartError(f"{self.name} did not start")

    async def ask_for_metrics(self) -> None:
        """Return when they have come."""
        self._paged.clear()
        self.channel.send(ask="metrics")
        await self._paged.wait()

    async def ended(self) -> int:
        """Its exit code, once it is gone and all it said was heard."""
        code = await self.process.wait()
        await self._listening
        self.channel.close()
        return code

    def drain(self) -> None:
        """Let it end in its own time."""
        self.ending = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.killed = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def _listen(self) -> None:
        while message := await self.channel.receive():
            self.heard_s = time.monotonic()
            match message:
                case {"serving": int()}:
                    self.served.set()
                case {"live": int(live)}:
                    self.live = live
                case {"metrics": str(page)}:
                    self.page = page
                    self._paged.set()


class Supervisor:
    """See the module."""

    def __init__(self, settings: Settings, folder: Path, port: int) -> None:
        self._settings = settings
        self._lane_address = folder / "lane"
        # The last one wins, so the port that was found for 0 does.
        self._arguments = [*sys.argv[1:], "--port", str(port), "--workers", "1"]
        self._port = port
        self._children: dict[str, Child] = {}
        self._unburied: list[str] = []
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._own = CollectorRegistry()
        ProcessCollector(registry=self._own)
        self._restarts = Counter(
            "rnnserve_process_restarts_total", "Processes started again.", ["process", "why"], registry=self._own
        )
        self._serving = Gauge("rnnserve_workers", "Workers that serve.", registry=self._own)
        self._merged = MergedMetrics(self._pages)

    @property
    def _workers(self) -> list[Child]:
        return [child for child in self._children.values() if child.name != "lane"]

    async def run(self) -> None:
        """Until SIGTERM or SIGINT, then drain. Raises StartError."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop_or_kill)
        self._unburied = state_dir.former_owners(self._settings.state_dir)
        rolling: set[asyncio.Task[None]] = set()

        def roll() -> None:
            rolling.add(asyncio.create_task(self._roll()))

        self._loop.add_signal_handler(signal.SIGHUP, roll)
        try:
            await self._start("lane")
            await asyncio.gather(*(self._start(f"worker-{n}") for n in range(self._settings.workers)))
            with self._metrics_page() as metrics_port, self._announced(metrics_port):
                watching = [asyncio.create_task(self._keep(name)) for name in list(self._children)]
                watching += [asyncio.create_task(self._ask()), asyncio.create_task(self._gather_metrics())]
                await self._stopping.wait()
                for task in (*watching, *rolling):
                    task.cancel()
                await self._drain()
        finally:
            for child in self._children.values():
                if child.process.returncode is None:
                    child.kill()

    def _stop_or_kill(self) -> None:
        if self._stopping.is_set():
            for child in self._children.values():
                child.kill()
            os._exit(1)
        self._stopping.set()

    async def _start(self, name: str) -> Child:
        """Serving. Raises StartError."""
        is_lane = name == "lane"
        child = Child(name, "service.lane" if is_lane else "service.worker")
        if not is_lane:
            owners = [worker.owner for worker in self._workers]
            state_dir.keep_owners(self._settings.state_dir, [*self._unburied, *owners, child.owner])
        await child.start([*([] if is_lane else [child.owner]), str(self._lane_address), *self._arguments])
        former = self._children.get(name)
        if former is None:
            self._children[name] = child
        await child.wait_until_serving()
        self._children[name] = child
        self._serving.set(len(self._workers))
        self._bury()
        return child

    async def _keep(self, name: str) -> None:
        """Start it again whenever it dies."""
        pause_s = FIRST_PAUSE_S
        while True:
            child = self._children[name]
            await child.ended()
            if self._children[name] is not child:  # replaced meanwhile
                continue
            self._mourn(child)
            if time.monotonic() - child.started_s > CALM_AFTER_S:
                pause_s = FIRST_PAUSE_S
            log.error("%s has died; starting it again in %g s", name, pause_s)
            self._restarts.labels(name, "stuck" if child.killed else "died").inc()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            try:
                await self._start(name)
            except StartError as error:
                log.error("%s", error)

    def _mourn(self, child: Child) -> None:
        self._merged.bury(child.page)
        child.page, child.live = "", 0
        if child.name != "lane":
            self._unburied.append(child.owner)
            self._bury()

    def _bury(self) -> None:
        """Tell a worker that serves whose sessions are free."""
        living = [worker for worker in self._workers if worker.served.is_set() and worker.process.returncode is None]
        if living and self._unburied:
            living[0].channel.send(dead=self._unburied)
            self._unburied = []

    async def _ask(self) -> None:
        """Whether all are alive; and tell each how many streams the others have."""
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            live = sum(worker.live for worker in self._workers)
            for child in self._children.values():
                child.channel.send(ask="alive", live_elsewhere=live - child.live)
                silent_s = time.monotonic() - child.heard_s
                if child.served.is_set() and not child.killed and silent_s > self._settings.worker_timeout_s:
                    log.error("%s has not answered for %.1f s", child.name, silent_s)
                    child.kill()

    async def _roll(self) -> None:
        """One worker after the other: its replacement serves before it drains."""
        log.info("restarting all workers, one after the other")
        for name in [worker.name for worker in self._workers]:
            former = self._children[name]
            try:
                await self._start(name)
            except StartError as error:
                log.error("%s again: %s; the others go on", name, error)
                return
            self._restarts.labels(name, "rolled").inc()
            former.drain()
            await former.ended()
            self._mourn(former)
        log.info("all workers are new")

    async def _drain(self) -> None:
        total_s = self._settings.drain_timeout_s
        log.info("draining %d workers for up to %g s", len(self._workers), total_s)
        workers = self._workers
        for worker in workers:
            worker.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(total_s + LAST_WORDS_S):
                await asyncio.gather(*(worker.ended() for worker in workers))
        lane = self._children["lane"]  # they needed it until now
        lane.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await lane.ended()
        log.info("drained")

    async def _gather_metrics(self) -> None:
        """So that little is forgotten of one that dies."""
        while True:
            await self._ask_for_metrics()
            await asyncio.sleep(METRICS_EVERY_S)

    async def _ask_for_metrics(self) -> None:
        children = [child for child in self._children.values() if child.served.is_set()]
        with suppress(TimeoutError):
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                await asyncio.gather(*(child.ask_for_metrics() for child in children))

    def _pages(self) -> dict[str, str]:
        """In the thread of a scrape."""
        asyncio.run_coroutine_threadsafe(self._ask_for_metrics(), self._loop).result(2 * SCRAPE_TIMEOUT_S)
        pages = {child.name: child.page for child in self._children.values() if child.page}
        return pages | {"supervisor": generate_latest(self._own).decode()}

    @contextmanager
    def _metrics_page(self) -> Iterator[int]:
        host, port = self._settings.host, self._settings.metrics_port
        try:
            page, _ = start_http_server(port, host, registry_of(self._merged))
        except OSError as error:
            raise StartError(f"metrics_port: {port} on {host} {why_not_bound(error)}") from None
        try:
            yield page.server_port
        finally:
            page.server_close()

    @contextmanager
    def _announced(self, metrics_port: int) -> Iterator[None]:
        host = self._settings.host
        page = f"http://{host}:{metrics_port}/metrics"
        log.info("%d workers serve on %s:%d, metrics on %s", len(self._workers), host, self._port, page)
        workers = [worker.process.pid for worker in self._workers]
        where = {"pid": os.getpid(), "port": self._port, "metrics_port": metrics_port, "workers": workers}
        with state_dir.announced(self._settings.state_dir, **where):
            yield


async def supervise(settings: Settings) -> None:
    """Serve by several processes until SIGTERM or SIGINT. Raises StartError."""
    if settings.session_store == "memory":
        raise StartError("workers: sessions in memory are each worker's own; use another session_store, or 1 worker")
    with (
        state_dir.locked(settings.state_dir),
        reserve_shared_port(settings.host, settings.port) as reserved,
        tempfile.TemporaryDirectory(prefix="rnnserve-") as folder,
    ):
        await Supervisor(settings, Path(folder), reserved.getsockname()[1]).run()

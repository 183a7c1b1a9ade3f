"""Several workers on one port, and a lane for whole sequences: starts them, watches them, and speaks for all.

Neither torch nor gRPC is imported here, so that the processes begin fresh.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest, start_http_server

from service import logs, spill_dir, state_dir
from service.addresses import StartError, reserve_shared_port, why_not_bound
from service.changes import Changes
from service.child import LANE, Change, Child
from service.errors import Draining
from service.merged_metrics import MergedMetrics, Snapshot, Values, counted, registry_of
from service.settings import Settings, SettingsError, packed, read_settings
from service.stopping import finished_before
from service.supervisor_metrics import SupervisorMetrics

log = logging.getLogger(__name__)

ASK_EVERY_S = 0.2
METRICS_EVERY_S = 1.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
CALM_AFTER_S = 60.0  # a process that has served for so long is started again at once
LAST_WORDS_S = 2.0
SCRAPE_TIMEOUT_S = 2.0
ROLLING = Draining("all processes are being restarted; a model can be changed after that", retry_after_s=1.0)
ONLY_AT_START = (
    "workers", "host", "port", "metrics_port", "state_dir", "session_store", "redis_url", "redis_prefix",
)  # fmt: skip


class Supervisor:
    """See the module."""

    def __init__(self, settings: Settings, folder: Path, port: int) -> None:
        self._settings = settings
        self._folder = folder
        self._lanes = 0  # that have had a socket of their own
        self._port = port
        self._children: dict[str, Child] = {}
        self._leaving: list[Child] = []  # that have a successor and end their streams
        self._places: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # who is being replaced
        self._unburied: list[str] = []
        self._started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._rolling = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._changes = Changes(lambda: [child for child in self._children.values() if child.serves])
        self._of_dead: Values = {}
        self._metrics = SupervisorMetrics(lambda: sum(worker.serves for worker in self._workers))

    @property
    def _workers(self) -> list[Child]:
        return [child for child in self._children.values() if not child.is_lane]

    @property
    def _all(self) -> list[Child]:
        return [*self._children.values(), *self._leaving]

    async def run(self) -> None:
        """Until SIGTERM or SIGINT, then drain. Raises StartError, and whatever fails here that should not."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop_or_kill)
        logs.change_level_on_signals(self._set_log_level)
        self._loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._roll()))
        self._unburied = state_dir.former_owners(self._settings.state_dir)
        try:
            if not await finished_before(self._stopping, self._start_all()):
                await self._drain()
                return
            self._started.set()
            with self._metrics_page() as metrics_port, self._announced(metrics_port):
                for name in list(self._children):
                    self._begin(self._keep(name))
                self._begin(self._ask())
                self._begin(self._gather_metrics())
                await self._stopping.wait()
                for task in self._tasks:
                    task.cancel()
                await self._drain()
            if self._failure is not None:
                raise self._failure
        finally:
            for child in self._all:
                if child.process.returncode is None:
                    child.kill()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Without waiting for it; it ends with us."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        """One that fails, which none should, takes the service down loudly."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._failure = error
            self._stopping.set()

    def _set_log_level(self, level: Any) -> None:
        """In all processes, and in those that are begun from now on."""
        logs.set_level(level)
        self._settings = self._settings.model_copy(update={"log_level": level})
        for child in self._all:
            child.channel.send(log_level=level)

    def _stop_or_kill(self) -> None:
        if self._stopping.is_set():
            for child in self._all:
                child.kill()
            os._exit(1)
        self._stopping.set()

    async def _start_all(self) -> None:
        """The lane first, for it says what there is to be served. Raises StartError."""
        async with self._changes.none_meanwhile():
            await self._start(LANE)
            await asyncio.gather(*(self._start(f"worker-{n}") for n in range(self._settings.workers)))

    async def _start(self, name: str) -> None:
        """Return when it serves in that place. Raises StartError."""
        child = Child(name, lambda child, number, change: self._begin(self._change(child, number, change)))
        if not child.is_lane:
            owners = [worker.owner for worker in self._all if not worker.is_lane]
            state_dir.keep_owners(self._settings.state_dir, [*self._unburied, *owners, child.owner])
        settings = self._settings.model_copy(update={"port": self._port})
        await child.start(settings=packed(settings), lane=str(self._lane_socket), models=self._changes.models)
        try:
            await child.wait_until_serving()
        except BaseException:
            child.kill()
            raise
        self._changes.models = child.models
        self._children[name] = child
        self._metrics.began(name)
        self._bury()

    @property
    def _lane_socket(self) -> Path:
        return self._folder / f"lane-{self._lanes}"

    async def _keep(self, name: str) -> None:
        """Start it again whenever it dies."""
        pause_s = FIRST_PAUSE_S
        while True:
            child = self._children[name]
            await child.ended()
            async with self._places[name]:
                if self._children[name] is not child:  # replaced meanwhile
                    continue
                self._mourn(child)
                if time.monotonic() - child.started_s > CALM_AFTER_S:
                    pause_s = FIRST_PAUSE_S
                log.error("%s has died; starting it again in %g s", name, pause_s)
                self._metrics.restarted(name, "stuck" if child.killed else "died")
                pause_s = await self._start_after(name, pause_s)

    async def _start_after(self, name: str, pause_s: float = 0.0) -> float:
        """Until it serves; then how long the pause will be before the next time."""
        while True:
            await asyncio.sleep(pause_s)
            pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
            try:
                async with self._changes.none_meanwhile():
                    await self._start(name)
                return pause_s
            except StartError as error:
                log.error("%s; trying again in %g s", error, pause_s)
                self._metrics.restarted(name, "failed")

    def _mourn(self, child: Child) -> None:
        self._of_dead = counted(self._of_dead, child.page)
        child.page, child.live = "", (0, 0)
        if not child.is_lane:
            self._unburied.append(child.owner)
            self._bury()

    def _bury(self) -> None:
        """Tell a worker that serves whose sessions are free."""
        living = [worker for worker in self._workers if worker.serves]
        if living and self._unburied:
            living[0].channel.send(dead=self._unburied)
            self._unburied = []

    async def _ask(self) -> None:
        """Whether all are alive; and tell each how many streams and generations the others have."""
        while True:
            asked_s = time.monotonic()
            await asyncio.sleep(ASK_EVERY_S)
            paused_s = time.monotonic() - asked_s - ASK_EVERY_S  # when we could hear nobody
            streams, generations = (sum(child.live[i] for child in self._all) for i in range(2))
            for child in self._all:
                elsewhere = [streams - child.live[0], generations - child.live[1]]
                child.channel.send(ask="alive", live_elsewhere=elsewhere)
                child.heard_s += paused_s
                silent_s = time.monotonic() - child.heard_s
                if child.serves and not child.killed and silent_s > self._settings.worker_timeout_s:
                    log.error("%s has not answered for %.1f s", child.name, silent_s)
                    child.kill()

    async def _change(self, worker: Child, number: int, change: Change) -> None:
        worker.channel.send(changed=number, refusal=await self._changes.make(change))

    async def _roll(self) -> None:
        """Everything anew, one process after the other: each has a successor that serves before it drains.

        If the lane or the first worker cannot start anew, all stays as it was.
        """
        await self._started.wait()
        async with self._rolling, self._changes.refused_meanwhile(ROLLING):
            log.info("restarting all processes, one after the other")
            before = self._settings, self._changes.models, self._lanes
            lane = None
            first, *others = [worker.name for worker in self._workers]
            try:
                self._settings = self._settings_anew()
                self._changes.models = None
                self._lanes += 1
                lane = await self._replace(LANE, self._start)
                former = await self._replace(first, self._start)
            except (SettingsError, StartError) as error:
                log.error("nothing is restarted: %s", error)
                self._settings, self._changes.models, self._lanes = before
                if lane is not None:
                    await self._put_back(lane)
                return
            await self._leave(former)
            for name in others:
                await self._leave(await self._replace(name, self._start_after))
            await self._leave(lane)  # the last worker that used it has gone
            log.info("all workers are new")

    def _settings_anew(self) -> Settings:
        """From flags, variables and the file. Raises SettingsError."""
        settings = read_settings(sys.argv[1:])
        changed = [name for name in ONLY_AT_START if getattr(settings, name) != getattr(self._settings, name)]
        if changed:
            raise SettingsError(f"only a start of the whole service can change {', '.join(changed)}")
        return settings

    async def _replace(self, name: str, start: Callable[[str], Coroutine[Any, Any, object]]) -> Child:
        """Whoever was there until its successor serves. Raises what `start` does; then it stays."""
        async with self._places[name]:
            former = self._children[name]
            await start(name)
            self._metrics.restarted(name, "rolled")
            self._leaving.append(former)
            return former

    async def _put_back(self, former: Child) -> None:
        """In its place, from which its successor goes."""
        successor, self._children[former.name] = self._children[former.name], former
        self._leaving.remove(former)
        self._leaving.append(successor)
        await self._leave(successor)

    async def _leave(self, former: Child) -> None:
        former.drain()
        await former.ended()
        self._leaving.remove(former)
        self._mourn(former)

    async def _drain(self) -> None:
        total_s = self._settings.drain_timeout_s
        workers = [child for child in self._all if not child.is_lane]
        log.info("draining %d workers for up to %g s", len(workers), total_s)
        await _end(workers, total_s + LAST_WORDS_S)
        await _end([child for child in self._all if child.is_lane], LAST_WORDS_S)  # the workers needed it until now
        log.info("drained")

    async def _gather_metrics(self) -> None:
        """So that little is forgotten of one that dies."""
        while True:
            await self._ask_for_metrics()
            await asyncio.sleep(METRICS_EVERY_S)

    async def _ask_for_metrics(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                await asyncio.gather(*(child.ask_for_metrics() for child in self._all if child.serves))

    async def _snapshot(self) -> Snapshot:
        await self._ask_for_metrics()
        pages = {"supervisor": generate_latest(self._metrics.registry).decode()}
        pages |= {f"{child.name}-former": child.page for child in self._leaving if child.page}
        pages |= {child.name: child.page for child in self._children.values() if child.page}
        return Snapshot(pages, self._of_dead)

    def _snapshot_for_scrape(self) -> Snapshot:
        """In the thread of a scrape."""
        return asyncio.run_coroutine_threadsafe(self._snapshot(), self._loop).result(2 * SCRAPE_TIMEOUT_S)

    @contextmanager
    def _metrics_page(self) -> Iterator[int]:
        host, port = self._settings.host, self._settings.metrics_port
        try:
            page, _ = start_http_server(port, host, registry_of(MergedMetrics(self._snapshot_for_scrape)))
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
        where = {"pid": os.getpid(), "port": self._port, "metrics_port": metrics_port}
        with state_dir.announced(self._settings.state_dir, **where):
            yield


async def _end(children: list[Child], timeout_s: float) -> None:
    """Drain them, for so long at most."""
    for child in children:
        child.drain()
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(child.ended() for child in children))


async def supervise(settings: Settings) -> None:
    """Serve by several processes until SIGTERM or SIGINT. Raises StartError."""
    if settings.session_store == "memory":
        raise StartError("workers: sessions in memory are each worker's own; use another session_store, or 1 worker")
    spill_dir.check(settings.spill_dir)
    with (
        state_dir.locked(settings.state_dir),
        reserve_shared_port(settings.host, settings.port) as reserved,
        tempfile.TemporaryDirectory(prefix="rnnserve-") as folder,
    ):
        await Supervisor(settings, Path(folder), reserved.getsockname()[1]).run()

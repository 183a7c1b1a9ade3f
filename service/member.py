"""A process under the supervisor, be it a worker or the lane: how it begins, and how it takes part in changes."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.manifest import ModelKey
from service import logs
from service.catalog.catalog import Bfloat16, Catalog, load_catalog
from service.catalog.loading import Change, Loader
from service.control import Channel
from service.errors import Internal, ServingError, packed
from service.logs import LogSettings
from service.settings import Settings, unpacked

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class Member:
    """What the supervisor gives to each. `owner` is its name in the session store, `lane` the socket of the lane."""

    settings: Settings
    channel: Channel
    catalog: Catalog
    owner: str
    lane: Path

    @classmethod
    async def begin(cls) -> Member:
        """`python -m … FD`, and what is said over that FD. Raises CatalogError."""
        _die_with_the_supervisor()
        channel = await Channel.of(socket.socket(fileno=int(sys.argv[1])))
        begin = await channel.receive()
        if begin is None:
            sys.exit(1)  # there is no supervisor any more
        settings = unpacked(begin["settings"])
        logs.configure(LogSettings(settings.log_level, settings.log_format))
        only = begin["models"] and [ModelKey(*model) for model in begin["models"]]
        bfloat16 = Bfloat16(settings.bfloat16_models, settings.max_bfloat16_loss_points)
        catalog = load_catalog(settings.model_repository, only, bfloat16)
        return cls(settings, channel, catalog, begin["owner"], Path(begin["lane"]))

    def serving(self) -> None:
        """Tell the supervisor that it serves, and what."""
        self.channel.send(serving=True, models=[bundle.manifest.key for bundle in self.catalog])

    async def take_part(self, loader: Loader, change: Change, step: str) -> None:
        """Do one step of a change, and tell the supervisor how that went."""
        steps = {"prepare": loader.prepare, "commit": loader.commit, "abandon": loader.abandon}
        try:
            await steps[step](change)
        except ServingError as error:
            self.channel.send(refusal=packed(error))
        except Exception:
            log.exception("a model could not be changed")
            self.channel.send(refusal=packed(Internal("the model could not be changed")))
        else:
            self.channel.send(refusal=None)


def _die_with_the_supervisor() -> None:
    """Even if we are stuck or stopped then, and keep its port. Linux only; elsewhere only who still runs ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Tasks:
    """Begun, and kept until they end."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Without waiting for it."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

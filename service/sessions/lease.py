"""How long this process may answer for the sessions it has, in a store that several owners use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from service.errors import StoreUnavailable

log = logging.getLogger(__name__)

RENEWALS = 3  # within a lease


class Lease:
    """Renewed again and again; it runs out where the process is paused, and others may take its sessions then.

    While the store is down nobody can take anything: each time that it does not answer, the lease goes on in memory.
    """

    def __init__(
        self, renew: Callable[[float], Awaitable[bool]], lapsed: Callable[[], Awaitable[None]], lease_s: float
    ) -> None:
        self._renew = renew
        self._lapsed = lapsed
        self._lease_s = lease_s
        self._until_s = 0.0  # of time.monotonic(), which goes on in a process that is paused
        self._renewed = asyncio.Event()

    @property
    def held(self) -> bool:
        """Whether nobody else can have taken a session of ours."""
        return time.monotonic() < self._until_s

    async def begin(self) -> None:
        """The first lease. Raises StoreUnavailable."""
        began_s = time.monotonic()
        await self._renew(self._lease_s)
        self._until_s = began_s + self._lease_s

    async def wait_until_held(self) -> None:
        """After a pause: return once it is known again whose the sessions are."""
        while not self.held:
            self._renewed.clear()
            await self._renewed.wait()

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            await self._renew_once()
            await asyncio.sleep(self._lease_s / RENEWALS)

    async def _renew_once(self) -> None:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(self._lease_s / RENEWALS):  # no wait for the store outlasts the lease
                had_lived = await self._renew(self._lease_s)
            if not had_lived:
                log.warning("the lease of %g s has run out; what others have taken meanwhile is theirs", self._lease_s)
                await self._lapsed()
        except (StoreUnavailable, TimeoutError):
            if self.held:  # one that was paused comes here late, and first has to ask whose its sessions are
                self._until_s = time.monotonic() + self._lease_s
        else:
            self._until_s = began_s + self._lease_s
            self._renewed.set()

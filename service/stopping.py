"""To end in the midst of a start."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def finished_before(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Whether the work was done before `stop` was set; if not, it is cancelled, and how it ended is no matter.

    Raises what the work does.
    """
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return False
    await working
    return True

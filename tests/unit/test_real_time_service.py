import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from models.recurrent import NetworkSpec
from rnnserve.v1.real_time_service_pb2 import OpenSession, StreamStepsRequest
from service.api.drain import Drain
from service.api.real_time import RealTimeService
from service.errors import Draining
from service.metrics import Metrics
from tests.support.bundles import features, manifest

MANIFEST = manifest("vanilla", NetworkSpec(cell="tanh", features=3, hidden_size=2, outputs=2), features(3))


class SlowSessions:
    """A registry whose store takes its time to find a session."""

    def __init__(self) -> None:
        self.asked, self.found = asyncio.Event(), asyncio.Event()
        self.left: list[object] = []

    async def open(self, *_: object) -> tuple[object, list[object]]:
        self.asked.set()
        await self.found.wait()
        key = SimpleNamespace(session_id="a")
        return SimpleNamespace(model=MANIFEST.key, key=key, next_step=0, durable_step=0), []

    def leave(self, session: object, _stream: object) -> None:
        self.left.append(session)


async def opening() -> AsyncIterator[StreamStepsRequest]:
    yield StreamStepsRequest(open=OpenSession(model="vanilla", session_id="a"))
    await asyncio.Event().wait()


async def test_a_session_that_is_found_after_the_drain_has_begun_is_parked_again() -> None:
    sessions = SlowSessions()
    given: dict[str, Any] = {
        "catalog": SimpleNamespace(find=lambda *_: SimpleNamespace(manifest=MANIFEST)),
        "sessions": sessions,
        "engine": None,
        "generations": None,
        "limits": SimpleNamespace(check_size=lambda _: 0),
        "refusals": None,
        "metrics": Metrics(),
        "drain": Drain(),
    }
    context = SimpleNamespace(send_initial_metadata=AsyncMock(), invocation_metadata=lambda: ())
    service = RealTimeService(**given)
    call = asyncio.ensure_future(service.StreamSteps(opening(), context))  # type: ignore[arg-type]
    await sessions.asked.wait()
    await service.notify_draining(1.0)
    sessions.found.set()
    with pytest.raises(Draining):
        await call
    assert len(sessions.left) == 1

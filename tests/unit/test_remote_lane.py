"""The lane's process, as its workers reach it."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.bundle import Bundle, load_bundle
from service.engine.remote_lane import LaneServer, RemoteLane
from service.errors import ModelNotFound

NEVER_ASKED: Any = SimpleNamespace(predict=None)


def serves_nothing(name: str, version: int) -> Bundle:
    raise ModelNotFound(f"{name}/{version} is not here", field="model")


def test_what_the_lane_refuses_the_worker_refuses_and_its_end_with_workers_connected_is_no_error(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = load_bundle(repository / "vanilla" / "1")

    async def ask() -> None:
        await LaneServer(NEVER_ASKED, serves_nothing).serve(tmp_path / "lane")
        lane = RemoteLane(tmp_path / "lane", max_waiting=1)
        running = asyncio.create_task(lane.run())
        with pytest.raises(ModelNotFound, match="vanilla/1 is not here"):
            await lane.predict(bundle, [np.zeros((2, 3), np.float32)], wait=False)
        assert not running.done()

    asyncio.run(ask())
    assert not caplog.records

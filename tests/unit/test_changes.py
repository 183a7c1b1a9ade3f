"""Changes of what all processes serve: made by all of them or by none."""

import asyncio
from typing import cast

import pytest

from service.changes import Changes
from service.child import Change, Child, Model, Refusal
from service.errors import Draining

REFUSAL = {"reason": "MODEL_IN_USE"}


class Process:
    """Does what it is told, unless it is to refuse, or dead."""

    def __init__(self, name: str, log: list[tuple[str, str]], refusal: Refusal = None) -> None:
        self.name = name
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self._log = log
        self._refusal = refusal

    async def do(self, step: str, change: Change) -> Refusal:
        self._log.append((step, self.name))
        await self.may_go_on.wait()
        return self._refusal if step == "prepare" else None


def changes_of(*processes: Process, models: list[Model] | None = None) -> Changes:
    changes = Changes(lambda: cast("list[Child]", list(processes)))
    changes.models = models
    return changes


def change(name: str, *, served: bool) -> Change:
    return {"name": name, "version": 1, "served": served, "end_streams": False}


async def test_the_lane_has_a_model_before_the_workers_use_it_and_loses_it_after_them() -> None:
    log: list[tuple[str, str]] = []
    changes = changes_of(Process("lane", log), Process("worker-0", log), models=[])
    await changes.make(change("text", served=True))
    assert [name for step, name in log if step == "commit"] == ["lane", "worker-0"]
    assert changes.models == [("text", 1)]
    log.clear()
    await changes.make(change("text", served=False))
    assert [name for step, name in log if step == "commit"] == ["worker-0", "lane"]
    assert changes.models == []


async def test_what_one_process_refuses_all_abandon_and_what_is_served_stays() -> None:
    log: list[tuple[str, str]] = []
    processes = Process("lane", log), Process("worker-0", log), Process("worker-1", log, REFUSAL)
    changes = changes_of(*processes, models=[("text", 1)])
    assert await changes.make(change("text", served=False)) == REFUSAL
    assert {step for step, _ in log} == {"prepare", "abandon"}
    assert {name for step, name in log if step == "abandon"} == {"lane", "worker-0", "worker-1"}
    assert changes.models == [("text", 1)]


async def test_changes_are_made_one_after_the_other() -> None:
    log: list[tuple[str, str]] = []
    process = Process("lane", log)
    process.may_go_on.clear()
    changes = changes_of(process, models=[])
    first = asyncio.create_task(changes.make(change("a", served=True)))
    second = asyncio.create_task(changes.make(change("b", served=True)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert log == [("prepare", "lane")]
    process.may_go_on.set()
    await asyncio.gather(first, second)
    assert [step for step, _ in log] == ["prepare", "commit", "prepare", "commit"]
    assert changes.models == [("a", 1), ("b", 1)]


@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_changes_while_a_process_starts_even_if_that_fails(fails: bool) -> None:
    log: list[tuple[str, str]] = []
    changes = changes_of(Process("lane", log), models=[])
    try:
        async with changes.none_meanwhile():
            made = asyncio.create_task(changes.make(change("text", served=True)))
            await asyncio.sleep(0)
            assert log == []
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    await made
    assert changes.models == [("text", 1)]


async def test_no_process_starts_while_something_changes() -> None:
    process = Process("lane", [])
    process.may_go_on.clear()
    changes = changes_of(process, models=[])
    made = asyncio.create_task(changes.make(change("text", served=True)))
    await asyncio.sleep(0)
    seen: list[list[Model] | None] = []

    async def start() -> None:
        async with changes.none_meanwhile():
            seen.append(changes.models)

    starting = asyncio.create_task(start())
    await asyncio.sleep(0)
    assert seen == []
    process.may_go_on.set()
    await asyncio.gather(made, starting)
    assert seen == [[("text", 1)]]


async def test_what_lasts_long_has_changes_refused_also_those_that_wait_already() -> None:
    log: list[tuple[str, str]] = []
    changes = changes_of(Process("lane", log), models=[])
    async with changes.none_meanwhile():
        waiting = asyncio.create_task(changes.make(change("a", served=True)))
        await asyncio.sleep(0)
        async with changes.refused_meanwhile(Draining("later", retry_after_s=1.0)):
            for refusal in (await waiting, await changes.make(change("b", served=True))):
                assert refusal is not None
                assert (refusal["kind"], refusal["retry_after_s"]) == ("Draining", 1.0)
    assert log == []
    assert await changes.make(change("a", served=True)) is None
    assert changes.models == [("a", 1)]

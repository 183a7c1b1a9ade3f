"""How long a process may answer for its sessions, by a clock that the tests turn."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from service.errors import StoreUnavailable
from service.sessions import lease as lease_module
from service.sessions.lease import Lease

LEASE_S = 3.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def monotonic(self) -> float:
        return self.now_s


class Store:
    """Renews, or does what `renew` says."""

    def __init__(self) -> None:
        self.renew: Callable[[], Awaitable[bool]] = self.renewed
        self.lapses = 0

    async def renewed(self) -> bool:
        return True

    async def had_run_out(self) -> bool:
        return False

    async def down(self) -> bool:
        raise StoreUnavailable("down")

    async def lapsed(self) -> None:
        self.lapses += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


@pytest.fixture
async def store() -> Store:
    return Store()


@pytest.fixture
async def lease(store: Store, clock: Clock) -> Lease:
    lease = Lease(lambda _: store.renew(), store.lapsed, LEASE_S)
    await lease.begin()
    return lease


async def test_a_lease_is_held_for_its_time_from_when_its_renewal_was_asked_for(lease: Lease, clock: Clock) -> None:
    clock.now_s += LEASE_S - 0.1
    assert lease.held
    clock.now_s += 0.2
    assert not lease.held


async def test_while_the_store_is_down_a_process_that_was_not_paused_holds_its_lease(
    lease: Lease, store: Store, clock: Clock
) -> None:
    store.renew = store.down
    for _ in range(10):
        clock.now_s += LEASE_S / 2
        await lease._renew_once()
        assert lease.held


async def test_one_that_was_paused_past_its_lease_does_not_hold_it_because_the_store_is_down(
    lease: Lease, store: Store, clock: Clock
) -> None:
    store.renew = store.down
    clock.now_s += 2 * LEASE_S
    await lease._renew_once()
    assert not lease.held


async def test_one_that_was_paused_while_it_asked_a_store_that_then_failed_does_not_hold_its_lease(
    lease: Lease, store: Store, clock: Clock
) -> None:
    async def paused_meanwhile() -> bool:
        clock.now_s += 2 * LEASE_S
        raise StoreUnavailable("down")

    store.renew = paused_meanwhile
    await lease._renew_once()
    assert not lease.held


async def test_after_a_pause_it_answers_once_it_has_found_out_whose_its_sessions_are(
    lease: Lease, store: Store, clock: Clock
) -> None:
    clock.now_s += 2 * LEASE_S
    waiting = asyncio.create_task(lease.wait_until_held())
    await asyncio.sleep(0)
    assert not waiting.done()
    store.renew = store.had_run_out
    await lease._renew_once()
    await waiting
    assert store.lapses == 1


async def test_a_store_that_hangs_is_waited_for_no_longer_than_the_lease(store: Store) -> None:
    lease = Lease(lambda _: store.renew(), store.lapsed, 0.3)
    await lease.begin()

    async def hang() -> bool:
        await asyncio.Event().wait()
        return True

    store.renew = hang
    for _ in range(5):
        await lease._renew_once()
        assert lease.held

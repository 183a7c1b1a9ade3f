"""Copies of sessions: as values to keep elsewhere, and as sessions under other ids."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from service.errors import NotEnabled, ServingError, StoreUnavailable
from service.sessions.record import SessionKey, SessionRecord, SessionState
from service.sessions.registry import Opening, SessionRegistry
from service.sessions.snapshots import Snapshot, SnapshotKeys, decode, encode
from service.sessions.table import SessionInfo

RETRY_AFTER_S = 2.0


class Copy(NamedTuple):
    """A session that was begun as a copy, and how many of its last steps have no answer yet."""

    info: SessionInfo
    pending: int


class SessionCopies:
    """Exports, imports and forks. A copy has no answers to give: it begins with all of them acknowledged.

    Those that a look-ahead still keeps to come are the copy's, too.
    """

    def __init__(
        self,
        sessions: SessionRegistry,
        keys: SnapshotKeys | None,
        *,
        lifetime_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sessions = sessions
        self._keys = keys
        self._lifetime_s = lifetime_s
        self._clock = clock

    async def export(self, key: SessionKey) -> tuple[Snapshot, bytes]:
        """A session as it is now. Raises NotEnabled and what `SessionRegistry.record` raises."""
        keys = self._require_keys()
        state = _state_of(await self._sessions.record(key))
        return encode(state, keys, now_s=self._clock(), lifetime_s=self._lifetime_s)

    async def import_(self, snapshot: bytes, key: SessionKey, token: bytes) -> Copy:
        """A session with the state of a snapshot. Raises NotEnabled, SnapshotInvalid and what `_begin` raises."""
        state = decode(snapshot, self._require_keys(), now_s=self._clock()).state
        return await self._begin(state, key, token)

    async def fork(self, key: SessionKey, new_key: SessionKey, token: bytes) -> Copy:
        """A session with the state of another one. Raises what `SessionRegistry.record` and `_begin` raise."""
        return await self._begin(_state_of(await self._sessions.record(key)), new_key, token)

    def _require_keys(self) -> SnapshotKeys:
        if self._keys is None:
            raise NotEnabled(
                "this server has no key for snapshots: snapshot_key_file is not set", setting="snapshot_key_file"
            )
        return self._keys

    async def _begin(self, state: SessionState, key: SessionKey, token: bytes) -> Copy:
        """A parked session, durable where sessions are.

        Raises NotEnabled, BundleMismatch, SessionExists, SessionLimit, StoreUnavailable; then there is no such session.
        """
        if not self._sessions.resume_window_s:
            raise NotEnabled("this server parks no sessions: resume_window_s is 0", setting="resume_window_s")
        manifest = self._sessions.served(state)
        opening = Opening(
            key,
            token,
            require_durable=self._sessions.persistent,
            answered_step=state.next_answer,
            version=state.model.version,
            begin_with=state,
        )
        opener = _Opener()
        session, _ = await self._sessions.open(opening, manifest, opener)
        try:
            await self._sessions.write_now(session)
            if self._sessions.persistent and not opener.durable:
                await self._sessions.close(session, opener)
                raise opener.lost or StoreUnavailable(
                    "the session could not be made durable", retry_after_s=RETRY_AFTER_S
                )
        finally:
            self._sessions.leave(session, opener)
        await self._sessions.write_now(session)  # as parked, for other processes
        return Copy(await self._sessions.find(key), state.pending)


class _Opener:
    """Has a new session until it is durable; nobody else knows of it yet."""

    def __init__(self) -> None:
        self.durable = False
        self.lost: ServingError | None = None

    def lose(self, error: ServingError) -> None:
        self.lost = error

    def became_durable(self) -> None:
        self.durable = True


def _state_of(record: SessionRecord) -> SessionState:
    return SessionState(record.model, record.weights_sha256, record.next_step, record.row, record.pending)

"""Sessions of the accumulator that are copied, and what they have come to."""

from __future__ import annotations

from collections.abc import Sequence

from rnnserve import Client, ResumePoint


def parked(client: Client, session: str, values: Sequence[float]) -> ResumePoint:
    """A session of the accumulator that has no stream."""
    stream = client.stream("accumulator", session=session)
    stream.open()
    for value in values:
        stream.step([value])
    stream.park()
    return stream.resume_point


def sums_after(client: Client, point: ResumePoint) -> tuple[float, ...]:
    """What an accumulator's session has come to: its answer to one more step of 0."""
    with client.stream("accumulator", resume=point) as stream:
        answer = stream.step([0.0])
        assert (answer.step, stream.missed) == (point.answered_step, [])
        return tuple(answer.output.tolist())


def session_ids(client: Client) -> set[str]:
    return {info.id for info in client.sessions()}

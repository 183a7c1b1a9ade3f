"""MultiplexSteps without our client: messages are made here and go through the generated stubs."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from numpy.typing import ArrayLike

from rnnserve.v1 import real_time_service_pb2 as live_pb
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from tests.support.wire import TIMEOUT_S, Floats, Refusal, array, tensor

Request = live_pb.MultiplexStepsRequest
Response = live_pb.MultiplexStepsResponse


def open_handle(
    handle: int,
    model: str,
    session_id: str,
    *,
    token: bytes = b"",
    answered_step: int = 0,
    options: OutputOptions | None = None,
    **opening: Any,
) -> Request:
    wanted = live_pb.OpenSession(
        model=model, session_id=session_id, resume_token=token, options=options or OutputOptions(), **opening
    )
    return Request(open=live_pb.OpenHandle(handle=handle, open=wanted, answered_step=answered_step))


def step_each(firsts: dict[int, int], values: ArrayLike | str, answered: Sequence[int] = ()) -> Request:
    """A step of each handle, with its index."""
    batch = live_pb.StepBatch(handles=firsts.keys(), first_steps=firsts.values(), answered_steps=answered)
    if isinstance(values, str):
        batch.text.steps.extend(values)
    else:
        batch.tensor.CopyFrom(tensor(values))
    return Request(steps=batch)


def reset_handle(handle: int, first_step: int | None) -> Request:
    return Request(reset=live_pb.ResetHandle(handle=handle, reset=live_pb.ResetSession(first_step=first_step)))


def close_handle(handle: int, first_step: int | None = None, answered_step: int = 0) -> Request:
    close = live_pb.CloseSession(first_step=first_step)
    return Request(close=live_pb.CloseHandle(handle=handle, close=close, answered_step=answered_step))


class MultiplexedCall:
    """One MultiplexSteps call, message by message."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        requests: Iterator[Request] = iter(self._requests.get, None)
        self.call: Any = RealTimeServiceStub(channel).MultiplexSteps(requests, timeout=TIMEOUT_S)
        self.durable_steps: dict[int, int] = {}

    def send(self, *requests: Request) -> None:
        for request in requests:
            self._requests.put(request)

    def half_close(self) -> None:
        self._requests.put(None)

    def read(self) -> Response:
        """The next response; what is only about durability is noted."""
        while True:
            response: Response = next(self.call)
            self._note_durable(response)
            if response.WhichOneof("response") != "durable":
                return response

    def _note_durable(self, response: Response) -> None:
        for told in (response.durable, response.answer):
            self.durable_steps |= dict(zip(told.handles, told.durable_steps, strict=True))

    def wait_until_durable(self, steps: dict[int, int]) -> None:
        """Of each handle every step before that one."""
        while any(self.durable_steps.get(handle, 0) < step for handle, step in steps.items()):
            response: Response = next(self.call)
            assert response.WhichOneof("response") == "durable", response
            self._note_durable(response)

    def ask(self, request: Request) -> Response:
        self.send(request)
        return self.read()

    def open(self, handle: int, model: str, session_id: str, **opening: Any) -> live_pb.HandleOpened:
        response = self.ask(open_handle(handle, model, session_id, **opening))
        assert response.WhichOneof("response") == "opened", response
        assert response.opened.handle == handle
        return response.opened

    def answers(self, steps: int) -> dict[tuple[int, int], Floats]:
        """Outputs by handle and step, of so many steps, in whatever messages they come."""
        found: dict[tuple[int, int], Floats] = {}
        while len(found) < steps:
            response = self.read()
            assert response.WhichOneof("response") == "answer", response
            answer = response.answer
            pairs = list(zip(answer.handles, answer.first_steps, strict=True))
            assert not found.keys() & set(pairs)
            found |= dict(zip(pairs, array(answer.prediction.outputs), strict=True))
        return found

    def step(self, firsts: dict[int, int], values: ArrayLike | str, **more: Any) -> dict[int, Floats]:
        """The outputs about a step of each, by handle; all must be applied."""
        self.send(step_each(firsts, values, **more))
        answers = self.answers(len(firsts))
        assert answers.keys() == set(firsts.items())
        return {handle: output for (handle, _), output in answers.items()}

    def refused(self) -> tuple[dict[int, int], Refusal]:
        """The next response is a refusal: which steps of which handles, and why."""
        response = self.read()
        assert response.WhichOneof("response") == "refused", response
        refused = response.refused
        assert len(refused.next_steps) == len(refused.handles)
        return dict(zip(refused.handles, refused.first_steps, strict=True)), Refusal(refused.error)

    def ended(self) -> tuple[list[int], Refusal]:
        """The next response is the end of some handles."""
        response = self.read()
        assert response.WhichOneof("response") == "ended", response
        return list(response.ended.handles), Refusal(response.ended.error)

    def rest(self) -> list[Response]:
        """What still comes, until the call ends with OK."""
        return list(self.call)


@contextmanager
def multiplexed(channel: grpc.Channel) -> Iterator[MultiplexedCall]:
    """The call is ended behind it."""
    call = MultiplexedCall(channel)
    try:
        yield call
    finally:
        call.half_close()
        call.call.cancel()

"""The contract without our client: messages are made here and go through the generated stubs."""

from __future__ import annotations

import queue
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from numpy.typing import ArrayLike, NDArray
from prometheus_client.parser import text_string_to_metric_families

from rnnserve.v1 import real_time_service_pb2 as live_pb
from rnnserve.v1 import sequence_service_pb2 as whole_pb
from rnnserve.v1.prediction_pb2 import OutputOptions
from rnnserve.v1.real_time_service_pb2_grpc import RealTimeServiceStub
from rnnserve.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

Floats = NDArray[np.float32]
Request = live_pb.StreamStepsRequest
Response = live_pb.StreamStepsResponse
TIMEOUT_S = 30.0


def tensor(values: ArrayLike) -> Tensor:
    array = np.asarray(values, "<f4")
    return Tensor(data_type=DATA_TYPE_FLOAT32, shape=array.shape, data=array.tobytes())


def array(message: Tensor) -> Floats:
    assert message.data_type == DATA_TYPE_FLOAT32
    return np.frombuffer(message.data, "<f4").reshape(tuple(message.shape))


def random_steps(count: int, seed: int = 0, width: int = 3) -> Floats:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def open_(model: str, session_id: str, *, version: int = 0, token: bytes = b"", **options: Any) -> Request:
    opening = live_pb.OpenSession(model=model, version=version, session_id=session_id, resume_token=token)
    opening.options.CopyFrom(OutputOptions(**options))
    return Request(open=opening)


def resume(opening: Request, answered_step: int = 0) -> Request:
    """The same session again, from the step on whose answer is missing."""
    again = Request(open=opening.open, answered_step=answered_step)
    again.open.resume = True
    return again


def steps(first_step: int | None, values: ArrayLike | str) -> Request:
    if isinstance(values, str):
        return Request(steps=live_pb.Steps(first_step=first_step, text=values))
    return Request(steps=live_pb.Steps(first_step=first_step, tensor=tensor(values)))


def reset(first_step: int | None) -> Request:
    return Request(reset=live_pb.ResetSession(first_step=first_step))


def close() -> Request:
    return Request(close=live_pb.CloseSession())


def sequence(values: ArrayLike | str) -> whole_pb.Sequence:
    return whole_pb.Sequence(text=values) if isinstance(values, str) else whole_pb.Sequence(tensor=tensor(values))


def predict(model: str, sequences: Sequence[Any], *, version: int = 0, **options: Any) -> whole_pb.PredictRequest:
    return whole_pb.PredictRequest(
        model=model, version=version, sequences=map(sequence, sequences), options=OutputOptions(**options)
    )


class LiveStream:
    """One StreamSteps call, message by message. It counts its steps."""

    opened: live_pb.SessionOpened

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        requests: Iterator[Request] = iter(self._requests.get, None)
        self.call: Any = RealTimeServiceStub(channel).StreamSteps(requests, timeout=TIMEOUT_S)
        self.next_step = 0
        self.durable_step = 0

    def send(self, *requests: Request) -> None:
        for request in requests:
            self._requests.put(request)

    def half_close(self) -> None:
        self._requests.put(None)

    def read(self) -> Response:
        """The next response that is about a message or a notice; checkpoints are only noted."""
        while True:
            response: Response = next(self.call)
            self.durable_step = max(self.durable_step, response.durable_step)
            if response.WhichOneof("response") != "checkpoint":
                return response

    def wait_until_durable(self, step: int) -> None:
        """Read checkpoints until every step before that one is durable."""
        while self.durable_step < step:
            response: Response = next(self.call)
            assert response.WhichOneof("response") == "checkpoint", response
            self.durable_step = response.durable_step

    def ask(self, request: Request) -> Response:
        self.send(request)
        return self.read()

    def step(self, values: ArrayLike | str) -> Floats:
        """The outputs about these steps, which must all be applied."""
        response = self.ask(steps(self.next_step, values))
        assert response.WhichOneof("response") == "answer", response
        assert response.answer.first_step == self.next_step
        outputs = array(response.answer.prediction.outputs)
        self.next_step += len(outputs)
        assert response.answer.next_step == self.next_step
        return outputs

    def rest(self) -> list[Response]:
        """What still comes, until the call ends with OK."""
        return list(self.call)


@contextmanager
def live_stream(channel: grpc.Channel, opening: Request | None = None) -> Iterator[LiveStream]:
    """Opened by that message if there is one; the call is ended behind it."""
    stream = LiveStream(channel)
    try:
        if opening is not None:
            response = stream.ask(opening)
            assert response.WhichOneof("response") == "opened", response
            stream.opened = response.opened
            stream.next_step = response.opened.next_step
        yield stream
    finally:
        stream.half_close()
        stream.call.cancel()


class Refusal:
    """A status, taken apart; it must have exactly one ErrorInfo, of our domain."""

    def __init__(self, status: status_pb2.Status) -> None:
        details = {detail.type_url.rpartition(".")[2]: detail for detail in status.details}
        assert len(details) == len(status.details)
        info = error_details_pb2.ErrorInfo()
        assert details["ErrorInfo"].Unpack(info)
        assert info.domain == "rnnserve"
        self.code = status.code
        self.message = status.message
        self.reason = info.reason
        self.metadata = dict(info.metadata)
        self.field = self._field(details)
        self.retry_after_s = self._retry_after_s(details)
        self.violation = error_details_pb2.PreconditionFailure()
        self.precondition = "PreconditionFailure" in details and details["PreconditionFailure"].Unpack(self.violation)

    @staticmethod
    def _field(details: dict[str, Any]) -> str | None:
        bad = error_details_pb2.BadRequest()
        if "BadRequest" not in details or not details["BadRequest"].Unpack(bad):
            return None
        (violation,) = bad.field_violations
        return str(violation.field)

    @staticmethod
    def _retry_after_s(details: dict[str, Any]) -> float | None:
        retry = error_details_pb2.RetryInfo()
        if "RetryInfo" not in details or not details["RetryInfo"].Unpack(retry):
            return None
        return float(retry.retry_delay.ToTimedelta().total_seconds())


def refusal_of(error: grpc.RpcError) -> Refusal:
    """Why a call ended."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, error
    return Refusal(status)


SampleValues = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""By name and labels."""


def sample_values(url: str) -> SampleValues:
    """What stands on the metrics page."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as page:
        text = page.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def metric(url: str, name: str, **labels: str) -> float:
    """Of all samples with these labels together; 0 if it was never counted."""
    return total_of(sample_values(url), name, **labels)


def total_of(values: SampleValues, name: str, **labels: str) -> float:
    """Likewise, of a page that was read."""
    return sum(value for (found, of), value in values.items() if found == name and labels.items() <= of)


def eventually(condition: Callable[[], bool]) -> None:
    """For what another process shows only when asked."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.02)

"""The unary calls, as programs without I/O.

A program is a generator: it yields a Call or a Pause, is sent the response (or thrown the error), and returns its
result. `client.py` runs them blocking, `async_client.py` on an event loop.
"""

import secrets
import time
import uuid
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from rnnserve.errors import MessageTooLarge, ModelNotFound, RnnserveError, TooManySteps, TryAgain
from rnnserve.models import Model, Sample, model_from, samples_from
from rnnserve.requests import checked_version, predict_request
from rnnserve.results import Prediction, ResumePoint, prediction_from
from rnnserve.retry import RetryPolicy
from rnnserve.sessions import SessionInfo, session_from
from rnnserve.snapshots import Snapshot, snapshot_from
from rnnserve.stubs import HealthCheckRequest, Stubs, health_status_name
from rnnserve.tensors import Input
from rnnserve.v1 import model_service_pb2, prediction_pb2, session_service_pb2

_Q = TypeVar("_Q", bound=Message)
_A = TypeVar("_A")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Call:
    """Make this call; the program is sent its response."""

    method: Callable[[Stubs], Any]
    request: Message
    timeout_s: float


@dataclass(frozen=True)
class Pause:
    """Wait; the program is sent None."""

    duration_s: float


Program = Generator[Call | Pause, Any, _T]


@dataclass(frozen=True)
class Calls:
    """The programs of one client. Each may take `timeout_s` for each of its calls, retries and pauses included."""

    timeout_s: float
    retry: RetryPolicy

    def models(self) -> Program[list[Model]]:
        """All models, page by page."""
        found: list[Model] = []
        page_token = ""
        while True:
            request = model_service_pb2.ListModelsRequest(page_token=page_token)
            page = yield from self._call(lambda stubs: stubs.models.ListModels, request)
            found += map(model_from, page.models)
            page_token = page.next_page_token
            if not page_token:
                return found

    def model(self, name: str, version: int) -> Program[Model]:
        """One model."""
        request = model_service_pb2.GetModelRequest(model=name, version=checked_version(version))
        response = yield from self._call(lambda stubs: stubs.models.GetModel, request)
        return model_from(response.model)

    def samples(self, name: str, version: int) -> Program[list[Sample]]:
        """The samples of a model."""
        request = model_service_pb2.ListSamplesRequest(model=name, version=checked_version(version))
        response = yield from self._call(lambda stubs: stubs.models.ListSamples, request)
        return samples_from(response.samples)

    def load_model(self, name: str, version: int) -> Program[Model]:
        """Tried again, for it changes nothing then."""
        request = model_service_pb2.LoadModelRequest(model=name, version=checked_version(version))
        response = yield from self._call(lambda stubs: stubs.models.LoadModel, request)
        return model_from(response.model)

    def unload_model(self, name: str, version: int, *, end_streams: bool) -> Program[int]:
        """Not tried again: version 0 would be another one then."""
        request = model_service_pb2.UnloadModelRequest(
            model=name, version=checked_version(version), end_streams=end_streams
        )
        response = yield Call(lambda stubs: stubs.models.UnloadModel, request, self.timeout_s)
        unloaded: int = response.version
        return unloaded

    def sessions(self) -> Program[list[SessionInfo]]:
        """All sessions, page by page."""
        found: list[SessionInfo] = []
        page_token = ""
        while True:
            request = session_service_pb2.ListSessionsRequest(page_token=page_token)
            page = yield from self._call(lambda stubs: stubs.sessions.ListSessions, request)
            found += map(session_from, page.sessions)
            page_token = page.next_page_token
            if not page_token:
                return found

    def session(self, session_id: str) -> Program[SessionInfo]:
        """One session."""
        request = session_service_pb2.GetSessionRequest(session_id=session_id)
        response = yield from self._call(lambda stubs: stubs.sessions.GetSession, request)
        return session_from(response.session)

    def delete_session(self, session_id: str) -> Program[None]:
        """Not tried again: a second try could not tell that the first one succeeded."""
        request = session_service_pb2.DeleteSessionRequest(session_id=session_id)
        yield Call(lambda stubs: stubs.sessions.DeleteSession, request, self.timeout_s)

    def export_session(self, session_id: str) -> Program[Snapshot]:
        """A copy as a value."""
        request = session_service_pb2.ExportSessionRequest(session_id=session_id)
        response = yield from self._call(lambda stubs: stubs.sessions.ExportSession, request)
        return snapshot_from(response.snapshot)

    def import_session(self, data: bytes, session_id: str | None) -> Program[ResumePoint]:
        """Not tried again: a second try could not tell that the first one succeeded."""
        point = _new_point(session_id)
        request = session_service_pb2.ImportSessionRequest(
            snapshot=data, session_id=point.session, resume_token=bytes.fromhex(point.token)
        )
        response = yield Call(lambda stubs: stubs.sessions.ImportSession, request, self.timeout_s)
        return _begun(point, response)

    def fork_session(self, session_id: str, new_session_id: str | None) -> Program[ResumePoint]:
        """Not tried again, likewise."""
        point = _new_point(new_session_id)
        request = session_service_pb2.ForkSessionRequest(
            session_id=session_id, new_session_id=point.session, new_resume_token=bytes.fromhex(point.token)
        )
        response = yield Call(lambda stubs: stubs.sessions.ForkSession, request, self.timeout_s)
        return _begun(point, response)

    def predict(
        self, model: str, version: int, inputs: Iterable[Input], options: prediction_pb2.OutputOptions
    ) -> Program[list[Prediction]]:
        """One prediction for each sequence."""
        request = predict_request(model, version, inputs, options)
        try:
            response = yield from self._call(lambda stubs: stubs.sequences.Predict, request)
        except (TooManySteps, MessageTooLarge) as error:
            error.message += "; `predict_many` sends longer ones in parts, to models that take parts"
            error.args = (error.message,)
            raise
        return [prediction_from(prediction) for prediction in response.predictions]

    def health(self, model: str | None) -> Program[str]:
        """The state of the server or of one model, in lower case."""
        request = HealthCheckRequest(service=f"models/{model}" if model else "")
        try:
            response = yield from self._call(lambda stubs: stubs.health_check, request)
        except RnnserveError as error:
            if model and error.code == "NOT_FOUND":
                message = f"the server has no model {model!r}"
                raise ModelNotFound(message, reason="MODEL_NOT_FOUND", code=error.code) from error
            raise
        return health_status_name(response)

    def _call(self, method: "Callable[[Stubs], grpc.UnaryUnaryMultiCallable[_Q, _A]]", request: _Q) -> Program[_A]:
        """One call, tried again where that is safe and may help."""
        deadline = time.monotonic() + self.timeout_s
        backoffs_s = self.retry.backoffs_s()
        while True:
            left_s = deadline - time.monotonic()
            try:
                return cast(_A, (yield Call(method, request, left_s)))
            except TryAgain as error:
                backoff_s = next(backoffs_s, None)
                if backoff_s is None:
                    raise
                pause_s = backoff_s + (error.retry_after_s or 0.0)
                if time.monotonic() + pause_s >= deadline:
                    raise
            yield Pause(pause_s)


def _new_point(session_id: str | None) -> ResumePoint:
    return ResumePoint(uuid.uuid4().hex if session_id is None else session_id, secrets.token_hex(16), answered_step=0)


def _begun(
    point: ResumePoint, copy: session_service_pb2.ImportSessionResponse | session_service_pb2.ForkSessionResponse
) -> ResumePoint:
    """A copy owes no answer, but those that a look-ahead keeps to come are still to be given."""
    return point._replace(answered_step=copy.session.next_step - copy.pending_answers)

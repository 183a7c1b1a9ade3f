"""The blocking client."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from time import sleep
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import grpc

from rnnserve.bulk import Bulk, ErrorHandling, OnProgress, open_bulk
from rnnserve.calls import Call, Calls, Program
from rnnserve.channel import TLS, call_metadata, channel_options, checked_connections, credentials
from rnnserve.duplex import Duplex
from rnnserve.errors import RnnserveError
from rnnserve.generation import GeneratedSymbol, Generation, Output, generate_request
from rnnserve.models import Model, Sample
from rnnserve.multiplex import Multiplex
from rnnserve.multiplexed import Multiplexed
from rnnserve.replay import REPLAY_BUFFER_BYTES, Replay, WhenReplayFull
from rnnserve.requests import Decoding, StepSelection, output_options
from rnnserve.results import Notice, Prediction, ResumePoint
from rnnserve.retry import RetryPolicy
from rnnserve.session import RESUME_TIMEOUT_S, Session
from rnnserve.sessions import SessionInfo
from rnnserve.snapshots import Snapshot
from rnnserve.statuses import error_from_call
from rnnserve.stream import Stream
from rnnserve.stubs import Stubs
from rnnserve.tensors import Input
from rnnserve.tracing import trace_context
from rnnserve.v1.real_time_service_pb2 import (
    GenerateRequest,
    GenerateResponse,
    MultiplexStepsRequest,
    StreamStepsRequest,
)
from rnnserve.v1.sequence_service_pb2 import PredictStreamRequest, PredictStreamResponse

_T = TypeVar("_T")


class Client:
    """Talks to a server. Safe to share between threads; a stream of it belongs to one thread at a time.

    Args:
        target: "host:port", or any other target that gRPC knows.
        tls: None = plaintext; True = the usual certificate authorities; else a file of CA certificates, or its bytes.
        token: sent as `authorization: Bearer`, and only over TLS or to this machine itself.
        timeout_s: how long a call may take, retries included, and how long a stream waits for an answer; where there
            are several `connections`, the first open of a stream waits so long on each that it tries.
        retry: when calls that change nothing are tried again, and the first open of a stream.
        resume_timeout_s: how long a stream tries to resume before it raises; 0 = never.
        connections: how many there are for streams, which use them in turn, also where they try again or resume. A
            server of several workers serves each connection by one of them.

    Raises:
        ValueError: the target names no host, or a token was to be sent in plaintext to another machine.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        tls: TLS = None,
        token: str | None = None,
        timeout_s: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),
        resume_timeout_s: float = RESUME_TIMEOUT_S,
        connections: int = 1,
    ) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._resume_timeout_s = resume_timeout_s
        self._own_metadata = call_metadata(target, tls, token)
        self._retry = retry
        self._calls = Calls(timeout_s, retry)
        self._channels = [_channel(target, tls) for _ in range(checked_connections(connections))]
        self._stubs = Stubs(self._channels[0])
        self._in_turn = itertools.cycle([self._stubs, *map(Stubs, self._channels[1:])])

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return self._own_metadata + trace_context()

    def models(self) -> list[Model]:
        """All models, by name and version."""
        return self._run(self._calls.models())

    def model(self, name: str, version: int = 0) -> Model:
        """One model; version 0 = the newest. Raises ModelNotFound."""
        return self._run(self._calls.model(name, version))

    def samples(self, name: str, version: int = 0) -> list[Sample]:
        """The held-out recordings that ship with a model; may be empty. Raises ModelNotFound."""
        return self._run(self._calls.samples(name, version))

    def load_model(self, name: str, version: int = 0) -> Model:
        """Has the server serve a model of its repository; 0 = the newest there. One that is served already stays so.

        Raises ModelNotFound, BundleInvalid.
        """
        return self._run(self._calls.load_model(name, version))

    def unload_model(self, name: str, version: int = 0, *, end_streams: bool = False) -> int:
        """Has the server serve a version of a model no more, and returns it; 0 = the newest that is served.

        Its parked sessions can be resumed once it is served again. Raises ModelNotFound, and ModelInUse if it has live
        streams: `end_streams` ends them, with ModelNotFound, and parks their sessions.
        """
        return self._run(self._calls.unload_model(name, version, end_streams=end_streams))

    def sessions(self) -> list[SessionInfo]:
        """All sessions of the server, live and parked, by id."""
        return self._run(self._calls.sessions())

    def session(self, session_id: str) -> SessionInfo:
        """One session. Raises SessionNotFound."""
        return self._run(self._calls.session(session_id))

    def delete_session(self, session_id: str) -> None:
        """Ends a session and erases it everywhere before it returns. Raises SessionNotFound."""
        self._run(self._calls.delete_session(session_id))

    def export_session(self, session_id: str) -> Snapshot:
        """A copy of a session, live or parked, between two of its steps; the session goes on untouched.

        Save its `data`. Raises SessionNotFound, and NotEnabled where the server has no key to sign with.
        """
        return self._run(self._calls.export_session(session_id))

    def import_session(self, data: bytes, session: str | None = None) -> ResumePoint:
        """Begins a session with the state of a snapshot, on any server with the same model and key.

        `stream(model, resume=point)` goes on with it. `session` is its id; None = a random one. Raises SnapshotInvalid,
        BundleMismatch, SessionExists, NotEnabled; then the server is as it was.
        """
        return self._run(self._calls.import_session(data, session))

    def fork_session(self, session_id: str, session: str | None = None) -> ResumePoint:
        """Begins a session with the state of another one, live or parked, which goes on untouched.

        `stream(model, resume=point)` goes on with the copy. `session` is its id; None = a random one. Raises
        SessionNotFound, SessionExists.
        """
        return self._run(self._calls.fork_session(session_id, session))

    def health(self, model: str | None = None) -> str:
        """ "serving" or "not_serving": the whole server, or one model. Raises ModelNotFound."""
        return self._run(self._calls.health(model))

    def stream(
        self,
        model: str,
        *,
        version: int = 0,
        session: str | None = None,
        steps: StepSelection = "all",
        probabilities: bool = False,
        top_k: int = 0,
        threshold: float = 0.0,
        resume: ResumePoint | None = None,
        durable: bool = False,
        replay_buffer_bytes: int = REPLAY_BUFFER_BYTES,
        when_replay_full: WhenReplayFull = "wait",
        on_notice: Callable[[Notice], object] | None = None,
    ) -> Stream:
        """A real-time stream, to be used in a `with` block, which begins and ends its session.

        Args:
            model: the name of a streamable model.
            version: 0 = the newest.
            session: the session id; None = a random one.
            steps: "all" = an answer about each step; "last" = only about the last step of each message.
            probabilities: whether the answers carry the probability of each label.
            top_k: how many of the most probable labels they carry.
            threshold: labels that are less probable than this, from 0 to 1, are left out; where that is the most
                probable one, there is None in its place.
            resume: the `resume_point` of an earlier stream, whose session this one goes on with. After opening,
                `missed` has the answers since then, and `next_step` says which step comes next. Raises
                SessionNotFound, Evicted or ResumePointLost.
            durable: raises StoreUnavailable unless the session will survive a crash of the server.
            replay_buffer_bytes: how many bytes of steps are kept to send them again after a crash of the server.
            when_replay_full: "wait" = for the server to make them durable; "drop" = the oldest answered ones, after
                which a crash may end the stream with ResumePointLost.
            on_notice: called with each notice as soon as the stream learns of it: what the server announces, and
                "interrupted" and "resumed" where the stream loses its server and has it again. It is called in the
                thread that uses the stream, within `step`, `steps` and the like, which wait for it; it must not use
                the stream itself. What it raises is logged and ignored.
        """
        opened = Session(
            model,
            version,
            session,
            output_options(steps, probabilities, top_k, threshold),
            resume=resume,
            durable=durable,
            replay=Replay(replay_buffer_bytes, when_replay_full),
            resume_timeout_s=self._resume_timeout_s,
            open_attempts=self._retry.attempts,
            other_connections=len(self._channels) > 1,
            on_notice=on_notice,
        )

        def start(requests: Iterator[StreamStepsRequest]) -> Any:
            """On the next connection: where the last one leads to a server that is stuck, another one may not."""
            return next(self._in_turn).real_time.StreamSteps(requests, metadata=self._metadata + opened.metadata)

        return Stream(opened, start, self._target, self._timeout_s)

    def multiplex(
        self,
        model: str,
        *,
        version: int = 0,
        probabilities: bool = False,
        top_k: int = 0,
        threshold: float = 0.0,
        durable: bool = False,
        replay_buffer_bytes: int = REPLAY_BUFFER_BYTES,
        when_replay_full: WhenReplayFull = "wait",
        on_notice: Callable[[Notice], object] | None = None,
    ) -> Multiplex:
        """Many real-time sessions on one call, for gateways and fleets, to be used in a `with` block, which ends them.

        A message with a step of each of many sessions costs about as much as one with a step of a single session.

        Args as for `stream`, for all sessions of the call, and:
            replay_buffer_bytes: how many bytes of steps are kept of all sessions together.
            on_notice: as for `stream`; a notice about a single session names it in `.session`.
        """
        sessions = Multiplexed(
            model,
            version,
            output_options("all", probabilities, top_k, threshold),
            durable=durable,
            replay_buffer_bytes=replay_buffer_bytes,
            when_replay_full=when_replay_full,
            resume_timeout_s=self._resume_timeout_s,
            open_attempts=self._retry.attempts,
            other_connections=len(self._channels) > 1,
            on_notice=on_notice,
        )

        def start(requests: Iterator[MultiplexStepsRequest]) -> Any:
            """On the next connection, as a stream."""
            return next(self._in_turn).real_time.MultiplexSteps(requests, metadata=self._metadata)

        return Multiplex(sessions, start, self._target, self._timeout_s)

    def generate(
        self,
        model: str,
        prompt: str = "",
        *,
        version: int = 0,
        max_symbols: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        alternatives: int = 0,
        deterministic: bool = False,
    ) -> Generation:
        """Writes with a one-to-many model, such as music: an iterator over the symbols, as they are drawn.

        Args:
            model: the name of a one-to-many model.
            prompt: what it reads behind its start symbol, as the model reads texts; no part of the output.
            version: 0 = the newest.
            max_symbols: how many symbols the output has at most; 0 = as many as the model may write.
            temperature: 0 to 10: 0 = the most probable symbol each time, 1 = as the model says, more = more at random.
            top_k: draw only from so many of the most probable symbols; 0 = from all.
            top_p: draw only from the fewest symbols that together are as probable as this; 1 = from all.
            seed: of the random numbers, 0 to 2**64 - 1; None = the server picks one, see `.seed`.
            stop: texts; the output is over once it ends with one of these, which is part of it.
            alternatives: how many of the symbols that were most probable each answer has in `.top`.
            deterministic: the same seed gives the same output whatever else the server computes, which costs it more.

        Raises, with the first symbol:
            ModelNotFound, ModelNotGenerative; InvalidArgument: `.field` says which; QueueFull: as many outputs are
            written as may be, for longer than `timeout_s` and `retry` let the client wait.
        """
        request = generate_request(
            model,
            version=version,
            prompt=prompt,
            max_symbols=max_symbols,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            alternatives=alternatives,
            deterministic=deterministic,
        )
        output = Output(self._retry, self._timeout_s)
        return Generation(output, self._run_generation(request, output))

    def predict(
        self,
        model: str,
        inputs: Iterable[Input],
        *,
        version: int = 0,
        steps: StepSelection | None = None,
        probabilities: bool = False,
        top_k: int = 0,
        threshold: float = 0.0,
        decoding: Decoding | None = None,
    ) -> list[Prediction]:
        """A prediction for each of a few whole sequences, in one message; for many use `predict_many`.

        Args:
            model: the name of a model.
            inputs: arrays of (steps, features), which may differ in length, or texts.
            version: 0 = the newest.
            steps: about which steps; None = the last one for a many-to-one model, all of them otherwise.
            probabilities: whether the predictions carry the probability of each label.
            top_k: how many of the most probable labels they carry.
            threshold: labels that are less probable than this, from 0 to 1, are left out; where that is the most
                probable one, there is None in its place.
            decoding: how an encoder-decoder searches for its output; None = greedily. Not for other models.

        Raises:
            InvalidArgument: one of the sequences is bad, which refuses them all; `.field` says which.
            TooManySteps, MessageTooLarge: they do not fit into one message.
        """
        options = output_options(steps, probabilities, top_k, threshold, decoding)
        return self._run(self._calls.predict(model, version, inputs, options))

    @overload
    def predict_many(
        self,
        model: str,
        inputs: Iterable[Input],
        *,
        version: int = ...,
        steps: StepSelection | None = ...,
        probabilities: bool = ...,
        top_k: int = ...,
        threshold: float = ...,
        decoding: Decoding | None = ...,
        errors: Literal["raise"] = ...,
        ahead: int = ...,
        on_progress: OnProgress | None = ...,
    ) -> Iterator[Prediction]: ...

    @overload
    def predict_many(
        self,
        model: str,
        inputs: Iterable[Input],
        *,
        version: int = ...,
        steps: StepSelection | None = ...,
        probabilities: bool = ...,
        top_k: int = ...,
        threshold: float = ...,
        decoding: Decoding | None = ...,
        errors: Literal["return"],
        ahead: int = ...,
        on_progress: OnProgress | None = ...,
    ) -> Iterator[Prediction | RnnserveError]: ...

    def predict_many(
        self,
        model: str,
        inputs: Iterable[Input],
        *,
        version: int = 0,
        steps: StepSelection | None = None,
        probabilities: bool = False,
        top_k: int = 0,
        threshold: float = 0.0,
        decoding: Decoding | None = None,
        errors: ErrorHandling = "raise",
        ahead: int = 64,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Prediction | RnnserveError]:
        """A prediction for each of any number of whole sequences, in their order, as they become ready.

        One that is too long for a message is sent in parts, each of which is read when it is sent: such an array may be
        `np.load(file, mmap_mode="r")`, and is not to be changed meanwhile. The server computes few of these at a time.

        Args as for `predict`, and:
            inputs: read in a thread of its own, only as far as `ahead` allows.
            errors: "raise" = a sequence that is refused raises when its turn comes, with its index in `.index`;
                "return" = it yields that exception in the place of a prediction, and the others go on.
            ahead: how many sequences are under way at most, which bounds the memory.
            on_progress: called with the index of a sequence in parts and the share of it that is computed, from 0 to 1,
                a few times a second.
        """
        bulk = Bulk(errors, on_progress)
        opening = open_bulk(model, version, output_options(steps, probabilities, top_k, threshold, decoding))
        return self._run_bulk(opening, bulk, inputs, ahead)

    def close(self) -> None:
        """Ends the connection and whatever still uses it."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, program: Program[_T]) -> _T:
        """Does what a program asks for until it returns."""
        advance: Any = partial(next, program)
        while True:
            try:
                action = advance()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            try:
                advance = partial(program.send, self._do(action))
            except RnnserveError as error:
                advance = partial(program.throw, error)

    def _do(self, action: Any) -> Any:
        if not isinstance(action, Call):
            return sleep(action.duration_s)
        method = action.method(self._stubs)
        try:
            return method(action.request, timeout=action.timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from_call(error, self._target) from None

    def _run_bulk(
        self, opening: PredictStreamRequest, bulk: Bulk, inputs: Iterable[Input], ahead: int
    ) -> Iterator[Prediction | RnnserveError]:
        start = partial(self._stubs.sequences.PredictStream, metadata=self._metadata)
        duplex: Duplex[Input, PredictStreamRequest, PredictStreamResponse]
        duplex = Duplex(start, self._target, self._timeout_s)
        try:
            duplex.send(opening)
            yield from duplex.drive(bulk, self._noting_unit(inputs, bulk, opening), ahead)
            duplex.finish()
        finally:
            duplex.cancel()

    def _noting_unit(self, inputs: Iterable[Input], bulk: Bulk, opening: PredictStreamRequest) -> Iterator[Input]:
        """The same inputs. Before the first text the server is asked what a step of one is."""
        asked = False
        for x in inputs:
            if isinstance(x, str) and not asked:
                bulk.unit, asked = self.model(opening.open.model, opening.open.version).unit, True
            yield x

    def _run_generation(self, request: GenerateRequest, output: Output) -> Generator[GeneratedSymbol]:
        duplex: Duplex[None, GenerateRequest, GenerateResponse]
        duplex = Duplex(partial(self._start_generation, request), self._target, self._timeout_s)
        try:
            yield from duplex.listen(output)
            duplex.finish()
        finally:
            duplex.cancel()

    def _start_generation(self, request: GenerateRequest, _: Iterator[GenerateRequest]) -> Any:
        """On the next connection, as a stream."""
        return next(self._in_turn).real_time.Generate(request, metadata=self._metadata)


def _channel(target: str, tls: TLS) -> grpc.Channel:
    secure = credentials(tls)
    if secure is None:
        return grpc.insecure_channel(target, channel_options(target))
    return grpc.secure_channel(target, secure, channel_options(target))

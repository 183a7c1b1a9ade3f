"""What is the same for every call: it is counted, timed, tracked by the drain, and its errors become statuses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from typing import Any, Protocol, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from service.api.drain import Drain
from service.api.statuses import status_of
from service.errors import Internal, MessageMalformed, ServingError
from service.tracing import OFF, CallSpan, Tracing

log = logging.getLogger(__name__)

WORK = (
    "rnnserve.v1.RealTimeService/",
    "rnnserve.v1.SequenceService/",
    "rnnserve.v1.SessionService/DeleteSession",
    "rnnserve.v1.SessionService/ImportSession",
    "rnnserve.v1.SessionService/ForkSession",
)
"""How calls begin that a drain waits for and refuses; what there is, and its health, are told until the end."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Method = tuple[str, str, str]
"""Type (unary, bidi_stream, …), service and name, as the metrics label them."""


class CallMetrics(Protocol):
    """Where calls and their messages are counted."""

    def call_started(self, method: Method) -> None: ...
    def call_ended(self, method: Method, code: str, duration_s: float) -> None: ...
    def message_received(self, method: Method) -> None: ...
    def message_sent(self, method: Method) -> None: ...
    def refused(self, reason: str) -> None: ...


class Refusals:
    """Turns errors into statuses and counts them, so that none is silent."""

    def __init__(self, metrics: CallMetrics) -> None:
        self._metrics = metrics

    def status(self, error: ServingError) -> status_pb2.Status:
        """What the client is told."""
        self._metrics.refused(error.reason)
        log.debug("refused", extra={"reason": error.reason, "field": error.field})
        return status_of(error)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Stands in front of every method."""

    def __init__(self, metrics: CallMetrics, refusals: Refusals, drain: Drain, tracing: Tracing = OFF) -> None:
        self._metrics = metrics
        self._refusals = refusals
        self._drain = drain
        self._tracing = tracing

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the method's handler; a method that does not exist has none."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind, behaviour, wrap = _describe(handler)
        _, service, name = handler_call_details.method.split("/")
        call = self._wrap(handler, behaviour, (kind, service, name))
        return wrap(call, None, handler.response_serializer)  # we decode, so that what cannot be decoded is refused

    def _wrap(self, handler: Handler, behaviour: Callable[..., Any], method: Method) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._tracing.call(method, dict(context.invocation_metadata() or ())) as span:
                return await run(request, context, span)

        async def run(request: Any, context: grpc.aio.ServicerContext[Any, Any], span: CallSpan) -> Any:
            start_s = time.perf_counter()
            self._metrics.call_started(method)
            code: int = code_pb2.CANCELLED
            try:
                response = await self._run(behaviour, self._read(request, context, handler, method), context, method)
                code = code_pb2.OK
                return response
            except grpc.aio.AbortError:  # the health service's own
                code = _number(context.code())
                raise
            except (Exception, asyncio.CancelledError) as error:
                refused = self._why_refused(error)
                refusal = self._refusals.status(refused)
                self._tracing.refused(refused.reason)
                code = refusal.code
                await context.abort_with_status(rpc_status.to_status(refusal))
            finally:
                name, duration_s = code_pb2.Code.Name(code), time.perf_counter() - start_s
                self._metrics.call_ended(method, name, duration_s)
                span.set_attribute("rpc.grpc.status_code", code)
                fields = {"method": f"{method[1]}/{method[2]}", "code": name, "duration_s": round(duration_s, 6)}
                log.debug("call ended", extra=fields)

        return call

    def _why_refused(self, error: BaseException) -> ServingError:
        """What ended a call. Raises CancelledError again if the client itself has gone."""
        if isinstance(error, ServingError):
            return error
        if isinstance(error, asyncio.CancelledError):
            if not self._drain.ended:
                raise error
            return self._drain.refusal()
        log.error("unexpected", exc_info=error)
        return Internal("an unexpected error; the server's log has it")

    async def _run(
        self, behaviour: Callable[..., Any], request: Any, context: grpc.aio.ServicerContext[Any, Any], method: Method
    ) -> Any:
        _, service, name = method
        with self._drain.track() if f"{service}/{name}".startswith(WORK) else nullcontext():
            result = behaviour(request, _CountingContext(context, self._metrics, method))
            if not isinstance(result, AsyncIterator):
                response = await result
                if response is not None:
                    self._metrics.message_sent(method)
                return response
            async for message in result:
                await context.write(message)
                self._metrics.message_sent(method)
            return None

    def _read(self, request: Any, context: grpc.aio.ServicerContext[Any, Any], handler: Handler, method: Method) -> Any:
        """The request, or the stream of them, counted and decoded. Raises MessageMalformed."""
        decode = cast("Callable[[bytes], Any]", handler.request_deserializer)
        if handler.request_streaming:
            return self._read_each(context, decode, method)
        self._metrics.message_received(method)
        return _decoded(request, decode)

    async def _read_each(
        self, context: grpc.aio.ServicerContext[Any, Any], decode: Callable[[bytes], Any], method: Method
    ) -> AsyncIterator[Any]:
        while (request := await context.read()) is not grpc.aio.EOF:
            self._metrics.message_received(method)
            yield _decoded(request, decode)


def _decoded(request: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(request)
    except DecodeError:
        raise MessageMalformed("the message cannot be decoded; does the client have the same contract?") from None


class _CountingContext:
    """A context whose messages are counted; writing to a client that has gone cancels."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], metrics: CallMetrics, method: Method) -> None:
        self._context = context
        self._metrics = metrics
        self._method = method

    async def write(self, message: Any) -> None:
        try:
            await self._context.write(message)
        except grpc.aio.InternalError:
            raise _gone() from None
        self._metrics.message_sent(self._method)

    async def send_initial_metadata(self, metadata: Any) -> None:
        try:
            await self._context.send_initial_metadata(metadata)
        except grpc.aio.InternalError:
            raise _gone() from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _gone() -> asyncio.CancelledError:
    return asyncio.CancelledError("the client has gone")


def _number(code: Any) -> int:
    """The context gives a StatusCode or its number."""
    return code if isinstance(code, int) else int(code.value[0])


def _describe(handler: Handler) -> tuple[str, Callable[..., Any], Callable[..., Handler]]:
    """The type of a method, what serves it, and what makes a handler of that type."""
    found: Any
    match (handler.request_streaming, handler.response_streaming):
        case (False, False):
            found = "unary", handler.unary_unary, grpc.unary_unary_rpc_method_handler
        case (False, True):
            found = "server_stream", handler.unary_stream, grpc.unary_stream_rpc_method_handler
        case (True, False):
            found = "client_stream", handler.stream_unary, grpc.stream_unary_rpc_method_handler
        case _:
            found = "bidi_stream", handler.stream_stream, grpc.stream_stream_rpc_method_handler
    return cast("tuple[str, Callable[..., Any], Callable[..., Handler]]", found)

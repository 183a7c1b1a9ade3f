"""Generate: one output, a message for each symbol as it is drawn."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import numpy as np

from models.manifest import Manifest
from rnnserve.v1 import real_time_service_pb2 as pb
from service.api.codec import text_unit, top_labels
from service.api.generation_plans import plan_of
from service.api.generations import GenerationMetrics, Generations
from service.api.limits import Limits
from service.api.live_call import LiveCall
from service.catalog.catalog import Catalog
from service.engine.generation import Drawn, Finish, Plan, Writer
from service.engine.step_engine import StepEngine
from service.errors import Evicted
from service.sessions.record import ANONYMOUS

if TYPE_CHECKING:
    from service.api.live_call import Context

BROKEN_OFF = "broken_off"
"""How the metrics call the end of a generation that did not finish."""
REASONS = {
    Finish.END: pb.FINISH_REASON_END,
    Finish.STOP: pb.FINISH_REASON_STOP,
    Finish.MAX_SYMBOLS: pb.FINISH_REASON_MAX_SYMBOLS,
}


class GenerationCall(LiveCall):
    """One output. A drain lets it go on as long as it can; whoever is cut off may ask for the same again."""

    def __init__(
        self,
        context: Context,
        catalog: Catalog,
        engine: StepEngine,
        generations: Generations,
        limits: Limits,
        metrics: GenerationMetrics,
    ) -> None:
        super().__init__(context)
        self._catalog = catalog
        self._engine = engine
        self._generations = generations
        self._limits = limits
        self._metrics = metrics

    @property
    def busy(self) -> bool:
        return True

    @property
    def resumable(self) -> bool:
        return False

    async def serve(self, request: pb.GenerateRequest) -> None:
        """Until the output is over. Raises ServingError."""
        self._limits.check_size(request.ByteSize())
        manifest = self._catalog.find(request.model, request.version).manifest
        plan = plan_of(request, manifest, max_prompt_symbols=self._limits.max_steps_per_message)
        with self._generations.place(self, manifest.key):
            finish = BROKEN_OFF
            try:
                finish = (await self._write(request, manifest, plan)).value
            finally:
                self._metrics.generation_ended(manifest.key, finish)

    async def announce_drain(self, time_left_s: float) -> None:
        """It is told nothing: there is nothing that its client could do."""

    async def say_lost(self) -> None:
        """The error says all."""

    def leave(self) -> None:
        """Nothing is kept."""

    async def _write(self, request: pb.GenerateRequest, manifest: Manifest, plan: Plan) -> Finish:
        writer = Writer(self._engine, manifest.key, plan, ANONYMOUS)
        started = pb.GenerationStarted(
            model=manifest.name, version=manifest.version, seed=plan.seed, text_unit=text_unit(manifest)
        )
        await self._send(pb.GenerateResponse(started=started))
        async with aclosing(writer.write()) as output:
            async for drawn in output:
                self._metrics.symbol_generated(manifest.key)
                await self._send(_symbol(drawn, manifest.output.labels, request.alternatives))
        await self._send(_finished(writer, request))
        return writer.finish

    async def _send(self, response: pb.GenerateResponse) -> None:
        """Raises Evicted if the client does not read it in time."""
        limit_s = self._limits.idle_timeout_s
        try:
            async with asyncio.timeout(limit_s or None):
                await self._context.write(response)
        except TimeoutError:
            message = f"the client has read nothing for {limit_s:g} s"
            raise Evicted(message, limit="idle_timeout_s", resumable="false") from None


def _symbol(drawn: Drawn, symbols: tuple[str, ...], alternatives: int) -> pb.GenerateResponse:
    said = drawn.log_probabilities
    symbol = pb.GeneratedSymbol(index=drawn.index, text=symbols[drawn.symbol], log_probability=said[drawn.symbol])
    if alternatives:
        symbol.alternatives.CopyFrom(top_labels(np.exp(said), symbols, alternatives))
    return pb.GenerateResponse(symbol=symbol)


def _finished(writer: Writer, request: pb.GenerateRequest) -> pb.GenerateResponse:
    finished = pb.GenerationFinished(
        reason=REASONS[writer.finish],
        symbols=writer.written,
        stop="" if writer.stop is None else request.stop[writer.stop],
        end_log_probability=writer.end_log_probability,
    )
    return pb.GenerateResponse(finished=finished)

"""SequenceService: whole sequences in, predictions out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.manifest import Manifest, ModelKey
from rnnserve.v1.prediction_pb2 import STEP_SELECTION_ALL, OutputOptions
from rnnserve.v1.sequence_service_pb2 import (
    IdentifiedSequence,
    PredictRequest,
    PredictResponse,
    PredictStreamRequest,
    PredictStreamResponse,
    Sequence,
)
from rnnserve.v1.sequence_service_pb2_grpc import SequenceServiceServicer
from service.api import codec
from service.api.calls import Refusals
from service.api.limits import Limits
from service.api.parts import Parts
from service.catalog.catalog import Catalog
from service.engine.sequence_lane import Lane
from service.errors import FieldInvalid, MessageTooLarge, OpenMissing, OpenRepeated, ServingError, within

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

MAX_RESPONSE_BYTES = 64 * 2**20
"""Of Predict, about; what our client takes."""


class SequenceMetrics(Protocol):
    """Where answers are timed."""

    def sequences_answered(self, model: ModelKey, duration_s: float) -> None:
        """A request, or one sequence of a bulk stream, was answered."""
        ...


class SequenceService(SequenceServiceServicer):
    """See the contract."""

    def __init__(
        self, catalog: Catalog, lane: Lane, limits: Limits, refusals: Refusals, metrics: SequenceMetrics
    ) -> None:
        self._catalog = catalog
        self._lane = lane
        self._limits = limits
        self._refusals = refusals
        self._metrics = metrics

    async def Predict(
        self,
        request: PredictRequest,
        context: ServicerContext[PredictRequest, PredictResponse],  # noqa: ARG002
    ) -> PredictResponse:
        """All sequences of the request, or none."""
        self._limits.check_size(request.ByteSize())
        bundle = self._find(request.model, request.version, request.options)
        self._check_count(len(request.sequences))
        inputs = [
            self._decode(sequence, bundle.manifest, path=f"sequences[{i}]")
            for i, sequence in enumerate(request.sequences)
        ]
        start_s = time.perf_counter()
        self._check_answers(bundle.manifest, inputs, request.options)
        answers = await self._compute(bundle, inputs, request.options, wait=False)
        response = PredictResponse(model=bundle.manifest.name, version=bundle.manifest.version)
        for answer in answers:
            codec.encode_answer_into(response.predictions.add(), answer, bundle.manifest, request.options)
        self._metrics.sequences_answered(bundle.manifest.key, time.perf_counter() - start_s)
        return response

    async def PredictStream(  # type: ignore[override]
        self,
        requests: AsyncIterator[PredictStreamRequest],
        context: ServicerContext[PredictStreamRequest, PredictStreamResponse],
    ) -> None:
        """Each sequence by itself; reading pauses while as many as may be are in flight, and while a part is stored."""
        request = await anext(requests, None)
        if request is None or request.WhichOneof("request") != "open":
            raise OpenMissing("the first message of a stream must be `open`", field="open")
        self._limits.check_size(request.ByteSize())
        with within("open"):
            bundle = self._find(request.open.model, request.open.version, request.open.options)
        slots, writing = asyncio.Semaphore(self._limits.max_bulk_sequences), asyncio.Lock()

        async def write(response: PredictStreamResponse) -> None:
            async with writing:
                await context.write(response)

        async def answer(message: PredictStreamRequest) -> None:
            try:
                async for response in self._replies(message, bundle, request.open.options):
                    await write(response)
            finally:
                slots.release()

        def answered(duration_s: float) -> None:
            self._metrics.sequences_answered(bundle.manifest.key, duration_s)

        async with asyncio.TaskGroup() as answers:
            parts = Parts(
                bundle, request.open.options, self._lane, self._limits, self._refusals, answered, answers, write
            )
            with closing(parts):
                while (message := await parts.next(requests)) is not None:
                    if message.WhichOneof("request") == "part":
                        await parts.take(message)
                    else:
                        await slots.acquire()
                        answers.create_task(answer(message))
                await parts.end()

    def _find(self, model: str, version: int, options: OutputOptions) -> Bundle:
        bundle = self._catalog.find(model, version)
        codec.check_options(options, bundle.manifest)
        if options.steps == STEP_SELECTION_ALL and bundle.manifest.network.readout != "each_step":
            raise FieldInvalid(f"model {model!r} answers about the whole sequence only", field="options.steps")
        return bundle

    def _check_count(self, sequences: int) -> None:
        limit = self._limits.max_queued_sequences
        if not 1 <= sequences <= limit:
            raise FieldInvalid(f"there must be 1 to {limit} sequences, not {sequences}", field="sequences", limit=limit)

    def _decode(self, sequence: Sequence, manifest: Manifest, *, path: str) -> NDArray[np.generic]:
        with within(path):
            return codec.decode(sequence, manifest, max_steps=self._limits.max_sequence_steps)

    def _check_answers(self, manifest: Manifest, inputs: list[NDArray[np.generic]], options: OutputOptions) -> None:
        size_bytes = sum(codec.answer_bytes(manifest, options, len(steps)) for steps in inputs)
        if size_bytes > MAX_RESPONSE_BYTES:
            field = "options.decoding.attention" if manifest.network.decoder else "sequences"
            raise MessageTooLarge(
                f"the answer might have {size_bytes} bytes, more than {MAX_RESPONSE_BYTES}",
                field=field,
                limit=MAX_RESPONSE_BYTES,
            )

    async def _replies(
        self, message: PredictStreamRequest, bundle: Bundle, options: OutputOptions
    ) -> AsyncIterator[PredictStreamResponse]:
        item: IdentifiedSequence = message.sequence
        start_s = time.perf_counter()
        try:
            self._limits.check_size(message.ByteSize())
            match message.WhichOneof("request"):
                case "open":
                    raise OpenRepeated("this stream is open already", field="open")
                case None:
                    raise FieldInvalid("the message is empty", field="request")
            inputs = self._decode(item.sequence, bundle.manifest, path="sequence.sequence")
            if bundle.manifest.network.decoder is not None:  # others answer in pieces
                self._check_answers(bundle.manifest, [inputs], options)
            (answer,) = await self._compute(bundle, [inputs], options, wait=True)
        except ServingError as error:
            yield PredictStreamResponse(id=item.id, error=self._refusals.status(error))
            return
        for first_step, piece, more in codec.pieces(answer, bundle.manifest, options):
            response = PredictStreamResponse(id=item.id, first_step=first_step, more=more)
            codec.encode_answer_into(response.prediction, piece, bundle.manifest, options)
            yield response
        self._metrics.sequences_answered(bundle.manifest.key, time.perf_counter() - start_s)

    async def _compute(
        self, bundle: Bundle, inputs: list[NDArray[np.generic]], options: OutputOptions, *, wait: bool
    ) -> Iterable[codec.Answer]:
        """Of each sequence about the steps that are asked for, or its hypotheses."""
        if decoder := bundle.manifest.network.decoder:
            return await self._lane.decode(bundle, inputs, codec.decoding_of(options, decoder), wait=wait)
        results = await self._lane.predict(bundle, inputs, wait=wait)
        if codec.wants_all_steps(options, bundle.manifest):
            return results
        return [outputs[-1:] for outputs in results]

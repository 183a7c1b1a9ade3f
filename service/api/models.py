"""ModelService: what is served, and its changes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from models.bundle import Bundle
from models.manifest import FeatureInput, Manifest, Quality, TextInput
from rnnserve.v1 import model_service_pb2 as pb
from rnnserve.v1.model_service_pb2_grpc import ModelServiceServicer
from service.api.codec import encode_tensor_into, text_unit
from service.catalog.catalog import Catalog
from service.catalog.loading import Change
from service.errors import FieldInvalid

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

MAX_PAGE_SIZE = 100
MAX_LISTED_SYMBOLS = 256  # of a model that is one of many


class ModelService(ModelServiceServicer):
    """See the contract."""

    def __init__(self, catalog: Catalog, change: Callable[[Change], Awaitable[None]]) -> None:
        """`change` makes it in all processes of the service, or raises a ServingError and makes it in none."""
        self._catalog = catalog
        self._change = change

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],  # noqa: ARG002
    ) -> pb.ListModelsResponse:
        """A page token is the number of models before the page."""
        bundles = list(self._catalog)
        token = request.page_token or "0"
        if token not in map(str, range(len(bundles) + 1)):
            raise FieldInvalid("this is no token that an earlier page gave", field="page_token")
        start = int(token)
        end = start + min(request.page_size or MAX_PAGE_SIZE, MAX_PAGE_SIZE)
        models = [describe(bundle, max_symbols=MAX_LISTED_SYMBOLS) for bundle in bundles[start:end]]
        return pb.ListModelsResponse(models=models, next_page_token=str(end) if end < len(bundles) else "")

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: ServicerContext[pb.GetModelRequest, pb.GetModelResponse],  # noqa: ARG002
    ) -> pb.GetModelResponse:
        """Version 0 is the newest."""
        return pb.GetModelResponse(model=describe(self._catalog.find(request.model, request.version)))

    async def ListSamples(
        self,
        request: pb.ListSamplesRequest,
        context: ServicerContext[pb.ListSamplesRequest, pb.ListSamplesResponse],  # noqa: ARG002
    ) -> pb.ListSamplesResponse:
        """As they ship with the bundle."""
        return pb.ListSamplesResponse(samples=_samples(self._catalog.find(request.model, request.version)))

    async def LoadModel(
        self,
        request: pb.LoadModelRequest,
        context: ServicerContext[pb.LoadModelRequest, pb.LoadModelResponse],  # noqa: ARG002
    ) -> pb.LoadModelResponse:
        """Version 0 is the newest on the disk."""
        model = self._catalog.stored(request.model, request.version)
        await self._change(Change(*model, served=True))
        return pb.LoadModelResponse(model=describe(self._catalog.find(*model)))

    async def UnloadModel(
        self,
        request: pb.UnloadModelRequest,
        context: ServicerContext[pb.UnloadModelRequest, pb.UnloadModelResponse],  # noqa: ARG002
    ) -> pb.UnloadModelResponse:
        """Version 0 is the newest that is served."""
        model = self._catalog.find(request.model, request.version).manifest.key
        await self._change(Change(*model, served=False, end_streams=request.end_streams))
        return pb.UnloadModelResponse(version=model.version)


def _samples(bundle: Bundle) -> list[pb.Sample]:
    samples = []
    for sample, values in zip(bundle.manifest.samples, bundle.samples, strict=True):
        name = sample.file.removeprefix("samples/").rpartition(".")[0]
        message = pb.Sample(name=name, label=sample.label, description=sample.description)
        if isinstance(values, str):
            message.text = values
        else:
            encode_tensor_into(message.tensor, values)
        samples.append(message)
    return samples


def describe(bundle: Bundle, max_symbols: int | None = None) -> pb.Model:
    """What the contract says of a model, with so many of its symbols; None = all."""
    manifest = bundle.manifest
    network = manifest.network
    return pb.Model(
        name=manifest.name,
        version=manifest.version,
        summary=manifest.summary,
        pattern=pb.Pattern.Value("PATTERN_" + _enum_name(manifest.pattern)),
        cell=pb.Cell.Value("CELL_" + _enum_name(network.cell)),
        layers=network.layers,
        transition_layers=network.transition_layers,
        hidden_size=network.hidden_size,
        direction=pb.Direction.Value("DIRECTION_" + _enum_name(network.direction)),
        streamable=network.streamable,
        why_not_streamable=network.why_not_streamable or "",
        outputs=network.outputs,
        labels=manifest.output.labels,
        rewrites=manifest.output.rewrites,
        parameters=sum(parameter.numel() for parameter in bundle.predictor.network.parameters()),
        quality=_quality(manifest.quality),
        training_data=pb.TrainingData(
            name=manifest.data.name, licence=manifest.data.licence, credit=manifest.data.credit
        ),
        weights_sha256=manifest.weights_sha256,
        look_ahead=manifest.look_ahead,
        decoder=pb.Decoder(**network.decoder.model_dump(exclude={"embedding_size"})) if network.decoder else None,
        generation=pb.Generation(**manifest.generation.model_dump()) if manifest.generation else None,
        **_input_fields(manifest, max_symbols),
    )


def _quality(quality: Quality) -> pb.Quality:
    message = pb.Quality(**quality.model_dump(exclude={"interval_95"}))
    if quality.interval_95:
        message.interval_95.low, message.interval_95.high = quality.interval_95
    return message


def _input_fields(manifest: Manifest, max_symbols: int | None) -> dict[str, Any]:
    match manifest.input:
        case TextInput(symbols=symbols) as text:
            return {
                "symbols": symbols[:max_symbols], "symbol_count": len(symbols), "text_unit": text_unit(manifest),
                "unknown_symbol": text.unknown, "fold_case": text.fold_case,
            }  # fmt: skip
        case FeatureInput() as features:
            missing = pb.MissingValues.Value("MISSING_VALUES_" + _enum_name(features.missing_values))
            rate = features.steps_per_second or 0.0
            return {"features": features.feature_names, "missing_values": missing, "steps_per_second": rate}


def _enum_name(word: str) -> str:
    return word.replace("-", "_").replace(" ", "_").upper()

"""From a request for an output to the plan of the engine: every field is checked."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from models.generation import Generation
from models.manifest import Manifest, TextInput, UnknownSymbolError
from models.sampling import Sampling
from rnnserve.v1.real_time_service_pb2 import GenerateRequest
from service.engine.generation import Plan
from service.errors import FieldInvalid, ModelNotGenerative, TooManySteps, UnknownSymbol

MAX_TEMPERATURE = 10
MAX_STOPS = 16
MAX_STOP_SYMBOLS = 64
SEED_BITS = 64


def plan_of(request: GenerateRequest, manifest: Manifest, *, max_prompt_symbols: int) -> Plan:
    """Raises ModelNotGenerative, FieldInvalid, TooManySteps, UnknownSymbol."""
    generation = manifest.generation
    if generation is None:
        raise ModelNotGenerative(
            f"model {manifest.name!r} is {manifest.pattern}; only one-to-many models write", model=manifest.name
        )
    spec = cast(TextInput, manifest.input)  # as manifests are checked
    prompt = _decoded(request.prompt, spec, "prompt", max_prompt_symbols)
    _check_count(
        request.alternatives, "alternatives", len(spec.symbols), f"{manifest.name!r} has {len(spec.symbols)} symbols"
    )
    return Plan(
        read=np.concatenate([[spec.numbers[generation.start]], prompt]),
        max_symbols=_max_symbols(request, generation, manifest.name),
        sampling=_sampling(request, len(spec.symbols), manifest.name),
        seed=request.seed if request.HasField("seed") else secrets.randbits(SEED_BITS),
        end=None if generation.end is None else spec.numbers[generation.end],
        stops=_stops(request.stop, spec),
        deterministic=request.deterministic,
    )


def _max_symbols(request: GenerateRequest, generation: Generation, model: str) -> int:
    _check_count(
        request.max_symbols, "max_symbols", generation.max_symbols, f"{model!r} writes {generation.max_symbols} at most"
    )
    return request.max_symbols or generation.max_symbols


def _sampling(request: GenerateRequest, symbols: int, model: str) -> Sampling:
    temperature = request.temperature if request.HasField("temperature") else 1.0
    if not 0 <= temperature <= MAX_TEMPERATURE:
        message = f"temperature is {temperature:g}, not 0 to {MAX_TEMPERATURE}"
        raise FieldInvalid(message, field="temperature", limit=MAX_TEMPERATURE)
    top_p = request.top_p if request.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise FieldInvalid(f"top_p is {top_p:g}, not above 0 and at most 1", field="top_p", limit=1)
    _check_count(request.top_k, "top_k", symbols, f"{model!r} has {symbols} symbols")
    return Sampling(temperature, request.top_k, top_p)


def _check_count(count: int, field: str, limit: int, why: str) -> None:
    if count > limit:
        raise FieldInvalid(f"{field} is {count}, but model {why}", field=field, limit=limit)


def _stops(texts: Sequence[str], spec: TextInput) -> tuple[tuple[int, ...], ...]:
    if len(texts) > MAX_STOPS:
        raise FieldInvalid(f"there are {len(texts)} stop texts, more than {MAX_STOPS}", field="stop", limit=MAX_STOPS)
    stops = []
    for number, text in enumerate(texts):
        field = f"stop[{number}]"
        symbols = _decoded(text, spec, field, MAX_STOP_SYMBOLS)
        if not len(symbols):
            raise FieldInvalid("a stop text has one symbol at least", field=field)
        stops.append(tuple(symbols.tolist()))
    return tuple(stops)


def _decoded(text: str, spec: TextInput, field: str, max_symbols: int) -> NDArray[np.int64]:
    """(symbols,): their numbers."""
    symbols = spec.steps(text, max_symbols)
    if len(symbols) > max_symbols:
        raise TooManySteps(f"there are more than {max_symbols} symbols", field=field, limit=max_symbols)
    try:
        return spec.numbers_of(symbols)
    except UnknownSymbolError as error:
        raise UnknownSymbol(f"{field}: {error}", field=field, symbol=error.symbol, place=error.place) from None

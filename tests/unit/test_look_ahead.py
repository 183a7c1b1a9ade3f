"""Each step brings the answer about one before it: whatever is lost between client and server, each comes once."""

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.recurrent import NetworkSpec
from service.sessions.record import SessionKey
from tests.support.in_memory import Cut, Server, Wire, multiplex_on, stream_on
from tests.support.networks import SYMBOLS, look_aheads, random_bundle, seeds, specs
from tests.support.reference import Reference, assert_close

Array = NDArray[Any]

whatever_the_clock_says = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
sequences = st.lists(st.lists(st.integers(1, 4), max_size=5), min_size=1, max_size=4)
"""Each in chunks of so many steps."""
cuts = st.lists(st.builds(Cut, responses=st.integers(0, 9), crash=st.booleans()), max_size=6)
responses_per_checkpoint = st.integers(1, 6)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What is cut on purpose fills no log."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def random_chunk(spec: NetworkSpec, steps: int, rng: np.random.Generator) -> Array | str:
    if spec.symbols:
        return "".join(rng.choice(SYMBOLS, steps))
    values = rng.normal(size=(steps, spec.features or 0)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = np.nan
    return values


def whole(chunks: list[Any]) -> Any:
    return "".join(chunks) if isinstance(chunks[0], str) else np.concatenate(chunks)


@settings(whatever_the_clock_says, max_examples=150)
@given(specs, seeds, look_aheads, sequences, cuts, responses_per_checkpoint, st.integers(0, 3))
def test_whatever_is_lost_a_stream_gets_each_answer_once_and_as_over_the_whole_sequence(
    spec: NetworkSpec,
    seed: int,
    look_ahead: int,
    sequences: list[list[int]],
    cuts: list[Cut],
    responses_per_checkpoint: int,
    ahead: int,
) -> None:
    rng = np.random.default_rng(seed)
    chunks = [[random_chunk(spec, steps, rng) for steps in sequence] for sequence in sequences]
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, "hold_last", seed, look_ahead=look_ahead)
        reference = Reference(bundle.folder)

    async def play() -> None:
        server = Server(bundle)
        wire = Wire(server, cuts, responses_per_checkpoint=responses_per_checkpoint)
        stream, answers = stream_on(wire, "a"), []
        await stream.open()
        for sequence in chunks:
            if ahead:
                answers += [answer async for answer in stream.steps(sequence, ahead=ahead)]
            else:
                for chunk in sequence:
                    answers += [answer async for answer in stream.steps([chunk], ahead=1)]
            answers += await stream.finish()
        await stream.close()
        await wire.end()
        assert [answer.step for answer in answers] == list(range(stream.next_step))
        wanted = [reference.predict(whole(sequence)) for sequence in chunks if sequence]
        if wanted:
            assert_close(np.stack([answer.output for answer in answers]), np.concatenate(wanted))
        assert not server.store.records
        assert await server.sessions.after(SessionKey("", ""), 1) == []
        server.engine.close()

    asyncio.run(play())


@settings(whatever_the_clock_says, max_examples=100)
@given(specs, seeds, look_aheads, st.lists(sequences, min_size=1, max_size=3), cuts, responses_per_checkpoint)
def test_whatever_is_lost_many_sessions_on_one_call_get_each_answer_once(
    spec: NetworkSpec,
    seed: int,
    look_ahead: int,
    sessions: list[list[list[int]]],
    cuts: list[Cut],
    responses_per_checkpoint: int,
) -> None:
    rng = np.random.default_rng(seed)
    lengths = {f"s{i}": list(map(sum, sequences)) for i, sequences in enumerate(sessions)}
    inputs = {name: [random_chunk(spec, n, rng) for n in own] for name, own in lengths.items()}
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(folder, spec, "hold_last", seed, look_ahead=look_ahead)
        reference = Reference(bundle.folder)

    async def play() -> None:
        server = Server(bundle)
        wire = Wire(server, cuts, responses_per_checkpoint=responses_per_checkpoint, is_multiplexed=True)
        multiplex = multiplex_on(wire)
        found: dict[str, list[tuple[int, Array]]] = {name: [] for name in inputs}

        def note(answer: Any) -> None:
            assert not answer.errors
            for name, step, output in zip(answer.sessions, answer.steps.tolist(), answer.outputs, strict=True):
                if step >= 0:
                    found[name].append((step, output))

        async with multiplex:
            await multiplex.open(list(inputs))
            for number in range(max(map(len, lengths.values()))):
                now = {name: own[number] for name, own in inputs.items() if number < len(own)}
                for step in range(max(map(len, now.values()))):
                    names = [name for name, values in now.items() if step < len(values)]
                    x: Any = [now[name][step] for name in names]
                    if step % 2:
                        await multiplex.send(names, x if spec.symbols else np.stack(x))
                    else:
                        note(await multiplex.step(names, x if spec.symbols else np.stack(x)))
                        received = await multiplex.receive(timeout_s=0.0)
                        if received is not None:
                            note(received)
                note(await multiplex.finish(list(now)))
        await wire.end()
        for name, answers in found.items():
            assert sorted(step for step, _ in answers) == list(range(sum(lengths[name])))
            wanted = [reference.predict(values) for values in inputs[name] if len(values)]
            if wanted:
                rows = [output for _, output in sorted(answers, key=lambda answer: answer[0])]
                assert_close(np.stack(rows), np.concatenate(wanted))
        assert not server.store.records
        assert await server.sessions.after(SessionKey("", ""), 1) == []
        server.engine.close()

    asyncio.run(play())

"""One-to-many bundles, and the engine's way from one symbol to the next."""

import asyncio
import gc
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from models.generation import Generation
from models.manifest import Manifest, ModelKey, TextInput
from models.recurrent import NetworkSpec
from models.sampling import Sampling
from service.engine.executor import Floats
from service.engine.generation import Finish, Plan, Writer
from service.engine.step_engine import StepEngine
from service.errors import ExecutionFailed
from tests.support.bundles import features, manifest, write_composer
from tests.support.fakes import CountingMetrics

SYMBOLS = tuple("abc.")
SPEC = NetworkSpec(cell="gru", symbols=4, embedding_size=2, hidden_size=2, outputs=4)
GOOD: dict[str, Any] = {
    "network": SPEC,
    "inputs": TextInput(symbols=SYMBOLS),
    "labels": SYMBOLS,
    "pattern": "one-to-many",
    "generation": Generation(start=".", end=".", max_symbols=10),
}
MODEL = ModelKey("composer", 1)


def described(**changes: Any) -> Manifest:
    return manifest("composer", **(GOOD | changes))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no generation": ({"generation": None}, 'generation goes with the pattern "one-to-many"'),
    "another pattern": ({"pattern": "many-to-many aligned"}, 'generation goes with the pattern "one-to-many"'),
    "start": (
        {"generation": Generation(start="x", max_symbols=1)},
        "generation.start is 'x', which is none of input.symbols",
    ),
    "end": (
        {"generation": Generation(start="a", end="x", max_symbols=1)},
        "generation.end is 'x', which is none of input.symbols",
    ),
    "order of labels": ({"labels": tuple("acb.")}, "output.labels.1 is 'c', but input.symbols.1 is 'b'"),
    "fewer labels": (
        {"labels": tuple("abc"), "network": SPEC.model_copy(update={"outputs": 3})},
        "output.labels has 3 entries but input.symbols has 4",
    ),
    "no labels": ({"labels": ()}, "output.labels has 0 entries but input.symbols has 4"),
    "look-ahead": ({"look_ahead": 1}, "look_ahead is not for a network that reads what it writes"),
    "numbers": (
        {"inputs": features(3), "network": NetworkSpec(cell="gru", features=3, hidden_size=2, outputs=4)},
        "input must be text",
    ),
    "bidirectional": (
        {"network": SPEC.model_copy(update={"direction": "bidirectional"})},
        "network cannot write symbol by symbol: a bidirectional network",
    ),
    "readout": (
        {"network": SPEC.model_copy(update={"readout": "mean"})},
        "network cannot write symbol by symbol: the network answers about the mean",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_manifest_whose_parts_do_not_fit_is_refused_by_the_field(name: str) -> None:
    changes, problem = WRONG[name]
    with pytest.raises(ValidationError) as refusal:
        described(**changes)
    assert problem in str(refusal.value)


@pytest.mark.parametrize("max_symbols", [0, 100_001])
def test_the_most_symbols_of_an_output_are_bounded(max_symbols: int) -> None:
    with pytest.raises(ValidationError, match="max_symbols"):
        Generation(start="a", max_symbols=max_symbols)


def test_a_composer_is_saved_and_loaded(tmp_path: Path) -> None:
    assert write_composer(tmp_path).manifest.generation == Generation(start=".", end=".", max_symbols=500)


class Successor:
    """Says that the symbol behind the last one comes next, round and round; fails at `fails_at`. Keeps how many shared
    each forward, and their states: how many symbols each has read."""

    row_size = 1

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.read: list[list[int]] = []
        self.states: list[list[float]] = []

    def step(self, inputs: NDArray[np.generic], rows: Floats) -> tuple[Floats, Floats]:
        symbols = inputs.astype(np.int64)
        self.read.append(symbols.tolist())
        self.states.append(rows[:, 0].tolist())
        if self.fails_at in self.read[-1]:
            raise RuntimeError("secret of the executor")
        outputs = np.zeros((len(symbols), len(SYMBOLS)), np.float32)
        outputs[np.arange(len(symbols)), (symbols + 1) % len(SYMBOLS)] = 40.0
        return outputs, rows + 1


@pytest.fixture
def executor() -> Successor:
    return Successor()


@pytest.fixture
def engine(executor: Successor) -> StepEngine:
    return StepEngine({MODEL: executor}, max_tick_sessions=8, metrics=CountingMetrics())


def plan(*read: int, **changes: Any) -> Plan:
    given: dict[str, Any] = {"max_symbols": 10, "sampling": Sampling(), "seed": 1}
    return Plan(read=np.array(read), **(given | changes))


async def all_of(writer: Writer) -> list[int]:
    return [drawn.symbol async for drawn in writer.write()]


async def test_what_is_drawn_is_read_next_and_the_prompt_before_it(engine: StepEngine, executor: Successor) -> None:
    writer = Writer(engine, MODEL, plan(3, 0, 1, max_symbols=4))
    drawn = [drawn async for drawn in writer.write()]
    assert ([each.symbol for each in drawn], [each.index for each in drawn]) == ([2, 3, 0, 1], [0, 1, 2, 3])
    assert executor.read == [[3], [0], [1], [2], [3], [0]]
    assert executor.states == [[0], [1], [2], [3], [4], [5]]
    assert (writer.finish, writer.written) == (Finish.MAX_SYMBOLS, 4)
    assert drawn[0].log_probabilities[2] == pytest.approx(0.0)


async def test_the_end_is_no_part_of_an_output(engine: StepEngine) -> None:
    writer = Writer(engine, MODEL, plan(3, end=3))
    assert await all_of(writer) == [0, 1, 2]
    assert writer.finish is Finish.END
    assert writer.end_log_probability == pytest.approx(0.0)


async def test_an_output_may_end_before_its_first_symbol(engine: StepEngine) -> None:
    writer = Writer(engine, MODEL, plan(3, 0, 1, 2, end=3))
    assert await all_of(writer) == []
    assert (writer.finish, writer.written) == (Finish.END, 0)


@pytest.mark.parametrize(
    ("stops", "output", "stop"),
    [
        (((1, 2),), [0, 1, 2], 0),
        (((2, 1), (0, 1, 2), (2,)), [0, 1, 2], 1),
        (((0, 1, 2, 3, 0),), [0, 1, 2, 3, 0], 0),
        (((3, 0),), [0, 1, 2, 3, 0], 0),  # nothing of it may stand in what was read before
    ],
)
async def test_an_output_is_over_once_it_ends_with_a_stop(
    engine: StepEngine, stops: tuple[tuple[int, ...], ...], output: list[int], stop: int
) -> None:
    writer = Writer(engine, MODEL, plan(3, stops=stops))
    assert await all_of(writer) == output
    assert (writer.finish, writer.stop) == (Finish.STOP, stop)


async def test_a_stop_that_comes_with_the_last_symbol_is_told(engine: StepEngine) -> None:
    writer = Writer(engine, MODEL, plan(3, max_symbols=2, stops=((1,),)))
    assert await all_of(writer) == [0, 1]
    assert writer.finish is Finish.STOP


async def test_outputs_that_are_written_at_once_share_ticks(engine: StepEngine, executor: Successor) -> None:
    outputs = await asyncio.gather(*(all_of(Writer(engine, MODEL, plan(n, max_symbols=5))) for n in range(3)))
    assert outputs == [[1, 2, 3, 0, 1], [2, 3, 0, 1, 2], [3, 0, 1, 2, 3]]
    assert executor.read[0] == [0, 1, 2]


async def test_a_deterministic_one_shares_none(engine: StepEngine, executor: Successor) -> None:
    writers = [Writer(engine, MODEL, plan(n, 0, max_symbols=5, deterministic=n == 3)) for n in range(4)]
    assert await asyncio.gather(*map(all_of, writers)) == [[1, 2, 3, 0, 1]] * 4
    assert [len(symbols) for symbols in executor.read] == [3, 1] * 6


async def test_a_failed_step_breaks_an_output_off(engine: StepEngine, executor: Successor) -> None:
    executor.fails_at = 2
    output = Writer(engine, MODEL, plan(0)).write()
    assert [(await anext(output)).symbol for _ in range(2)] == [1, 2]
    with pytest.raises(ExecutionFailed):
        await anext(output)


def free_rows(engine: StepEngine) -> int:
    return len(engine.states(MODEL)._free)


async def test_an_output_that_is_closed_frees_its_state(engine: StepEngine) -> None:
    before = free_rows(engine)
    async with aclosing(Writer(engine, MODEL, plan(0, max_symbols=1_000)).write()) as output:
        await anext(output)
        assert free_rows(engine) == before - 1
    assert free_rows(engine) == before


async def test_one_whose_task_is_cancelled_in_the_midst_of_its_prompt_frees_its_states(engine: StepEngine) -> None:
    before = free_rows(engine)
    task = asyncio.create_task(all_of(Writer(engine, MODEL, plan(*[0] * 1_000))))
    for _ in range(10):
        await asyncio.sleep(0)
    assert free_rows(engine) == before - 2  # its own, and that between two steps
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await all_of(Writer(engine, MODEL, plan(0)))  # the tick that was under way is over by then
    gc.collect()
    assert free_rows(engine) == before

"""A task that is learned in a second."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from models.manifest import Output
from models.tasks import TASKS
from models.tasks.task import Recordings, Run, Split, Task, the_same
from models.training.loop import Settings
from models.training.sequences import Recording


def recordings(count: int, seed: int) -> Recordings:
    """The label, of three, shifts every value."""
    rng = np.random.default_rng(seed)
    return [Recording(rng.normal(i % 3, 0.3, (rng.integers(5, 9), 12)).astype(np.float32), i % 3) for i in range(count)]


TRAIN, VALIDATION, TEST = recordings(60, 1), recordings(12, 2), recordings(30, 3)


def small_task(test: Recordings = TEST, split: Callable[[Run], Split] | None = None) -> Task:
    return replace(
        TASKS["speaker"],
        name="small",
        network=TASKS["speaker"].network.model_copy(update={"hidden_size": 8, "outputs": 3}),
        output=Output(activation="softmax", labels=("low", "middle", "high")),
        settings=Settings(epochs=3, batch_size=16, learning_rate=0.02, patience=3),
        split=split or (lambda run: Split(TRAIN, VALIDATION, test)),
        examples=the_same,
    )

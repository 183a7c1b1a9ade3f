"""Stream a sensor: a prediction after every reading, as the readings come.

Run: python examples/stream_sensor.py [TARGET]
"""

import sys
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rnnserve import Client

TARGET = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
MODEL = "activity"


def readings(recording: npt.NDArray[np.float32], rate_hz: float) -> Iterator[npt.NDArray[np.float32]]:
    """Stands for your sensor: gives a held-out recording, one reading (features,) at a time."""
    for reading in recording:
        yield reading
        time.sleep(1 / rate_hz)


with Client(TARGET) as client:
    model = client.model(MODEL)
    sample = client.samples(MODEL)[0]
    recording = np.asarray(sample.input)[: int(3 * model.steps_per_second)]  # three seconds of it

    with client.stream(MODEL, top_k=2) as stream:
        for answer in stream.steps(readings(recording, model.steps_per_second)):
            if answer.step % 25 == 24:
                guesses = ", ".join(f"{label} {probability:.0%}" for label, probability in answer.top)
                print(f"after {(answer.step + 1) / model.steps_per_second:g} s: {guesses}")
    print(f"it truly is {sample.label}")

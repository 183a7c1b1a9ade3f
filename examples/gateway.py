"""A gateway: the readings of 1,000 sensors on one stream, a message for all of them at a time.

Run: python examples/gateway.py [TARGET]
"""

import sys
import time
from collections import Counter

import numpy as np

from rnnserve import Client

TARGET = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
MODEL, SENSORS, STEPS = "activity", 1_000, 50

with Client(TARGET) as client:
    recordings = [sample.input for sample in client.samples(MODEL)]
    rng = np.random.default_rng(0)
    starts = [(recording, rng.integers(len(recording) - STEPS)) for recording in recordings * SENSORS][:SENSORS]
    readings = np.stack([recording[start : start + STEPS] for recording, start in starts], axis=1)
    sensors = [f"sensor-{number}" for number in range(SENSORS)]

    with client.multiplex(MODEL) as gateway:
        gateway.open(sensors)
        start_s = time.perf_counter()
        for reading in readings:  # (sensors, features)
            answers = gateway.step(sensors, reading)  # a row for each sensor; `send` and `receive` do not wait
            for sensor, error in answers.errors.items():  # those of one sensor cost the others nothing
                print(f"{sensor}: {error}")
        duration_s = time.perf_counter() - start_s
        print(f"{SENSORS * STEPS / duration_s:,.0f} steps/s; now:", dict(Counter(answers.labels)))

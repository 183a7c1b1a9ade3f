"""Predict whole sequences: a few in one message, and any number in bulk.

Run: python examples/predict_sequences.py [TARGET]
"""

import sys

from rnnserve import Client

TARGET = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
MODEL = "speaker-bidirectional"

with Client(TARGET) as client:
    samples = client.samples(MODEL)
    recordings = [sample.input for sample in samples]  # each (steps, features), of any length

    for prediction in client.predict(MODEL, recordings[:2], top_k=2):
        print("likely:", ", ".join(f"{label} {probability:.0%}" for label, probability in prediction.top[-1]))

    # For many: read from an iterator as far as needed, answered in its order, with bounded memory.
    right = 0
    for sample, prediction in zip(samples, client.predict_many(MODEL, iter(recordings)), strict=True):
        right += prediction.label == sample.label
    print(f"{right} of {len(samples)} right")

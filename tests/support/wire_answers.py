"""What a served network says of recordings, asked over gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.beam import Decoding
from models.training.sequences import Recording
from rnnserve import Client
from rnnserve import Decoding as AskedDecoding


@dataclass(frozen=True)
class WireAnswers:
    """Through the client's `predict`, for whatever a task measures."""

    client: Client
    model: str

    def about_all(self, recordings: Sequence[Recording]) -> Tensor:
        """(recordings, outputs): about the last step of each."""
        found = self.client.predict(self.model, [r.values for r in recordings], steps="last")
        return torch.stack([torch.from_numpy(prediction.output) for prediction in found])

    def about_steps(self, recordings: Sequence[Recording]) -> list[Tensor]:
        """For each recording (steps, outputs)."""
        found = self.client.predict(self.model, [r.values for r in recordings], steps="all")
        return [torch.from_numpy(prediction.outputs) for prediction in found]

    def written(self, recordings: Sequence[Recording], decoding: Decoding) -> list[tuple[int, ...]]:
        """The labels of the best output for each recording."""
        labels = self.client.model(self.model).labels
        asked = AskedDecoding(
            beam_width=decoding.beam_width, max_labels=decoding.max_labels, length_penalty=decoding.length_penalty
        )
        found = self.client.predict(self.model, [r.values for r in recordings], decoding=asked)
        return [tuple(labels.index(label) for label in prediction.labels) for prediction in found]

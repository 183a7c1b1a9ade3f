"""What a network says of recordings, which may be texts: their steps are encoded as in serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.beam import Decoding
from models.predictor import Predictor
from models.seq2seq import EncoderDecoder, Writing, begin_writing, write_on
from models.training.sequences import Batch, Recording, batches, encoded, pad


class Answers(Protocol):
    """A network that can be asked, wherever it runs."""

    def about_all(self, recordings: Sequence[Recording]) -> Tensor:
        """(recordings, outputs): about each recording when it has ended."""
        ...

    def about_steps(self, recordings: Sequence[Recording]) -> list[Tensor]:
        """For each recording (steps, outputs)."""
        ...

    def written(self, recordings: Sequence[Recording], decoding: Decoding) -> list[tuple[int, ...]]:
        """The labels of the best output of an encoder-decoder for each recording."""
        ...


@dataclass(frozen=True)
class PredictorAnswers:
    """Those of a network in this process."""

    predictor: Predictor

    @torch.no_grad()
    def about_all(self, recordings: Sequence[Recording]) -> Tensor:
        return torch.cat(
            [
                last_answers(self.predictor.run(batch.values, batch.lengths), batch.lengths)
                for batch in self._of(recordings)
            ]
        )

    @torch.no_grad()
    def about_steps(self, recordings: Sequence[Recording]) -> list[Tensor]:
        """A network that answers about a whole sequence does so about each beginning of the recording."""
        if self.predictor.network.spec.readout != "each_step":
            return [self._about_beginnings(recording) for recording in recordings]
        outputs: list[Tensor] = []
        for batch in self._of(recordings):
            answers = self.predictor.run(batch.values, batch.lengths)
            outputs += [row[:length] for row, length in zip(answers, batch.lengths.tolist(), strict=True)]
        return outputs

    def _about_beginnings(self, recording: Recording) -> Tensor:
        values = next(self._of([recording])).values
        steps = values.shape[1]
        return self.predictor.run(values.expand(steps, *values.shape[1:]), torch.arange(1, steps + 1))

    @torch.no_grad()
    def written(self, recordings: Sequence[Recording], decoding: Decoding) -> list[tuple[int, ...]]:
        network = self.predictor.network
        if not isinstance(network, EncoderDecoder):
            raise TypeError("only an encoder-decoder writes")
        best: list[tuple[int, ...]] = []
        for batch in self._of(recordings):
            writings = _begin(network, batch, decoding)
            write_on(network, writings, decoding.max_labels)
            best += [writing.beam.hypotheses()[0].labels for writing in writings]
        return best

    def _of(self, recordings: Sequence[Recording]) -> Iterator[Batch]:
        for group in batches(encoded(recordings, self.predictor.input_spec), 128):
            yield pad(group)


def last_answers(outputs: Tensor, lengths: Tensor) -> Tensor:
    """(batch, steps, outputs) or (batch, outputs) -> (batch, outputs): the answer when the sequence has ended."""
    return outputs[torch.arange(len(lengths)), lengths - 1] if outputs.dim() == 3 else outputs


def _begin(network: EncoderDecoder, batch: Batch, decoding: Decoding) -> list[Writing]:
    memories = network.remember(batch.values, batch.lengths)
    rows = zip(memories, batch.lengths.tolist(), strict=True)
    return [begin_writing(network, memory[:steps], decoding) for memory, steps in rows]

"""Encoder-decoders: one network reads a sequence, another writes one of another length (Tx ≠ Ty).

Sutskever, Vinyals and Le, "Sequence to Sequence Learning with Neural Networks", 2014. With attention each label is
written with a look at all steps of the input: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural
Machine Translation", 2015 (global attention, dot score, no input feeding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from models.beam import END, Beam, Decoding, Floats
from models.recurrent import NetworkSpec, RecurrentNetwork, RecurrentStack, Values


class EncoderDecoder(RecurrentNetwork):
    """Its recurrent layers are the encoder; what these give, (steps, width), is the memory that the decoder attends to.

    The decoder is one layer as wide as that, which begins where the encoder has ended in each direction:
    s⟨0⟩ = tanh(Wb [last of the forward, first of the backward direction] + bb).
    """

    def __init__(
        self, spec: NetworkSpec, *, dropout: float = 0.0, stack: type[RecurrentStack] = RecurrentStack
    ) -> None:
        super().__init__(spec, dropout=dropout, stack=stack)
        if spec.decoder is None:
            raise ValueError("the network has no decoder")
        width, of_label = spec.hidden_size * spec.directions, spec.decoder.embedding_size
        self.label_embedding = nn.Embedding(spec.outputs, of_label)
        self.bridge = nn.Linear(width, width)
        layer = NetworkSpec(cell=spec.cell, features=of_label, hidden_size=width, outputs=spec.outputs)
        self.decoder = stack(layer, of_label)
        self.combine = nn.Linear(2 * width, width) if spec.decoder.attention else None

    def teach(self, inputs: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """Each label's logits, given the true ones before it.

        inputs (batch, steps, features) or (batch, steps), lengths (batch,), labels (batch, labels), END behind the last
        -> (batch, labels, outputs).
        """
        memory = self.remember(inputs, lengths)
        places = torch.arange(len(memory))
        ends = self._ends(memory[places, lengths - 1], memory[:, 0])
        before = functional.pad(labels[:, :-1], (1, 0), value=END)
        every = torch.full((len(memory),), labels.shape[1])
        states, _ = self.decoder(self.label_embedding(before), every, [self.first_values(ends)])
        contexts, _ = self.attend(states, memory, torch.arange(memory.shape[1]) < lengths.unsqueeze(1))
        return self.write(states, contexts)

    def remember(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """(batch, steps, features) or (batch, steps), lengths (batch,) -> the memory (batch, steps, width)."""
        start = [self._zeros(len(inputs), self.spec.hidden_size) for _ in range(self.spec.layers)]
        memory: Tensor = self.recurrent(self.read(inputs), lengths, start)[0]
        return memory

    def ends_of(self, memory: Tensor) -> Tensor:
        """(steps, width) of one sequence -> (width,): where each direction has ended."""
        return self._ends(memory[-1], memory[0])

    def _ends(self, last: Tensor, first: Tensor) -> Tensor:
        size = self.spec.hidden_size
        return torch.cat([last[..., :size], first[..., size:]], dim=-1)

    def first_values(self, ends: Tensor) -> Values:
        """The decoder's at the beginning: (batch, width) each."""
        h = torch.tanh(self.bridge(ends))
        return (h, torch.zeros_like(h)) if self.spec.cell == "lstm" else (h,)

    def step(self, labels: Tensor, values: Values) -> Values:
        """The decoder's values after it has seen the label before, (batch,)."""
        one = torch.ones(len(labels), dtype=torch.int64)
        _, (values,) = self.decoder(self.label_embedding(labels).unsqueeze(1), one, [values])
        return values

    def attend(self, states: Tensor, memory: Tensor, is_step: Tensor) -> tuple[Tensor, Tensor]:
        """The context of each state, from the memory of its group, and how much it attends to each step.

        states (groups, rows, width), memory (groups, steps, width), is_step (groups, steps): what is no padding
        -> (groups, rows, width), (groups, rows, steps).
        """
        scores = states @ memory.transpose(1, 2)
        weights = scores.masked_fill(~is_step.unsqueeze(1), -torch.inf).softmax(dim=-1)
        return weights @ memory, weights

    def write(self, states: Tensor, contexts: Tensor) -> Tensor:
        """(…, width) of the decoder, and their contexts -> (…, outputs): logits."""
        if self.combine is not None:
            states = torch.tanh(self.combine(torch.cat([contexts, states], dim=-1)))
        return self.answer(states)

    def _zeros(self, batch: int, size: int) -> Values:
        return tuple(torch.zeros(batch, size) for _ in range(self.spec.state_layout.values_per_layer))


def network_of(
    spec: NetworkSpec, *, dropout: float = 0.0, stack: type[RecurrentStack] = RecurrentStack
) -> RecurrentNetwork:
    """With random weights, of the kind that the spec asks for."""
    kind = RecurrentNetwork if spec.decoder is None else EncoderDecoder
    return kind(spec, dropout=dropout, stack=stack)


@dataclass(eq=False)
class Writing:
    """An output on its way: memory (steps, width), the search, and (paths, width) of each of the decoder's values."""

    memory: Tensor
    beam: Beam
    values: Values


@torch.inference_mode()
def begin_writing(network: EncoderDecoder, memory: Tensor, decoding: Decoding) -> Writing:
    """With what the encoder gave for one sequence: (steps, width)."""
    return Writing(memory, Beam(decoding), network.first_values(network.ends_of(memory).unsqueeze(0)))


@torch.inference_mode()
def write_on(network: EncoderDecoder, writings: Sequence[Writing], labels: int) -> None:
    """So many labels more of each, or up to its end; all paths of all of them in one product."""
    memories = _Memories(network, writings)
    for _ in range(labels):
        live = [writing for writing in writings if not writing.beam.is_over]
        if not live:
            return
        last = torch.tensor([label for writing in live for label in writing.beam.last_labels])
        values = network.step(last, tuple(map(torch.cat, zip(*(writing.values for writing in live), strict=True))))
        contexts, weights = memories.attend(values[0], live)
        log_probabilities = network.write(values[0], contexts).log_softmax(dim=-1)
        candidates = min(max(writing.beam.decoding.beam_width for writing in live) + 1, log_probabilities.shape[1])
        best, numbers = (found.numpy() for found in log_probabilities.topk(candidates))
        first = 0
        for writing, attention in zip(live, weights, strict=True):
            rows = slice(first, first := first + len(writing.values[0]))
            parents = writing.beam.advance(best[rows], numbers[rows], attention)
            writing.values = tuple(value[rows][parents] for value in values)


class _Memories:
    """Those of some writings, padded in groups of like length and width: no more than half of either is padding."""

    def __init__(self, network: EncoderDecoder, writings: Sequence[Writing]) -> None:
        self._network = network
        by_size: dict[tuple[int, int], list[Writing]] = {}
        if network.combine is not None:
            for writing in writings:
                size = len(writing.memory).bit_length(), writing.beam.decoding.beam_width.bit_length()
                by_size.setdefault(size, []).append(writing)
        self._groups = [
            (group, _padded([w.memory for w in group]), _is_step([len(w.memory) for w in group]))
            for group in by_size.values()
        ]

    def attend(self, states: Tensor, live: Sequence[Writing]) -> tuple[Tensor, list[Floats | None]]:
        """states (paths of all, width) -> their contexts, and the weights (paths, steps) of each that wants them."""
        firsts, first = dict[Writing, int](), 0
        for writing in live:
            firsts[writing] = first
            first += len(writing.values[0])
        contexts, kept = torch.zeros_like(states), dict[Writing, Floats | None]()
        for group, memory, is_step in self._groups:
            width = max(len(writing.values[0]) for writing in group)
            places = [(i, firsts[w], len(w.values[0])) for i, w in enumerate(group) if w in firsts]
            queries = states.new_zeros(len(group), width, states.shape[1])
            for i, begin, paths in places:
                queries[i, :paths] = states[begin : begin + paths]
            of_queries, weights = self._network.attend(queries, memory, is_step)
            for i, begin, paths in places:
                contexts[begin : begin + paths] = of_queries[i, :paths]
                if group[i].beam.decoding.attention:
                    kept[group[i]] = weights[i, :paths, : len(group[i].memory)].numpy()
        return contexts, [kept.get(writing) for writing in live]


def _padded(memories: list[Tensor]) -> Tensor:
    """(groups, steps, width); of one alone no copy."""
    return memories[0].unsqueeze(0) if len(memories) == 1 else pad_sequence(memories, batch_first=True)


def _is_step(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)

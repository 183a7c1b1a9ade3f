"""How good does it sound? A rating of a sentence, after each of its words or about all of it: many-to-one, text."""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from models.manifest import DataSource, Output, TextInput
from models.markdown import table
from models.recurrent import NetworkSpec
from models.tasks import rated_texts
from models.tasks.rated_texts import ARCHIVE, INNER, LEXICON, rated_words
from models.tasks.task import Recordings, Run, Task, Words
from models.training.answers import Answers
from models.training.loop import Settings
from models.training.scores import Score, correlation, percent
from models.training.sequences import Recording

VOCABULARY = 8_000
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
UNKNOWN_SHARE = 0.1  # of the words of a sentence, at random, so that the network learns to do without some
WORDS_AN_EPOCH = 3_000  # of the lexicon
SEEDS = 3
BANDS = ("-2 and below", "-1", "0", "1", "2 and above")


def vocabulary(recordings: Recordings) -> TextInput:
    """The words that are most frequent in what training sees and in the lexicon."""
    texts = [*(str(recording.values) for recording in recordings), *(word.text for word in rated_words())]
    counts = Counter(word.casefold().strip(string.punctuation) or word for text in texts for word in text.split())
    symbols = (UNKNOWN, *(word for word, _ in counts.most_common(VOCABULARY - 1)))
    return TextInput(unit="word", symbols=symbols, unknown=UNKNOWN, fold_case=True)


def with_gaps_and_words(recordings: Recordings, rng: np.random.Generator) -> Recordings:
    """Sentences some of whose words are unknown, and single words of the lexicon."""
    lexicon = rated_words()
    words = [rated_texts.recording(lexicon[i]) for i in rng.permutation(len(lexicon))[:WORDS_AN_EPOCH]]
    return [*(replace(recording, values=with_gaps(str(recording.values), rng)) for recording in recordings), *words]


def with_gaps(text: str, rng: np.random.Generator) -> str:
    """Each word unknown with a probability of UNKNOWN_SHARE."""
    words = text.split()
    gaps = rng.random(len(words)) < UNKNOWN_SHARE
    return " ".join(UNKNOWN if gap else word for word, gap in zip(words, gaps, strict=True))


def measure(answers: Answers, recordings: Recordings) -> tuple[Score, ...]:
    """How the answers about whole sentences go with the ratings, and how often they are on the same side of 0."""
    found, truth = _found_and_truth(answers, recordings)
    sources = np.array([recording.name.partition(":")[0] for recording in recordings])
    scores: list[Score] = []
    for source, of in (("film", "film reviews"), ("tweet", "tweets"), ("product", "product reviews")):
        rows = sources == source
        if rows.sum() > 3:
            right = int(((found > 0) == (truth > 0))[rows].sum())
            scores += [
                correlation(f"correlation with the ratings of {of}", found[rows], truth[rows]),
                percent(f"right sign, {of}, percent", right, int(rows.sum())),
            ]
    return tuple(scores)


def _found_and_truth(answers: Answers, recordings: Recordings) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(recordings,) each."""
    truth = np.array([recording.target for recording in recordings], np.float32)
    return answers.about_all(recordings).squeeze(-1).numpy(), truth


def errors(answers: Answers, recordings: Recordings, _output: Output) -> str:
    """Which ratings it takes for which, and what it says of sentences that were made to show what it cannot do."""
    return f"{_mistaken_ratings(answers, recordings)}\n\n{_probed(answers)}"


def _mistaken_ratings(answers: Answers, recordings: Recordings) -> str:
    found, truth = (np.clip(np.rint(each), -2, 2).astype(int) + 2 for each in _found_and_truth(answers, recordings))
    counts = np.zeros((len(BANDS), len(BANDS)), int)
    np.add.at(counts, (truth, found), 1)
    rows = [[band, *(f"{count:,}" for count in row)] for band, row in zip(BANDS, counts.tolist(), strict=True)]
    return "All test sentences by their ratings and its own, rounded:\n\n" + table(["rated, and by it", *BANDS], rows)


def _probed(answers: Answers) -> str:
    recordings = [Recording(text, 0.0) for text in PROBES]
    found = answers.about_all(recordings).squeeze(-1).tolist()
    rows = "\n".join(f"- {rating:+.1f}: *{text}*" for text, rating in zip(PROBES, found, strict=True))
    return f"The texts of the data are not ours to print; these were written for this card:\n\n{rows}"


PROBES = (
    "Not bad at all.",
    "I expected a disaster, and it turned out to be a delight.",
    "It could have been a great film, had anybody cared.",
    "The only good thing about it is that it ends.",
    "Nobody who loves music will regret an evening with it.",
    "A film about a funeral, told with warmth and wit.",
)

OWN_SENTENCES = (
    ("A warm, funny and moving film that stays with you for days.", 3.0),
    ("Dull, lazy and far too long.", -2.5),
    ("The acting is superb and the music is a joy.", 3.0),
    ("I have rarely been so bored in a cinema.", -2.5),
    ("A clever script, beautifully played.", 2.5),
    ("The plot makes no sense and the jokes are painful.", -2.5),
    ("One of the best films of the year.", 3.0),
    ("A cheap and tasteless mess.", -3.0),
    ("Charming from the first scene to the last.", 2.5),
    ("It fails as a comedy and bores as a drama.", -2.0),
    ("An honest, gripping story about courage.", 2.5),
    ("The worst kind of sequel: loud, empty and smug.", -3.0),
)


def own_sentences(_recordings: Recordings) -> Recordings:
    """Written for this purpose, with ratings by their author: the texts of the data are not ours to ship."""
    return [Recording(text, rating, "film: written for this purpose") for text, rating in OWN_SENTENCES]


def runs(seed: int) -> tuple[Run, ...]:
    """Three seeds, the first of which is shipped."""
    return tuple(Run(seed + i) for i in range(SEEDS))


SOURCE = DataSource(
    name="sentences rated by many, and the VADER lexicon",
    archive=f"{ARCHIVE.package} {ARCHIVE.version} (source), {INNER} and {LEXICON}",
    archive_sha256=ARCHIVE.sha256,
    licence="the archive is MIT (C. J. Hutto) and states no other licence for the data; the sentences themselves "
    "belong to reviewers and to users of Twitter and Amazon, and are not republished here",
    credit="C. J. Hutto and E. Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media "
    "Text, ICWSM 2014",
)

DATA_IN_WORDS = """\
Sentences from film reviews (10,603), tweets (4,045) and reviews of products (3,685), each with the mean rating of some
15 to 20 people between -4 and 4; sentences with the same words as another were dropped. The part of each is decided by
the hash of its words, for products by that of the document: 15 % test, 7 % validation. Eleven of the 2,689 test
sentences, three of them from film reviews, have most of their stretches of four words in training. Beside them the
network reads single words of a lexicon with the ratings of ten people each. Ratings of one sentence by two people
differ by 0.7 to 0.9 (standard deviation), so no answer can be much closer. Sentences from a newspaper, which the
archive holds too, were left out: many of them are about neutral, and whose they are is clear."""

REFERENCES = """\
- VADER's rules (the package that the data comes from) on the same test sentences: 0.371 and 62.4 % on film reviews,
  0.846 and 93.9 % on tweets (with the HTML marks that some have), 0.595 and 70.4 % on products. On tweets, for which
  they were made, the rules are better than this network."""

LIMITS = """\
It reads what is said, not what is meant: irony, and praise of what a film might have been, escape it. Words beyond the
8,000 of its vocabulary are all one to it. English only."""

SENTIMENT = Task(
    name="sentiment",
    summary="Rates an English sentence from -4 to 4, with a guess after every word.",
    pattern="many-to-one",
    network=NetworkSpec(cell="lstm", symbols=VOCABULARY, embedding_size=96, hidden_size=128, outputs=1),
    settings=Settings(epochs=7, batch_size=32, learning_rate=2e-3, dropout=0.5, average_decay=0.995, weight_decay=0.01),
    input=vocabulary,
    output=Output(activation="none"),
    source=SOURCE,
    split=rated_texts.split,
    runs=runs,
    repeats_over="3 seeds",
    test_items="the sentences from film reviews whose SHA-256 is among the first fifteen hundredths",
    samples=own_sentences,
    examples=with_gaps_and_words,
    measure=measure,
    errors=errors,
    words=Words(
        purpose="""\
Many-to-one on a live stream of text: words go in as they are typed, and after each of them the network says how good
the sentence sounds so far.""",
        data=DATA_IN_WORDS,
        training="""\
Each guess, after whatever word, is compared with the rating of the whole sentence. In each epoch a tenth of the words
is made unknown, and 3,000 single words of the lexicon are read as sentences of one word.""",
        references=REFERENCES,
        limits=LIMITS,
    ),
)

BIDIRECTIONAL = replace(
    SENTIMENT,
    name="sentiment-bidirectional",
    summary="Rates an English sentence from -4 to 4, read from both ends.",
    network=NetworkSpec(
        cell="lstm",
        direction="bidirectional",
        symbols=VOCABULARY,
        embedding_size=96,
        hidden_size=96,
        outputs=1,
        readout="mean",
    ),
    words=replace(
        SENTIMENT.words,
        purpose="""\
The same sentences as `sentiment`, read from both ends: the network answers once, about the mean over all words, when
the sentence is over. It cannot stream, and says so.""",
        training="""\
One answer a sentence. In each epoch a tenth of the words is made unknown, and 3,000 single words of the lexicon are
read as sentences of one word.""",
    ),
)

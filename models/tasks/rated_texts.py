"""Sentences from film reviews, tweets and product reviews, rated from -4 to 4 (Hutto and Gilbert, 2014)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from models.data import Archive, member_of, read_member
from models.tasks.splits import hundredth
from models.tasks.task import Run, Split
from models.training.sequences import Recording

ARCHIVE = Archive(
    package="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
LEXICON = "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt"
FILES = {  # sentences from newspapers are left out: their signs are close to chance, and their owner is the strictest
    "film": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
}
TEST_BELOW, VALIDATION_BELOW = 15, 22  # hundredths


class RatedText(NamedTuple):
    """A sentence, the mean of its ratings, and what a split must not cut through."""

    text: str
    rating: float
    source: str
    group: str


@cache
def rated_texts() -> tuple[RatedText, ...]:
    """All, but for those that are the same words as one before."""
    outer = read_member(ARCHIVE, INNER)
    found: dict[str, RatedText] = {}
    for source, member in FILES.items():
        for row in parse(member_of(outer, INNER, member).decode(), source):
            if words := normalised(row.text):
                found.setdefault(words, row)
    return tuple(found.values())


def parse(table: str, source: str) -> Iterator[RatedText]:
    """Lines of an id, a rating and a text, separated by tabs. Of product reviews the id begins with the document's."""
    for line in table.splitlines():
        name, rating, text = line.split("\t", 2)
        group = f"amazon{name.partition('_')[0]}" if source == "product" else normalised(text)
        yield RatedText(html.unescape(text).strip(), float(rating), source, group)


def normalised(text: str) -> str:
    """Its words in small letters: by these, texts are the same or not."""
    return " ".join(re.findall(r"\w+", text.lower()))


@cache
def rated_words() -> tuple[RatedText, ...]:
    """English words of the lexicon, each rated by ten people who saw nothing but the word."""
    rows = (line.split("\t") for line in read_member(ARCHIVE, LEXICON).decode().splitlines())
    return tuple(
        RatedText(word, float(rating), "word", word) for word, rating, *_ in rows if re.fullmatch("[a-z'-]+", word)
    )


def split(_run: Run) -> Split:
    """By the hash of the words or, for product reviews, of the document."""
    parts: tuple[list[Recording], list[Recording], list[Recording]] = [], [], []
    for row in rated_texts():
        place = hundredth(row.group)
        parts[2 if place < TEST_BELOW else 1 if place < VALIDATION_BELOW else 0].append(recording(row))
    return Split(*parts)


def recording(row: RatedText) -> Recording:
    """Named by where it is from."""
    return Recording(row.text, row.rating, row.source)

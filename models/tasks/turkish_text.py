"""Turkish sentences from the web and Wikipedia, and the twelve letters that lose their marks on a plain keyboard."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from models.data import Archive, read_member

ARCHIVE = Archive(
    package="turkish_treebanks",
    version="1.0.0",
    filename="turkish_treebanks-1.0.0-py3-none-any.whl",
    sha256="5a009c29a8e96e8f7e25059d59ac293c3baead6d746bf0fa4c9d3349b1e37ba0",
)
MEMBERS = ("data/web.conllu", "data/wiki.conllu")
MARKED, PLAIN = "çğıöşüÇĞİÖŞÜ", "cgiosuCGIOSU"
MARK = dict(zip(PLAIN, MARKED, strict=True))
"""Of a plain letter that may have lost its mark: by table, for `lower()` and `upper()` take i and I for a pair."""
_TO_PLAIN = str.maketrans(MARKED, PLAIN)
TEST_BELOW, VALIDATION_BELOW = 12, 18  # hundredths of the documents


class Sentence(NamedTuple):
    """One sentence, and the document or article that it is from."""

    text: str
    document: str


def without_marks(text: str) -> str:
    """As it is typed on a keyboard that lacks the marked letters. A circumflex stays."""
    return text.translate(_TO_PLAIN)


@cache
def sentences() -> tuple[Sentence, ...]:
    """All, in the order of the files."""
    return tuple(each for member in MEMBERS for each in parse(read_member(ARCHIVE, member).decode()))


def parse(text: str) -> Iterator[Sentence]:
    """Each block has lines `# sent_id = document:sentence` and `# text = …` before its words."""
    sentence_id = ""
    for line in text.splitlines():
        name, _, value = line.partition(" = ")
        if name == "# sent_id":
            sentence_id = value
        elif name == "# text":
            yield Sentence(unicodedata.normalize("NFC", value.strip()), sentence_id.rpartition(":")[0])

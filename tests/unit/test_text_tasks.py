"""The data of the models that read text, and what is made of it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch

from models.tasks import chorale, diacritics, rated_texts, sentiment
from models.tasks.chorales import Chorale, are_alike, tunes, windows_of
from models.tasks.rated_texts import RatedText, normalised, rated_words
from models.tasks.task import Run, Split
from models.tasks.turkish_text import MARK, parse, sentences, without_marks
from models.training.sequences import NO_LABEL, Recording
from tests.support.answers import Saying

needs_data = pytest.mark.data


def test_each_capital_loses_its_own_mark_and_i_is_no_pair_of_dotless_i() -> None:
    assert without_marks("İstanbul'da ILIK kâğıt") == "Istanbul'da ILIK kâgit"
    assert (MARK["i"], MARK["I"]) == ("ı", "İ")


def test_only_letters_that_may_have_lost_a_mark_have_a_label() -> None:
    labels = diacritics.labels_of("aşıSİ?")
    assert [diacritics.LABELS[label] if label != NO_LABEL else None for label in labels] == [
        None, "ş", "ı", "=", "İ", None,
    ]  # fmt: skip
    assert diacritics.restored(without_marks("aşıSİ?"), labels) == "aşıSİ?"


def test_words_and_letters_are_counted_each_by_itself() -> None:
    said = diacritics.recording("su şık ak", "a")
    wrong_in_one_letter = torch.zeros(9, len(diacritics.LABELS))
    wrong_in_one_letter[3, diacritics.LABELS.index("ş")] = 1  # its ı is left as it is typed: şik
    words, unsure, letters = diacritics.measure(Saying([wrong_in_one_letter]), [said])
    assert words.value == pytest.approx(100 * 2 / 3)
    assert words.items == 3
    assert (unsure.value, unsure.items) == (50, 2)  # su, şık
    assert (letters.value, letters.items) == (75, 4)  # s, u, ş, ı


def test_a_sentence_belongs_to_the_document_before_the_last_colon_of_its_name() -> None:
    text = "# sent_id = tr-blog:00000508:S043\n# text = Sus\u0327 .\n1\tSus\n"
    assert [tuple(each) for each in parse(text)] == [("Suş .", "tr-blog:00000508")]


def test_ratings_go_with_their_source_and_products_with_their_document() -> None:
    (row,) = rated_texts.parse("12_3\t-1.5\tIt &amp; the rest broke.", "product")
    assert row == ("It & the rest broke.", -1.5, "product", "amazon12")
    (row,) = rated_texts.parse("12\t2\tGood, GOOD!", "tweet")
    assert row.group == normalised("good good") == "good good"


def test_ratings_are_scored_by_source() -> None:
    rated = [Recording("a", float(r), name) for name in ("film", "tweet") for r in (-2, -1, 1, 2)]
    outputs = [torch.tensor([float(r)]) for r in (-2, -1, 1, 2, 2, 1, -1, 2)]
    film, film_sign, tweet, tweet_sign = sentiment.measure(Saying(outputs), rated)
    assert film.value == pytest.approx(1)
    assert (film_sign.value, tweet_sign.value) == (100, 25)
    assert tweet.value < 0


@needs_data
def test_the_vocabulary_is_what_the_codec_looks_up() -> None:
    spec = sentiment.vocabulary([Recording("Wonderful, wonderful! Splendid", 1.0)] * 9)
    assert {"wonderful", "splendid"} <= set(spec.symbols)
    assert spec.encode("WONDERFUL!! zzyzx").tolist() == [spec.numbers["wonderful"], spec.numbers[sentiment.UNKNOWN]]


def test_a_chorale_is_written_voice_by_voice_and_read_with_the_next_symbol_as_its_label() -> None:
    piece = chorale.recording(chorale.written(((72, 67, 0, 48),)), "a")
    assert piece.values == "START S72 A67 T- B48"
    assert [chorale.SYMBOLS[label] for label in np.asarray(piece.target)] == ["S72", "A67", "T-", "B48", "END"]
    assert chorale.move("S72 T- B48", -2) == "S70 T- B46"


def test_the_nats_of_a_frame_are_those_of_its_four_notes() -> None:
    piece = chorale.recording("S72 A67 T64 B48 S72 A67 T64 B48", "a")
    even = torch.zeros(9, len(chorale.SYMBOLS))
    (score,) = chorale.measure(Saying([even]), [piece])
    assert score.value == pytest.approx(4 * np.log(len(chorale.SYMBOLS)), rel=1e-5)
    assert score.items == 2


def group_of_rated(recording: Recording) -> str:
    """The document of a product review; of others the words."""
    (row,) = [row for row in rated_by_text()[str(recording.values)] if row.source == recording.name]
    return row.group


@cache
def rated_by_text() -> dict[str, list[RatedText]]:
    found = defaultdict[str, list[RatedText]](list)
    for row in rated_texts.rated_texts():
        found[row.text].append(row)
    return found


@needs_data
@pytest.mark.parametrize(
    ("split", "group_of"), [(diacritics.split, lambda r: r.name), (rated_texts.split, group_of_rated)]
)
def test_no_group_is_on_two_sides(split: Callable[[Run], Split], group_of: Callable[[Recording], str]) -> None:
    train, validation, test = ({group_of(r) for r in part} for part in split(Run(0)))
    assert not train & validation
    assert not train & test
    assert not validation & test


@needs_data
def test_the_turkish_sentences_are_split_by_document() -> None:
    assert len(sentences()) == 4_851
    assert [len(part) for part in diacritics.split(Run(0))] == [3_924, 319, 608]


@needs_data
def test_no_sentence_of_the_test_is_in_training() -> None:
    train, _, test = diacritics.split(Run(0))
    assert not {r.values for r in train} & {r.values for r in test}


def piece(name: str, soprano: Sequence[int], *, bass: int = 48) -> Chorale:
    return Chorale(name, tuple((note, 60, 55, bass) for note in soprano))


SCALE = (60, 62, 64, 65, 67, 69, 71, 72, 74, 76, 77, 79, 81, 83)
OTHER = (72, 71, 67, 69, 64, 65, 60, 59, 62, 57, 55, 60, 53, 52)


def test_a_tune_is_the_same_in_another_key_and_in_the_midst_of_a_piece() -> None:
    higher = [note + 5 for note in SCALE]
    assert (
        tunes(
            [
                piece("b", SCALE),
                piece("c", [*higher[:9], 80, 70]),  # begins alike
                piece("a", [70, 75, *higher[:-1], 60]),  # has thirteen of its notes
                piece("d", [70, 60, *higher[2:]]),  # has twelve
                piece("e", OTHER),
            ]
        )
        == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}
    )


def test_a_piece_is_the_same_in_another_key_but_not_in_another_setting() -> None:
    moved = tuple((s + 2, a + 2, t + 2, b + 2) for s, a, t, b in piece("a", SCALE).frames)
    windows = windows_of(piece("a", SCALE).frames)
    assert are_alike(windows, windows_of(moved))
    assert are_alike(windows, windows_of(moved[:11] + piece("a", OTHER).frames))
    assert not are_alike(windows, windows_of(moved[:9] + piece("a", OTHER).frames))
    assert not are_alike(windows, windows_of(piece("a", SCALE, bass=47).frames))


@needs_data
def test_no_stretch_of_a_tune_is_on_two_sides_in_whatever_key() -> None:
    def stretches(recording: Recording) -> set[tuple[int, ...]]:
        notes = [soprano for soprano, *_ in chorale.frames_of(str(recording.values)) if soprano]
        intervals = [int(step) for step in np.diff(notes) if step]
        return {tuple(intervals[i : i + 12]) for i in range(len(intervals) - 11)}

    train, validation, test = (set().union(*map(stretches, part)) for part in chorale.split(Run(0)))
    assert min(len(train), len(validation), len(test)) > 900
    assert not train & test
    assert not train & validation
    assert not validation & test


@needs_data
def test_every_note_of_a_moved_piece_is_a_symbol() -> None:
    low, high = np.random.default_rng(0), np.random.default_rng(1)
    for rng in (low, high):
        assert chorale.moved(chorale.split(Run(0)).train, rng)  # raises ValueError for a note that is none


@needs_data
def test_single_words_are_english_and_rated() -> None:
    words = {word.text: word.rating for word in rated_words()}
    assert words["good"] > 1.5
    assert words["awful"] < -1.5
    assert len(words) > 7_000

"""Which symbol a character or a word of a text is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.manifest import TextInput, UnknownSymbolError
from models.recurrent import NetworkSpec
from tests.support.bundles import manifest

WORDS = ("(unknown)", "film", "Film", "café", "don't", "c++", "c", "straße", "5%")


def words(**rules: Any) -> TextInput:
    return TextInput(unit="word", symbols=WORDS, **rules)


def names(spec: TextInput, text: str) -> list[str]:
    return [spec.symbols[number] for number in spec.encode(text)]


def test_a_word_is_what_white_space_separates() -> None:
    assert names(words(), "  film\tc++\r\n\u00a0Film\u2003café ") == ["film", "c++", "Film", "café"]
    assert names(words(), " \n") == []


@pytest.mark.parametrize(
    ("step", "symbol"),
    [
        ("film", "film"),
        ("Film", "Film"),  # as it is, before any other form
        ("FILM", "film"),
        ("“FILM!”", "film"),
        ("(film)...", "film"),
        ("Don't", "don't"),
        ("'don't'", "don't"),
        ("C++", "c++"),  # with its signs, before it is looked up without them
        ("C++,", "c"),  # all of them are left off, or none
        ("STRASSE", "(unknown)"),
        ("5%", "5%"),
        ("CAFÉ?", "café"),
        ("fi-lm", "(unknown)"),
        ("?!", "(unknown)"),
        ("🙂film🙂", "film"),
        ("(unknown)", "(unknown)"),
        ("film" + "!" * 60, "film"),
        ("film" + "!" * 61, "(unknown)"),  # longer than what is folded
    ],
)
def test_a_word_is_the_first_of_its_forms_that_is_a_symbol(step: str, symbol: str) -> None:
    assert names(words(unknown="(unknown)", fold_case=True), step) == [symbol]


def test_without_a_rule_only_the_symbols_themselves_are_known() -> None:
    assert names(words(unknown="(unknown)"), "FILM film film!") == ["(unknown)", "film", "(unknown)"]
    assert words().number_of("FILM") is None


def test_a_character_is_folded_but_punctuation_stays_what_it_is() -> None:
    spec = TextInput(symbols=tuple("aı.?"), unknown="?", fold_case=True)
    assert names(spec, "A.aI\n") == ["a", ".", "a", "?", "?"]


def test_what_is_unknown_is_refused_by_its_name_and_the_number_of_its_step() -> None:
    with pytest.raises(UnknownSymbolError, match=r"^'movie' at word 2 is none of the model's symbols$") as refusal:
        words(fold_case=True).encode("Film  FILM, movie")
    assert (refusal.value.symbol, refusal.value.place) == ("movie", 2)
    with pytest.raises(UnknownSymbolError, match=r"^'b' at character 1 is none of the model's symbols$"):
        TextInput(symbols=("a",)).encode("ab")


@given(text=st.text())
def test_with_a_symbol_for_the_unknown_any_text_is_taken_step_by_step(text: str) -> None:
    assert len(words(unknown="(unknown)", fold_case=True).encode(text)) == len(text.split())
    assert len(TextInput(symbols=("a", "?"), unknown="?", fold_case=True).encode(text)) == len(text)


@given(text=st.text(st.sampled_from("ab \n")), at_most=st.integers(1, 5))
def test_no_more_steps_are_told_apart_than_are_asked_for(text: str, at_most: int) -> None:
    steps = words().steps(text, at_most)
    assert len(steps) == min(len(text.split()), at_most + 1)
    assert list(steps[:at_most]) == text.split()[:at_most]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"symbols": ["a", "bc"]}, "symbols has 'bc', which is not one character"),
        ({"unit": "word", "symbols": ["a", "b c"]}, "symbols has 'b c', which is not one word"),
        ({"unit": "word", "symbols": ["a", " b"]}, "symbols has ' b', which is not one word"),
        ({"symbols": ["a"], "unknown": "b"}, "unknown is 'b', which is none of symbols"),
        ({"symbols": ["a", "a"]}, "'a' is there more than once"),
        ({"symbols": ["a", ""]}, "at least 1 character"),
        ({"unit": "line", "symbols": ["a"]}, "'character' or 'word'"),
    ],
)
def test_symbols_that_no_text_can_have_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TextInput.model_validate(fields)


def test_the_padding_behind_a_text_is_one_of_its_symbols() -> None:
    spec = words(padding="c++")
    assert [spec.symbols[number] for number in spec.behind_the_end(2).tolist()] == ["c++", "c++"]
    with pytest.raises(ValidationError, match="padding is 'rust', which is none of symbols"):
        words(padding="rust")


@pytest.mark.parametrize(("padding", "look_ahead"), [(None, 1), ("film", 0)])
def test_a_text_model_has_a_padding_if_it_looks_ahead_and_only_then(padding: str | None, look_ahead: int) -> None:
    spec = NetworkSpec(cell="tanh", symbols=len(WORDS), embedding_size=2, hidden_size=2, outputs=2)
    with pytest.raises(ValidationError, match=r"input\.padding of a text model goes with look_ahead"):
        manifest("text", spec, words(padding=padding), look_ahead=look_ahead)

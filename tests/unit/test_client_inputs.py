"""What the command line reads from files, and what it draws."""

import dataclasses
import io
import os
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rnnserve import Answer, Hypothesis, Model, Prediction
from rnnserve.cli.inputs import Recording, at_rate, not_empty, opened, read_sequences, read_steps, write_sample
from rnnserve.cli.live import StreamView, sparkline
from rnnserve.cli.outcome import BadInput
from rnnserve.cli.show import answer_json, answer_line, prediction_json, prediction_text
from rnnserve.models import model_from
from rnnserve.v1 import model_service_pb2 as pb
from rnnserve.v1.tensor_pb2 import TEXT_UNIT_CHARACTER, TEXT_UNIT_WORD

NUMERIC = model_from(pb.Model(name="pump", features=["speed", "heat"], labels=["good", "bad"]))
TEXT = model_from(pb.Model(name="text", symbols=list("ab "), text_unit=TEXT_UNIT_CHARACTER, symbol_count=3))
WORDS = model_from(pb.Model(name="words", symbols=["so"], text_unit=TEXT_UNIT_WORD, symbol_count=8_000))


def steps(text: str, model: Model = NUMERIC) -> list[object]:
    return [step for _, step in read_steps(io.StringIO(text), model, "steps.csv")]


def sequences(file: Path, model: Model) -> list[object]:
    return [each.value if isinstance(each.value, str) else each.value.tolist() for each in read_sequences(file, model)]


def test_csv_may_have_a_header_or_none() -> None:
    assert steps("1,2\n3,4.5\n") == steps("speed,heat\n1,2\n3,4.5\n") == [[1.0, 2.0], [3.0, 4.5]]


def test_a_header_may_name_the_columns_in_any_order_and_more_of_them() -> None:
    assert steps('time,heat,"speed"\n0,2,1\n') == [[1.0, 2.0]]


def test_a_header_may_stand_behind_blank_lines_and_have_blanks() -> None:
    assert steps("\nspeed, heat\n1, 2\n") == [[1.0, 2.0]]


def test_a_file_that_a_spreadsheet_wrote_is_read(tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    file.write_bytes(b"\xef\xbb\xbfspeed,heat\r\n1,2\r\n")
    with opened(str(file)) as lines:
        assert list(read_steps(lines, NUMERIC, "steps.csv")) == [(2, [1.0, 2.0])]
    assert sequences(file, NUMERIC) == [[[1.0, 2.0]]]


def test_json_lines_are_arrays_or_objects_by_feature() -> None:
    assert steps('[1, 2]\n{"heat": 4, "speed": 3, "time": 0}\n') == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("line", ["1,\n", "1,nan\n", "[1, null]\n", '{"speed": 1}\n'])
def test_a_missing_value_is_nan(line: str) -> None:
    np.testing.assert_array_equal(steps(line), [[1.0, np.nan]])


def test_blank_lines_are_no_steps() -> None:
    assert steps("\n1,2\n\n") == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1,2\n1,2,3\n", "line 2: 3 values, but pump reads 2"),
        ("time,heat,speed\n1,2\n", "line 2: 2 values, but the header has 3"),
        ("heat,speed\n1,2\n1,2,3\n", "line 3: 3 values, but the header has 2"),
        ("1,2\n1,1e300\n", "line 2: 1e300 does not fit float32"),
        ("1,2\n[1, -1e400]\n", "line 2: -inf does not fit float32"),
        (f"[1, {10**400}]\n", "line 1: 10{39} does not fit float32"),
        ("1,2\n1,x\n", "line 2: not all of these are numbers"),
        ("speed,cold\n", "line 1: the header has no column 'heat'"),
        ("1,2\n[1, 2\n", "line 2: no JSON"),
        ('{"sped": 1}\n', "line 1: none of these is a feature; pump reads speed, heat"),
    ],
)
def test_a_bad_line_is_named(text: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=f"^steps.csv, {complaint}"):
        steps(text)


def test_the_largest_number_of_float32_fits() -> None:
    assert steps(f"1,{np.finfo(np.float32).max!s}\n") == [[1.0, 3.4028235e38]]


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    file = tmp_path / "steps.csv"
    file.write_bytes(b"\xff\xfe")
    with opened(str(file)) as lines, pytest.raises(BadInput, match=r"steps\.csv is not UTF-8 text"):
        list(read_steps(lines, NUMERIC, str(file)))
    with pytest.raises(BadInput, match=r"steps\.csv is not UTF-8 text"):
        read_sequences(file, NUMERIC)


@pytest.mark.parametrize("text", ["", "\n", "speed,heat\n"])
def test_a_file_without_a_step_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "steps.csv"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"steps\.csv holds no step"):
        not_empty(read_steps(io.StringIO(text), NUMERIC, "steps.csv"), "steps.csv")
    with pytest.raises(BadInput, match=r"steps\.csv holds no step"):
        read_sequences(file, NUMERIC)


def test_lines_without_a_text_are_refused_by_file(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n")
    with pytest.raises(BadInput, match=r"texts\.jsonl holds no step"):
        read_sequences(file, TEXT)


def test_looking_for_the_first_step_loses_none_and_reads_no_other() -> None:
    found = not_empty(read_steps(iter(["1,2", "3,4", "broken"]), NUMERIC, "steps.csv"), "steps.csv")
    assert [next(found), next(found)] == [(1, [1.0, 2.0]), (2, [3.0, 4.0])]


def test_each_step_knows_its_line() -> None:
    located = read_steps(io.StringIO("speed,heat\n1,2\n\n[3, 4]\n"), NUMERIC, "steps.csv")
    assert [line for line, _ in located] == [2, 4]
    assert list(read_steps(io.StringIO("ab\na"), TEXT, "a.txt")) == [(1, "a"), (1, "b"), (2, "a")]


def test_the_place_of_a_step_is_its_file_and_its_line(tmp_path: Path) -> None:
    table, lines, text = tmp_path / "a.csv", tmp_path / "b.jsonl", tmp_path / "c.txt"
    table.write_text("speed,heat\n1,2\n3,4\n")
    lines.write_text("[[1, 2], [3, 4]]\n[[5, 6]]\n")
    text.write_text("a\nb\n")
    (of_table,), (_, second_line), (of_text,) = (
        read_sequences(table, NUMERIC),
        read_sequences(lines, NUMERIC),
        read_sequences(text, TEXT),
    )
    assert (of_table.place(1), of_table.place(None)) == (f"{table}, line 3", str(table))
    assert (second_line.place(0), second_line.place(None)) == (f"{lines}, line 2", f"{lines}, line 2")
    assert of_text.place(1) == f"{text}, line 2"


def test_the_place_of_a_step_of_a_given_text_is_the_beginning_of_the_text() -> None:
    assert (Recording.given("hello").place(1), Recording.given("hello").place(None)) == ("'hello'", "'hello'")
    assert Recording.given("a" * 1_000).place(500) == repr("a" * 40)


def test_steps_are_read_only_as_far_as_they_are_asked_for() -> None:
    first = next(iter(read_steps(iter(["1,2", "broken"]), NUMERIC, "steps.csv")))
    assert first == (1, [1.0, 2.0])


def test_text_is_a_character_a_step_without_line_ends_that_the_model_does_not_know() -> None:
    assert steps("ab\r\n a\n", TEXT) == ["a", "b", " ", "a"]


def test_words_are_steps_with_their_lines() -> None:
    located = read_steps(io.StringIO(" so they\r\n\nsay it"), WORDS, "words.txt")
    assert list(located) == [(1, "so"), (1, "they"), (3, "say"), (3, "it")]


@pytest.mark.parametrize(("model", "first"), [(WORDS, ["so", "they"]), (TEXT, list("so they "))])
def test_steps_of_a_text_are_there_before_its_line_ends(model: Model, first: list[str]) -> None:
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as lines, open(writing, "w", encoding="utf-8", buffering=1) as typed:
        located = read_steps(lines, model, "standard input")
        typed.write("so they ")
        typed.flush()
        assert [next(located) for _ in first] == [(1, step) for step in first]


def test_a_file_of_words_is_one_sequence_in_which_each_word_knows_its_line(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("so they\nsay\n")
    (recording,) = read_sequences(file, WORDS)
    assert (recording.value, recording.place(2)) == ("so they say", f"{file}, line 2")


def test_a_file_of_steps_is_one_sequence_and_lines_of_sequences_are_many(tmp_path: Path) -> None:
    one, many = tmp_path / "one.csv", tmp_path / "many.jsonl"
    one.write_text("speed,heat\n1,2\n3,4\n")
    many.write_text("[[1, 2], [3, 4]]\n[[5, 6]]\n")
    assert sequences(one, NUMERIC) == [[[1, 2], [3, 4]]]
    assert sequences(many, NUMERIC) == [[[1, 2], [3, 4]], [[5, 6]]]


def test_a_file_of_json_steps_is_one_sequence(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text("[1, 2]\n[3, 4]\n")
    assert sequences(file, NUMERIC) == [[[1, 2], [3, 4]]]


def test_texts_are_a_file_each_or_json_lines_of_many(tmp_path: Path) -> None:
    one, many = tmp_path / "one.txt", tmp_path / "many.jsonl"
    one.write_text("ab\n")
    many.write_text('"ab"\n"a"\n')
    assert sequences(one, TEXT) == ["ab"]
    assert sequences(many, TEXT) == ["ab", "a"]


def test_a_sample_that_was_written_is_read_the_same(tmp_path: Path) -> None:
    recording = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    file = write_sample(recording, NUMERIC, tmp_path, "first")
    (again,) = read_sequences(file, NUMERIC)
    np.testing.assert_array_equal(np.asarray(again.value), recording)


def test_a_sample_is_written_into_its_folder_whatever_its_name(tmp_path: Path) -> None:
    assert write_sample("ab", TEXT, tmp_path, "../../evil").parent == tmp_path


def test_steps_at_a_rate_keep_their_order() -> None:
    assert list(at_rate(["a", "b"], 1000.0)) == ["a", "b"]


def test_a_sparkline_rises_from_blank_to_full() -> None:
    assert sparkline(np.array([-1.0, 0.0, 0.5, 1.0, 2.0], np.float32), 0.0, 1.0) == "  ▄██"


def test_the_view_names_the_step_and_each_label_with_its_probability() -> None:
    view = StreamView(NUMERIC, "pump: [title]")
    screen = Console(file=io.StringIO(), width=100)
    screen.print(view)
    values = np.array([0.25, 0.75], np.float32)
    view.show(Answer(step=3, output=values, label="bad", probabilities=values, top=()), values)
    screen.print(view)
    drawn = screen.file.getvalue()  # type: ignore[attr-defined]
    for part in ("pump: [title]", "waiting for the first step", "step 3 · bad", "good", "0.25", "0.75"):
        assert part in drawn


def test_a_dash_stands_where_the_model_is_not_sure_enough() -> None:
    even = np.array([0.5, 0.5], np.float32)
    answer = Answer(step=3, output=even, label=None, probabilities=even, top=())
    view, screen = StreamView(NUMERIC, "pump"), io.StringIO()
    view.show(answer, even)
    Console(file=screen, width=100).print(view)
    assert "step 3 · —" in screen.getvalue()
    assert answer_line(answer, even) == "3\t—\t0.500"
    assert answer_json(answer, NUMERIC)["label"] is None
    several = Prediction(np.stack([even, even]), (None, "bad"), np.stack([even, even]), ())
    assert prediction_text(several, NUMERIC, even) == "— bad"
    assert prediction_json(several, NUMERIC, even)["labels"] == [None, "bad"]


def test_labels_become_the_text_that_they_mean_where_a_model_rewrites_what_it_reads() -> None:
    model = dataclasses.replace(TEXT, labels=("=", "ç", "ğ"), rewrites={"c": "ç", "g": "ğ"})
    labels = ("ç", "=", None, "ğ", "ç")
    prediction = Prediction(np.zeros((5, 3), np.float32), labels, np.full((5, 3), 1 / 3, np.float32), ())
    assert prediction_text(prediction, model, "ccc g") == "çcc ğ"
    assert prediction_json(prediction, model, "ccc g")["text"] == "çcc ğ"
    with pytest.raises(ValueError, match="zip"):
        model.rewritten("ccc", labels)


def test_a_model_without_labels_says_its_numbers() -> None:
    numbers = np.array([1.0, 2.5], np.float32)
    assert answer_line(Answer(step=3, output=numbers, label=None, probabilities=None, top=()), numbers) == "3\t1 2.5"


def test_an_answer_about_a_word_stands_beside_the_word() -> None:
    numbers = np.array([2.5], np.float32)
    answer = Answer(step=3, output=numbers, label=None, probabilities=None, top=())
    view, screen = StreamView(TEXT, "words"), io.StringIO()
    view.show(answer, "film")
    Console(file=screen, width=100).print(view)
    assert "step 3 · film" in screen.getvalue()
    assert answer_line(answer, "film") == "3\tfilm\t2.5"


def test_an_encoder_decoders_hypotheses_are_a_line_each_and_an_object_each_for_scripts() -> None:
    hypotheses = (Hypothesis(("HH", "AH0"), -0.25, None), Hypothesis((), -1.5, None, is_cut=True))
    prediction = Prediction(np.zeros((0, 0), np.float32), ("HH", "AH0"), None, (), hypotheses)
    assert prediction_text(prediction, TEXT, "ah") == "HH AH0\t-0.250\n\t-1.500"
    assert prediction_json(prediction, TEXT, "ah") == {
        "text": None,
        "label": None,
        "labels": ["HH", "AH0"],
        "outputs": [],
        "probabilities": None,
        "hypotheses": [
            {"labels": ["HH", "AH0"], "score": -0.25, "is_cut": False},
            {"labels": [], "score": -1.5, "is_cut": True},
        ],
    }


def test_attention_is_a_row_for_each_label_and_darker_where_a_step_was_looked_at_more() -> None:
    weights = np.array([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]], np.float32)
    hypothesis = Hypothesis(("F", "AH0"), -0.25, weights)
    prediction = Prediction(np.zeros((0, 0), np.float32), ("F", "AH0"), None, (), (hypothesis,))
    of_letters = prediction_text(prediction, TEXT, "gha")
    assert of_letters.splitlines() == ["F AH0\t-0.250", "    g h a", "  F   ░ ▓", "AH0 █"]
    of_words = prediction_text(prediction, WORDS, "no i do")
    assert of_words.splitlines()[1:] == ["    no i do", "  F    ░ ▓▓", "AH0 ██"]
    of_numbers = prediction_text(prediction, NUMERIC, np.zeros((3, 2), np.float32))
    assert of_numbers.splitlines()[1] == "    0 1 2"
    assert prediction_json(prediction, TEXT, "gha")["hypotheses"][0]["attention"] == weights.tolist()

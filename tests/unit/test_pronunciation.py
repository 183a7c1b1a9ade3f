import numpy as np
import pytest

from models.tasks.pronouncing_dictionary import LABELS, parse_line, pronunciations
from models.tasks.pronunciation import edit_distance, split
from models.tasks.task import Run

needs_data = pytest.mark.data


def test_a_line_loses_its_variant_its_comment_and_its_stress() -> None:
    word, spoken = parse_line("read(2) R EH1 D # past tense")
    assert word == "read"
    assert [LABELS[label] for label in spoken] == ["R", "EH", "D"]


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
)
def test_an_edit_is_an_insertion_a_deletion_or_a_substitution(a: str, b: str, distance: int) -> None:
    assert edit_distance([*map(ord, a)], [*map(ord, b)]) == distance


@needs_data
def test_all_ways_to_say_a_word_are_on_one_side_of_the_split() -> None:
    train, validation, test = ({r.name for r in part} for part in split(Run(0)))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert (len(train), len(validation), len(test)) == (116_089, 2_565, 6_272)


@needs_data
def test_no_pronunciation_is_there_twice_and_each_ends_with_the_end() -> None:
    assert all(len(set(spoken)) == len(spoken) for spoken in pronunciations().values())
    assert all(
        r.target[-1] == 0 and 0 not in r.target[:-1] for r in split(Run(0)).test if isinstance(r.target, np.ndarray)
    )

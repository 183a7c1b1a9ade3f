import numpy as np

from service.engine.states import INITIAL_ROWS, StateArray


def test_a_state_begins_with_the_values_it_is_given_and_is_alone_with_its_row() -> None:
    states = StateArray(2)
    one, other = states.add(np.array([1, 2], np.float32)), states.add(np.array([3, 4], np.float32))
    one.row[:] = 7
    assert (one.row.tolist(), other.row.tolist()) == ([7, 7], [3, 4])


def test_a_copy_goes_its_own_way() -> None:
    state = StateArray(1).add(np.array([1], np.float32))
    copy = state.copy()
    copy.row[:] = 2
    assert (state.row.tolist(), copy.row.tolist()) == ([1], [2])


def test_more_states_than_there_is_room_for_make_room_and_keep_their_values() -> None:
    states = StateArray(1)
    kept = [states.add(np.array([number], np.float32)) for number in range(3 * INITIAL_ROWS)]
    assert [float(state.row[0]) for state in kept] == list(range(3 * INITIAL_ROWS))
    assert len({state.place for state in kept}) == len(kept)


def test_the_row_of_a_state_that_nobody_has_any_more_is_used_again() -> None:
    states = StateArray(1)
    zero = np.zeros(1, np.float32)
    for _ in range(10 * INITIAL_ROWS):
        states.add(zero)
    assert len(states.rows) == INITIAL_ROWS

from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from models.recurrent import Cell, NetworkSpec, RecurrentNetwork, RecurrentStack, Values
from models.state import StateLayout, initial_state, pack_state, unpack_state
from tests.support.reference import NumpyNetwork, assert_close, torch_module

CELLS: tuple[Cell, ...] = get_args(Cell)
WIDTH, HIDDEN = 3, 5
LENGTHS = torch.tensor([4, 7, 1])
cells = pytest.mark.parametrize("cell", CELLS)
cells_and_directions = pytest.mark.parametrize(
    ("cell", "direction"), [(cell, direction) for cell in CELLS for direction in ("forward", "bidirectional")]
)


def make_spec(cell: Cell, **rest: Any) -> NetworkSpec:
    return NetworkSpec.model_validate({"cell": cell, "features": WIDTH, "hidden_size": HIDDEN, "outputs": 2} | rest)


def seeded(spec: NetworkSpec, seed: int = 0) -> RecurrentNetwork:
    torch.manual_seed(seed)
    return RecurrentNetwork(spec).eval()


def padded(lengths: Tensor = LENGTHS, *, fill: float = 0.0, seed: int = 1) -> Tensor:
    """Random sequences with `fill` behind their ends."""
    torch.manual_seed(seed)
    sequences = torch.randn(len(lengths), int(lengths.max()), WIDTH)
    return torch.where(live(lengths).unsqueeze(-1), sequences, fill)


def live(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max())) < lengths.unsqueeze(1)


def zero_values(spec: NetworkSpec, batch: int) -> list[Values]:
    return [
        tuple(value.double() for value in values)
        for values in unpack_state(initial_state(batch, spec.state_layout), spec.state_layout)
    ]


def gradients(outputs: Tensor, inputs: Tensor, module: torch.nn.Module) -> dict[str, Tensor]:
    """Of a sum that weighs every live output differently."""
    torch.manual_seed(2)
    weighed = (outputs * torch.randn_like(outputs) * live(LENGTHS).unsqueeze(-1)).sum()
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(weighed, [inputs, *parameters])
    return dict(zip(["inputs", *names], found, strict=True))


@cells_and_directions
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_torch_state_dict_loads_unchanged_and_gives_the_same_outputs_and_gradients(
    cell: Cell, direction: str, layers: int
) -> None:
    torch.manual_seed(0)
    module = torch_module(cell, WIDTH, HIDDEN, layers=layers, bidirectional=direction == "bidirectional").double()
    spec = make_spec(cell, direction=direction, layers=layers)
    stack = RecurrentStack(spec, WIDTH).double()
    stack.load_state_dict(module.state_dict())
    inputs = padded().double().requires_grad_()

    packed = pack_padded_sequence(inputs, LENGTHS, batch_first=True, enforce_sorted=False)
    wanted, _ = pad_packed_sequence(module(packed)[0], batch_first=True)
    found, _ = stack(inputs, LENGTHS, zero_values(spec, len(LENGTHS)))

    torch.testing.assert_close(found[live(LENGTHS)], wanted[live(LENGTHS)], rtol=1e-10, atol=1e-12)
    wanted_gradients = gradients(wanted, inputs, module)
    found_gradients = gradients(found, inputs, stack)
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@cells
@pytest.mark.parametrize("layers", [1, 3])
def test_the_final_state_is_that_of_torch(cell: Cell, layers: int) -> None:
    torch.manual_seed(0)
    module = torch_module(cell, WIDTH, HIDDEN, layers=layers)
    network = seeded(make_spec(cell, layers=layers))
    network.recurrent.load_state_dict(module.state_dict())
    packed = pack_padded_sequence(padded(), LENGTHS, batch_first=True, enforce_sorted=False)
    final = module(packed)[1]
    values = final if cell == "lstm" else (final,)
    wanted = torch.stack(values, dim=2).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(network(padded(), LENGTHS)[1], wanted)


def test_the_vanilla_cell_is_the_two_equations_of_the_course() -> None:
    network = seeded(make_spec("tanh"))
    weights = {name: value.numpy().astype(float) for name, value in network.state_dict().items()}
    w_aa, w_ax = weights["recurrent.weight_hh_l0"], weights["recurrent.weight_ih_l0"]
    b_a = weights["recurrent.bias_ih_l0"] + weights["recurrent.bias_hh_l0"]
    w_ya, b_y = weights["output.weight"], weights["output.bias"]
    inputs = padded(torch.tensor([6]))

    a, wanted = np.zeros(HIDDEN), []
    for x in inputs[0].numpy():
        a = np.tanh(w_aa @ a + w_ax @ x + b_a)
        z = w_ya @ a + b_y
        wanted.append(np.exp(z) / np.exp(z).sum())

    outputs, state = network(inputs, torch.tensor([6]))
    assert_close(torch.softmax(outputs[0], dim=-1).detach().numpy(), np.array(wanted), 1e-6)
    assert_close(state[0].detach().numpy(), a, 1e-6)


@cells
def test_a_bidirectional_layer_is_a_forward_pass_beside_a_reversed_backward_pass(cell: Cell) -> None:
    both = seeded(make_spec(cell, direction="bidirectional"))
    parameters = both.recurrent.state_dict()
    halves = {}
    for suffix in ("l0", "l0_reverse"):
        halves[suffix] = seeded(make_spec(cell)).recurrent
        one_way = {name.removesuffix("_reverse"): w for name, w in parameters.items() if name.endswith(suffix)}
        halves[suffix].load_state_dict(one_way)
    start = unpack_state(initial_state(1, make_spec(cell).state_layout), make_spec(cell).state_layout)
    inputs = padded()
    found, _ = both.recurrent(
        inputs, LENGTHS, unpack_state(initial_state(3, both.spec.state_layout), both.spec.state_layout)
    )
    for row, length in enumerate(LENGTHS.tolist()):
        sequence, steps = inputs[row : row + 1, :length], torch.tensor([length])
        forward, _ = halves["l0"](sequence, steps, start)
        backward, _ = halves["l0_reverse"](sequence.flip(1), steps, start)
        torch.testing.assert_close(found[row, :length], torch.cat([forward, backward.flip(1)], dim=-1)[0])


DEEP = {"layers": 2, "input_layers": (6, 4), "transition_layers": 3, "output_layers": (7, 3)}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep input": {"input_layers": (6, 4)},
    "deep transition": {"transition_layers": 3},
    "deep output": {"output_layers": (7, 3)},
    "deep everywhere": DEEP,
    "deep both ways": DEEP | {"direction": "bidirectional"},
    "mean of both ways": {"direction": "bidirectional", "readout": "mean", "transition_layers": 2},
    "symbols": DEEP | {"features": None, "symbols": 4, "embedding_size": 3},
}


@cells
@pytest.mark.parametrize("shape", SHAPES)
def test_every_network_equals_the_equations_in_numpy(cell: Cell, shape: str) -> None:
    network = seeded(make_spec(cell, **SHAPES[shape]))
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    reference = NumpyNetwork(network.spec.model_dump(), weights)
    inputs = torch.randint(4, (3, 7)) if network.spec.symbols else padded()
    with torch.inference_mode():
        outputs = network(inputs, LENGTHS)[0].numpy()
    for row, length in enumerate(LENGTHS.tolist()):
        found = outputs[row : row + 1] if network.spec.readout == "mean" else outputs[row, :length]
        assert_close(found, reference.run(inputs[row, :length].numpy()))


@cells_and_directions
@pytest.mark.parametrize("readout", ["each_step", "mean"])
def test_neither_padding_nor_neighbours_change_an_output(cell: Cell, direction: str, readout: str) -> None:
    network = seeded(make_spec(cell, **DEEP | {"direction": direction, "readout": readout}))
    inputs = padded(fill=1e6)
    together, states = network(inputs, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone, state = network(inputs[row : row + 1, :length], LENGTHS[row : row + 1])
        found = together[row : row + 1] if readout == "mean" else together[row : row + 1, :length]
        torch.testing.assert_close(found, alone)
        torch.testing.assert_close(states[row : row + 1], state)


@cells
@pytest.mark.parametrize("cut", [1, 3])
def test_a_sequence_in_two_pieces_with_the_state_handed_over_equals_one_piece(cell: Cell, cut: int) -> None:
    network = seeded(make_spec(cell, **DEEP))
    inputs, lengths = padded(torch.tensor([5, 5])), torch.tensor([5, 5])
    whole, final = network(inputs, lengths)
    first, between = network(inputs[:, :cut], torch.tensor([cut, cut]))
    second, after = network(inputs[:, cut:], lengths - cut, between)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(after, final)


def test_dropout_acts_in_training_only() -> None:
    spec = make_spec("gru", layers=2)
    torch.manual_seed(0)
    network = RecurrentNetwork(spec, dropout=0.5)
    plain = RecurrentNetwork(spec)
    plain.load_state_dict(network.state_dict())
    assert not torch.equal(network(padded(), LENGTHS)[0], plain(padded(), LENGTHS)[0])
    assert torch.equal(network.eval()(padded(), LENGTHS)[0], plain(padded(), LENGTHS)[0])


layouts = st.builds(StateLayout, st.integers(1, 4), st.integers(1, 2), st.integers(1, 6))


@given(layout=layouts, batch=st.integers(1, 4))
def test_pack_and_unpack_are_inverse(layout: StateLayout, batch: int) -> None:
    row = torch.arange(batch * layout.size, dtype=torch.float32).reshape(batch, layout.size)
    values = unpack_state(row, layout)
    assert len(values) == layout.layers
    assert all(len(layer) == layout.values_per_layer for layer in values)
    assert all(value.shape == (batch, layout.hidden_size) for layer in values for value in layer)
    assert torch.equal(pack_state(values), row)


@pytest.mark.parametrize(("cell", "size"), [("tanh", 10), ("relu", 10), ("gru", 10), ("lstm", 20)])
def test_a_state_holds_what_the_cell_remembers_of_each_layer(cell: Cell, size: int) -> None:
    assert make_spec(cell, layers=2, transition_layers=3).state_layout.size == size


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ({"features": None}, "either features or symbols"),
        ({"symbols": 4, "embedding_size": 2}, "either features or symbols"),
        ({"features": None, "symbols": 4}, "embedding_size goes with symbols"),
        ({"embedding_size": 2}, "embedding_size goes with symbols"),
        ({"layers": 0}, "layers"),
        ({"transition_layers": 17}, "transition_layers"),
        ({"hidden_size": 0}, "hidden_size"),
    ],
)
def test_a_spec_that_makes_no_network_is_refused(rest: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_spec("tanh", **rest)


@pytest.mark.parametrize(
    ("rest", "reason"),
    [({}, None), ({"direction": "bidirectional"}, "both ends"), ({"readout": "mean"}, "mean over all steps")],
)
def test_only_a_forward_network_with_an_answer_at_each_step_streams(rest: dict[str, Any], reason: str | None) -> None:
    spec = make_spec("tanh", **rest)
    assert spec.streamable == (reason is None)
    assert (reason or "") in (spec.why_not_streamable or "")

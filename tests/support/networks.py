"""Random networks for property tests: every cell, depth in each block, numbers or symbols."""

from pathlib import Path
from typing import get_args

from hypothesis import strategies as st

from models.bundle import Bundle
from models.manifest import FeatureInput, Pattern, TextInput
from models.recurrent import Cell, Direction, NetworkSpec, Readout
from tests.support.bundles import features, manifest, write_bundle

SYMBOLS = tuple("abcdefghi")

sizes = st.integers(1, 6)
widths = st.lists(sizes, max_size=2).map(tuple)
numeric_specs = st.builds(
    NetworkSpec,
    cell=st.sampled_from(get_args(Cell)),
    features=st.integers(1, 4),
    hidden_size=sizes,
    layers=st.integers(1, 3),
    input_layers=widths,
    transition_layers=st.integers(1, 3),
    output_layers=widths,
    outputs=st.integers(1, 4),
)
"""Forward, an answer at each step."""
specs = numeric_specs | numeric_specs.map(
    lambda spec: spec.model_copy(update={"features": None, "symbols": len(SYMBOLS), "embedding_size": spec.features})
)
"""The same, and of symbols."""
whole_sequence_specs = st.builds(
    lambda spec, direction, readout: spec.model_copy(update={"direction": direction, "readout": readout}),
    specs,
    st.sampled_from(get_args(Direction)),
    st.sampled_from(get_args(Readout)),
)
"""Those, and networks that need the whole sequence."""
look_aheads = st.sampled_from([0, 0, 1, 2, 5])
rules = st.sampled_from(["refuse", "hold_last", "mean"])
"""For missing values."""
seeds = st.integers(0, 2**32 - 1)


def random_bundle(
    folder: str, spec: NetworkSpec, rule: str, seed: int, scale: float = 1.0, look_ahead: int = 0
) -> Bundle:
    """Of random weights, multiplied by `scale`."""
    inputs: FeatureInput | TextInput = (
        features(spec.features or 0, missing_values=rule)
        if spec.features
        else (TextInput(symbols=SYMBOLS, padding=SYMBOLS[-1] if look_ahead else None))
    )
    pattern: Pattern = "many-to-many aligned" if spec.readout == "each_step" else "many-to-one"
    described = manifest("random", spec, inputs, pattern=pattern, look_ahead=look_ahead)
    return write_bundle(Path(folder), described, seed=seed, scale=scale)

"""From the values that a user sends to the outputs of a network; training, evaluation and serving all go this way."""

from __future__ import annotations

import torch
from torch import Tensor

from models.manifest import FeatureInput, TextInput
from models.recurrent import RecurrentNetwork


class Predictor:
    """A network with its inputs' normalisation and rule for missing values.

    Values are (…, features) float32, NaN where one is missing, or the numbers of symbols (…,) int64.
    The state of a session is one row of `row_size` float32: the network's state, then, where missing values
    hold the last one, that one for each feature (normalised, so that the mean, 0, stands in at first).

    With a look-ahead the network's output at a step is about the step so many before it. Whole sequences are read with
    as many steps of padding behind them, so that there is an answer about each of their own.
    """

    def __init__(self, network: RecurrentNetwork, input_spec: FeatureInput | TextInput, *, look_ahead: int = 0) -> None:
        self.network, self.input_spec = network, input_spec
        self.look_ahead = look_ahead
        self.padding = torch.from_numpy(input_spec.behind_the_end(look_ahead))
        self._is_numeric = isinstance(input_spec, FeatureInput)
        self._refuses = isinstance(input_spec, FeatureInput) and input_spec.missing_values == "refuse"
        self._holds_last = isinstance(input_spec, FeatureInput) and input_spec.missing_values == "hold_last"
        if isinstance(input_spec, FeatureInput):
            self._mean, self._std = torch.tensor(input_spec.mean), torch.tensor(input_spec.std)
        self._state_size = network.spec.state_layout.size
        self.row_size = self._state_size + (network.spec.features or 0) * self._holds_last

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""
        self.network.to(device)
        self.padding = self.padding.to(device)
        if self._is_numeric:
            self._mean, self._std = self._mean.to(device), self._std.to(device)

    def normalised(self, values: Tensor, last: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step as the network sees it, and the last numbers where missing values hold them.

        values (batch, features) or (batch,), last (batch, features): the last numbers before it, of no use else.
        """
        if not self._is_numeric:
            return values, ()
        inputs = (values - self._mean) / self._std
        if self._holds_last:
            inputs = torch.where(inputs.isnan(), last, inputs)
            return inputs, (inputs,)
        return inputs if self._refuses else self._fill_with_mean(inputs), ()

    def run(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Whole sequences padded to the longest, from the initial state.

        values (batch, steps, features) or (batch, steps), lengths (batch,)
        -> (batch, steps, outputs), or (batch, outputs) where the network answers about the whole sequence only.
        """
        if self.look_ahead:
            return self._outputs(*self._padded(values, lengths))[:, self.look_ahead :]
        return self._outputs(values, lengths)

    def _padded(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Longer by the look-ahead, with padding behind the end of each sequence."""
        longer = torch.cat([values, values.new_zeros(len(values), self.look_ahead, *values.shape[2:])], dim=1)
        places = lengths.unsqueeze(1) + torch.arange(self.look_ahead, device=lengths.device)
        longer[torch.arange(len(values), device=lengths.device).unsqueeze(1), places] = self.padding
        return longer, lengths + self.look_ahead

    def _outputs(self, values: Tensor, lengths: Tensor) -> Tensor:
        inputs = self._normalise(values)
        if self._holds_last:
            inputs = hold_last(inputs)
        outputs: Tensor = self.network(self._fill_with_mean(inputs), lengths)[0]
        return outputs

    def read(self, values: Tensor) -> Tensor:
        """One whole sequence (steps, features) or (steps,) -> what the first recurrent layer sees.

        (steps + look_ahead, width): the padding behind it, too.
        """
        return self.read_on(torch.cat([values, self.padding]) if self.look_ahead else values, None)[0]

    def read_on(self, values: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The next steps of a sequence that is read in parts, and what to give with those after them.

        Behind the last ones belongs `padding`.
        `last` (features,) are the last numbers before it, where missing values hold them; None at first.
        """
        inputs = self._normalise(values)
        if self._holds_last:
            before = torch.zeros_like(inputs[:1]) if last is None else last.unsqueeze(0)
            inputs = hold_last(torch.cat([before, inputs]).unsqueeze(0)).squeeze(0)[1:]
            last = inputs[-1]
        return self.network.read(self._fill_with_mean(inputs)), last

    def answer(self, hidden: Tensor) -> Tensor:
        """What the last recurrent layer gave for one (steps, hidden * directions) -> (steps, outputs).

        (1, outputs) where the network answers about the whole sequence only.
        """
        if self.network.spec.readout == "mean":
            hidden = hidden.mean(dim=0, keepdim=True)
        return self.network.answer(hidden)

    def _normalise(self, values: Tensor) -> Tensor:
        return (values - self._mean) / self._std if self._is_numeric else values

    def _fill_with_mean(self, inputs: Tensor) -> Tensor:
        return torch.where(inputs.isnan(), 0.0, inputs) if self._is_numeric else inputs


def hold_last(inputs: Tensor) -> Tensor:
    """(batch, steps, features): put each feature's last number, 0 at first, in place of NaN."""
    t = torch.arange(inputs.shape[1]).view(1, -1, 1).expand_as(inputs)
    last_t = torch.where(inputs.isnan(), -1, t).cummax(dim=1).values
    held = inputs.gather(1, last_t.clamp(min=0))
    return torch.where(last_t < 0, 0.0, held)

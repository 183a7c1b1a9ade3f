"""What a bundle says of how its network writes: each symbol is drawn from the last answer, and read next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from models.recurrent import NetworkSpec

Symbol = Annotated[str, StringConstraints(min_length=1)]


class Generation(BaseModel):
    """Of a one-to-many network, whose outputs are about the symbol that comes next."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: Symbol = Field(description="the symbol that the network reads first")
    end: Symbol | None = Field(None, description="ends an output where it is drawn, and is no part of it; may be start")
    max_symbols: int = Field(ge=1, le=100_000, description="the most that one request may ask for")

    def check(self, network: NetworkSpec, symbols: Sequence[str], labels: Sequence[str]) -> None:
        """`symbols` are what the network reads, `labels` what its outputs mean. Raises ValueError, naming the field."""
        if network.why_not_streamable is not None:
            raise ValueError(f"network cannot write symbol by symbol: {network.why_not_streamable}")
        if not symbols:
            raise ValueError("input must be text, for what a one-to-many network writes it also reads")
        if len(labels) != len(symbols):
            raise ValueError(f"output.labels has {len(labels)} entries but input.symbols has {len(symbols)}")
        for number, (symbol, label) in enumerate(zip(symbols, labels, strict=True)):
            if symbol != label:
                raise ValueError(f"output.labels.{number} is {label!r}, but input.symbols.{number} is {symbol!r}")
        for name, given in (("start", self.start), ("end", self.end)):
            if given is not None and given not in symbols:
                raise ValueError(f"generation.{name} is {given!r}, which is none of input.symbols")

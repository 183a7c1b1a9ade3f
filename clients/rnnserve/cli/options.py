"""What holds for all commands."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from rnnserve.channel import TLS
from rnnserve.cli.outcome import BadInput, tell
from rnnserve.cli.show import notice_line
from rnnserve.client import Client
from rnnserve.errors import RnnserveError
from rnnserve.models import Model
from rnnserve.stream import Stream

_ERASING_S = 2.0

Threshold = Annotated[
    float, typer.Option(help="Labels that are less probable than this are left out: a dash.", min=0, max=1)
]


@dataclass(frozen=True)
class Options:
    """Where the server is, and how to print."""

    target: str
    tls: TLS
    token: str | None
    timeout_s: float
    json: bool

    def client(self) -> Client:
        try:
            return Client(self.target, tls=self.tls, token=self.token, timeout_s=self.timeout_s)
        except ValueError as error:
            raise BadInput(str(error)) from None

    @contextmanager
    def stream(self, client: Client, model: Model, threshold: float = 0.0) -> Iterator[Stream]:
        """A stream that leaves no session behind, however the block ends: nobody but the command could resume it.

        Its notices are lines on standard error.
        """
        stream: Stream = client.stream(
            model.name,
            probabilities=bool(model.labels),
            threshold=threshold,
            on_notice=lambda notice: tell(notice_line(notice, stream.durability)),
        )
        stream.open()
        try:
            yield stream
            stream.close()
        except BaseException:
            stream.abort()
            self._erase(stream.session)
            raise

    def _erase(self, session: str) -> None:
        """If the server answers quickly, for the user waits; else the session is left to the server's own limits."""
        hasty = replace(self, timeout_s=min(self.timeout_s, _ERASING_S))
        with suppress(RnnserveError), hasty.client() as client:
            client.delete_session(session)

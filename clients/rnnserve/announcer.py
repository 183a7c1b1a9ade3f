"""What a stream tells its user unasked."""

import logging
from collections.abc import Callable

from rnnserve.errors import RnnserveError
from rnnserve.results import Notice

_log = logging.getLogger(__name__)


class Announcer:
    """Keeps all notices, and calls `on_notice` with each when it comes.

    What that raises is logged and ignored, as for the callbacks of futures: here it would leave a response half read.
    """

    def __init__(self, on_notice: Callable[[Notice], object] | None) -> None:
        self.notices: list[Notice] = []
        self._on_notice = on_notice
        self._interrupted = False  # and not resumed yet

    def announce(self, notice: Notice) -> None:
        """Tell it now."""
        self.notices.append(notice)
        if self._on_notice is not None:
            try:
                self._on_notice(notice)
            except Exception:
                _log.exception("on_notice failed for %r", notice.message)

    def interrupted(self, error: RnnserveError) -> None:
        """Once, however many attempts to resume follow."""
        if not self._interrupted:
            self._interrupted = True
            message = f"the stream is interrupted and tries to resume: {_without_advice(error.message)}"
            self.announce(Notice("interrupted", message, error=error))

    def resumed(self, step: int | None = None) -> None:
        """It goes on, if it was interrupted; one session of its own goes on with this step."""
        if self._interrupted:
            self._interrupted = False
            with_step = "" if step is None else f" with step {step}"
            self.announce(Notice("resumed", f"the stream goes on{with_step}", step=step))


def _without_advice(message: str) -> str:
    """What happened, without what to do about it: that is for whoever has to do something."""
    return message.partition("; ")[0]

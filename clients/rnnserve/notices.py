"""Tells the caller what nobody asked for."""

import logging
from collections.abc import Callable

from rnnserve.results import Notice

_log = logging.getLogger(__name__)


class Notices:
    """Keeps each notice, and calls `on_notice` with it when it comes.

    What that raises is logged and ignored, as for the callbacks of futures: here it would leave a response half read.
    """

    def __init__(self, on_notice: Callable[[Notice], object] | None) -> None:
        self.told: list[Notice] = []
        self._on_notice = on_notice

    def tell(self, notice: Notice) -> None:
        """Never fails."""
        self.told.append(notice)
        if self._on_notice is not None:
            try:
                self._on_notice(notice)
            except Exception:
                _log.exception("on_notice failed for %r", notice.message)

"""When to try again, and how long to wait before."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

FIRST_RECONNECT_S = 0.1
MAX_RECONNECT_S = 2.0


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call is tried, and the pauses between: each up to twice as long as the one before, at random.

    Only calls that change nothing are ever repeated, only where the server is out of reach or said to try again, never
    before the time it named, and never past the `timeout_s` of the call. The first open of a stream is tried as often
    where no server answers. After that it resumes by itself, for as long as `resume_timeout_s` says.
    """

    attempts: int = 4
    """In all; 1 = never again."""
    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0

    def backoffs_s(self) -> Iterator[float]:
        """A pause before each further attempt."""
        longest = min(self.first_backoff_s, self.max_backoff_s)
        for _ in range(self.attempts - 1):
            yield random.uniform(longest / 2, longest)
            longest = min(2 * longest, self.max_backoff_s)


class Resumption:
    """How long to wait before a stream is connected again, and when to give up."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._began_s: float | None = None
        self._closes_s: float | None = None
        self._attempts = 0

    def progress(self) -> None:
        """The server did something for the stream: whatever fails next is a new failure."""
        self._began_s, self._attempts = None, 0

    def limit(self, timeout_s: float) -> None:
        """Gives up at the latest after this time, progress or not."""
        self._closes_s = time.monotonic() + timeout_s

    def pause_s(self, retry_after_s: float | None) -> float | None:
        """Before the next attempt; None = no more."""
        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s = now_s
        left_s = self._began_s + self._timeout_s - now_s
        if self._closes_s is not None:
            left_s = min(left_s, self._closes_s - now_s)
        if left_s <= 0:
            return None
        longest = min(FIRST_RECONNECT_S * 2 ** min(self._attempts, 10), MAX_RECONNECT_S)
        self._attempts += 1
        pause_s = random.uniform(longest / 2, longest)
        return min(max(pause_s, min(retry_after_s or 0.0, MAX_RECONNECT_S)), left_s)

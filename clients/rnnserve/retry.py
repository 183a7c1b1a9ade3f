"""When to try again, and how long to wait before."""

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """How often a call is tried, and the pauses between: each up to twice as long as the one before, at random.

    Only calls that change nothing are ever repeated, only where the server is out of reach or said to try again, never
    before the time it named, and never past the `timeout_s` of the call. Nothing is repeated inside a stream.
    """

    attempts: int = 4
    """In all; 1 = never again."""
    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0

    def backoffs_s(self) -> Iterator[float]:
        """A pause before each further attempt."""
        for attempt in range(self.attempts - 1):
            longest = min(self.first_backoff_s * 2**attempt, self.max_backoff_s)
            yield random.uniform(longest / 2, longest)

"""The caller's trace context (W3C), where OpenTelemetry is installed: spans of both ends are one trace then."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache


def trace_context() -> tuple[tuple[str, str], ...]:
    """As metadata of a call."""
    carrier: dict[str, str] = {}
    if inject := _inject():
        inject(carrier)
    return tuple(carrier.items())


@cache
def _inject() -> Callable[[dict[str, str]], None] | None:
    try:
        from opentelemetry.propagate import inject
    except ImportError:
        return None
    return inject

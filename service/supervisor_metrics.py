"""What a supervisor of several processes counts itself."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import ProcessCollector

from service.declarations import RESTARTS, Declarations


class SupervisorMetrics:
    """In a registry of their own, beside those of the processes."""

    def __init__(self, serving: Callable[[], int] = lambda: 0) -> None:
        """`serving` is asked at each scrape how many workers serve."""
        declarations = Declarations()
        self.registry, self.declared = declarations.registry, declarations.declared
        declarations.section = "Processes"
        self._restarts = declarations.counter(*RESTARTS)
        declarations.gauge("rnnserve_workers", "Workers that serve.").set_function(serving)
        ProcessCollector(registry=self.registry)

    def began(self, process: str) -> None:
        """From 0 on, so that its first restart shows as a rise."""
        for why in ("died", "stuck", "failed", "rolled"):
            self._restarts.labels(process, why)

    def restarted(self, process: str, why: str) -> None:
        self._restarts.labels(process, why).inc()

"""Thousands of sessions that open, step, park, resume and die, for ten minutes: what the server holds must stay flat.

    python -m benchmarks.soak --seconds 600

Compares the last third with the middle one; the first, in which limits fill up, does not count. The exit code is 1 if
something grew by more than a tenth, or a step was lost or doubled.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rnnserve import AsyncClient, AsyncStream
from tests.support.bundles import write_accumulator
from tests.support.server import RunningServer, start_server
from tests.support.wire import sample_values, total_of

ROOT = Path(__file__).parents[1]
CLIENTS = 2_000
PAUSE_S = (0.5, 3.5)  # between two steps of a session
LIMITS = {"resume_window_s": 30, "max_streams": 4_000, "max_sessions": 4_000, "checkpoint_interval_s": 0.5}
GAUGES = {
    "memory, MB": ("process_resident_memory_bytes", 1e-6),
    "file handles": ("process_open_fds", 1.0),
    "tasks": ("rnnserve_tasks", 1.0),
    "live sessions": ("rnnserve_sessions", 1.0),
    "parked sessions": ("rnnserve_parked_sessions", 1.0),
}
FILE = "session file, MB"
FOLLOW_THE_LOAD = ("live sessions", "parked sessions")  # shown but not judged
MAY_GROW = 1.1


async def live(client: AsyncClient, until_s: float, counts: dict[str, int]) -> None:
    """One life of a session after another."""
    while time.monotonic() < until_s:
        stream = client.stream("accumulator")
        await stream.open()
        total = await _step(stream, 0.0, until_s)
        fate = random.choices(("close", "park", "resume", "die"), (4, 2, 3, 1))[0]
        if fate == "resume":
            point = stream.resume_point
            await stream.park()
            await asyncio.sleep(random.uniform(0, 2))
            stream = client.stream("accumulator", resume=point)
            await stream.open()
            await _step(stream, total, until_s)
        if fate == "park":
            await stream.park()
        elif fate == "die":
            stream.abort()
        else:
            await stream.close()
        counts[fate] = counts.get(fate, 0) + 1


async def _step(stream: AsyncStream, total: float, until_s: float) -> float:
    for _ in range(random.randint(1, 20)):
        await asyncio.sleep(random.uniform(*PAUSE_S))
        if time.monotonic() > until_s:
            break
        value = float(random.randint(0, 9))
        answer = await stream.step([value])
        total += value
        if answer.output[0] != total:
            raise RuntimeError(f"session {stream.session}: the sum is {answer.output[0]}, not {total}")
    return total


def look(server: RunningServer, state_dir: Path) -> dict[str, float]:
    """What the server holds now."""
    values = sample_values(server.metrics_url)
    found = {name: total_of(values, metric) * factor for name, (metric, factor) in GAUGES.items()}
    return found | {FILE: sum(file.stat().st_size for file in state_dir.glob("sessions.sqlite*")) * 1e-6}


async def soak(
    server: RunningServer, state_dir: Path, seconds: float
) -> tuple[dict[float, dict[str, float]], dict[str, int]]:
    """Load it, and look once a second; by time."""
    seen, counts = dict[float, dict[str, float]](), dict[str, int]()
    start_s = time.monotonic()
    async with AsyncClient(server.target) as client:
        lives = [asyncio.create_task(live(client, start_s + seconds, counts)) for _ in range(CLIENTS)]
        with Progress() as progress:
            task = progress.add_task("soaking", total=seconds)
            while not all(one.done() for one in lives):
                await asyncio.wait(lives, timeout=1.0, return_when=asyncio.FIRST_EXCEPTION)
                seen[time.monotonic() - start_s] = await asyncio.to_thread(look, server, state_dir)
                progress.update(task, completed=min(seconds, time.monotonic() - start_s))
        await asyncio.gather(*lives)
    return seen, counts


def draw(seen: dict[float, dict[str, float]], file: Path) -> None:
    """A panel for each."""
    names = list(next(iter(seen.values())))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(len(names), 1, sharex=True, figsize=(8, 9), layout="constrained")
    for panel, name in zip(panels, names, strict=True):
        values = [moment[name] for moment in seen.values()]
        panel.plot(list(seen), values)
        panel.set_ylabel(name)
        panel.set_ylim(0, 1.1 * max(values))
    panels[-1].set_xlabel("seconds")
    figure.suptitle("What a server holds while sessions come, go and die")
    figure.savefig(file, dpi=110)


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--picture", type=Path, default=ROOT / "build" / "soak.png")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repository, state_dir = Path(folder, "repository"), Path(folder, "state")
        write_accumulator(repository)
        state_dir.mkdir()
        with start_server(repository, state_dir, **LIMITS) as server:
            by_time, counts = asyncio.run(soak(server, state_dir, given.seconds))
    draw(by_time, given.picture)
    seen = list(by_time.values())
    table = Table("what", "middle third", "last third", "ratio", title=f"{sum(counts.values()):,} sessions: {counts}")
    third, grew = len(seen) // 3, False
    for name in seen[0]:
        middle, last = (float(np.mean([m[name] for m in seen[s : s + third]])) for s in (third, 2 * third))
        grew |= last > middle * MAY_GROW and name not in FOLLOW_THE_LOAD
        table.add_row(name, f"{middle:,.1f}", f"{last:,.1f}", f"{last / middle:.2f}")
    Console().print(table)
    return 1 if grew else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.chaos --plans 200 --seed 1`: exit code 1 if a step was lost, repeated or answered wrongly."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.chaos import broken
from tests.chaos.harness import Harness, Outcome
from tests.chaos.plans import FAULTS, POINTS, Clients, make_plan
from tests.support.bundles import write_accumulator

TABLE_WIDTH = 120


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--plans", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=None, help="of the first plan / 100000; drawn if not given")
    parser.add_argument("--only", type=int, default=None, metavar="SEED", help="the one plan of this seed of its own")
    parser.add_argument("--break", dest="break_name", choices=broken.BREAKS, default="", help="break the code first")
    parser.add_argument("--clients", choices=get_args(Clients), default="both", help="what the plans may have")
    parser.add_argument("--seconds", type=float, default=None, help="begin no plan after this time")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10_000) if given.seed is None else given.seed
    seeds = [given.only] if given.only is not None else [seed * 100_000 + number for number in range(given.plans)]
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    console.print(f"seed {seed}" if given.only is None else f"plan {given.only}")
    outcomes = _run(seeds, given.clients, given.break_name, given.seconds, console)
    options = [f" --clients {given.clients}"] if given.clients != "both" else []
    options += [f" --break {given.break_name}"] if given.break_name else []
    return _report(outcomes, "".join(options), console)


def _run(seeds: list[int], clients: Clients, break_name: str, limit_s: float | None, console: Console) -> list[Outcome]:
    broken.break_client(break_name)
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        repository, state_dir = Path(folder, "repository"), Path(folder, "state")
        state_dir.mkdir()
        write_accumulator(repository)
        harness = Harness(repository, state_dir, break_name)
        began_s = time.monotonic()
        task = progress.add_task("plans", total=len(seeds))
        try:
            for seed in seeds:
                if limit_s is not None and time.monotonic() - began_s > limit_s:
                    break
                plan = make_plan(seed, clients=clients)
                progress.update(task, description=f"{plan.fault} {plan.point}")
                outcome = harness.run(seed, clients)
                outcomes.append(outcome)
                for violation in outcome.violations:
                    console.print(f"[red]plan {seed}: {plan.fault} {plan.point}: {violation}[/red]", highlight=False)
                progress.advance(task)
        finally:
            harness.close()
    return outcomes


def _report(outcomes: list[Outcome], options: str, console: Console) -> int:
    hits = [outcome for outcome in outcomes if outcome.hit]
    counts = Counter((outcome.plan.fault, outcome.plan.point) for outcome in hits)
    table = Table("fault", *POINTS, "all", "longest recovery")
    for fault in FAULTS:
        row = [counts[fault, point] for point in POINTS]
        longest_s = max((o.recovery_s for o in hits if o.plan.fault == fault), default=0.0)
        table.add_row(fault, *map(str, row), str(sum(row)), f"{longest_s:.2f} s")
    columns = [sum(counts[fault, point] for fault in FAULTS) for point in POINTS]
    longest_s = max((outcome.recovery_s for outcome in hits), default=0.0)
    table.add_row("all", *map(str, columns), str(len(hits)), f"{longest_s:.2f} s", style="bold")
    console.print(table)
    failed = [outcome for outcome in outcomes if outcome.violations]
    missed = [outcome.plan.seed for outcome in outcomes if not outcome.hit and not outcome.violations]
    places = Counter(outcome.plan.target for outcome in hits)
    console.print(f"struck at: {dict(places)}", highlight=False)
    console.print(f"of multiplexed clients: {sum(outcome.plan.is_multiplexed for outcome in hits)}")
    console.print(f"steps checked: {sum(outcome.steps for outcome in hits)}")
    console.print(f"plans repeated with another step: {sum(outcome.attempts > 1 for outcome in outcomes)}")
    console.print(f"erased sessions looked for after a crash: {sum(outcome.proved_erased for outcome in hits)}")
    if missed:
        console.print(f"not counted, for their fault never hit: {missed}")
    console.print(f"plans with violations: {len(failed)}", style="red" if failed else "green")
    for outcome in failed:
        console.print(f"  python -m tests.chaos --only {outcome.plan.seed}{options}", highlight=False)
    return 1 if failed or not hits else 0


if __name__ == "__main__":
    sys.exit(main())

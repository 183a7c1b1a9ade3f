"""`python -m models`: train the networks, check their numbers, list them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from models.bundle import BundleError, load_manifest
from models.data import DataError
from models.gallery import describe_gallery
from models.manifest import Manifest
from models.studies import STUDIES
from models.tasks import TASKS
from models.tasks.task import Task
from models.training import publish

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

TOLERANCE = 1e-6
Seed = Annotated[int, typer.Option(help="seed of the first run")]
Processes = Annotated[int, typer.Option(min=1, help="how many runs go side by side, a thread each")]
Bfloat16 = Annotated[bool, typer.Option("--bfloat16", help="also measure what bfloat16 weights lose, for a server")]
Repository = Annotated[Path, typer.Option(help="folder of the bundles")]


def task_named(name: str) -> Task:
    """The task of that name; an unknown one ends the command with exit code 2."""
    if name not in TASKS:
        raise typer.BadParameter(f"there is no task {name!r}; known are {', '.join(TASKS)}")
    return TASKS[name]


TaskArgument = Annotated[Task, typer.Argument(parser=task_named, metavar="TASK", help=f"one of {', '.join(TASKS)}")]


@app.command()
def train(
    task: Annotated[str, typer.Argument(help=f"one of {', '.join(TASKS)}; or all")],
    seed: Seed = 0,
    processes: Processes = 2,
    repository: Repository = publish.REPOSITORY,
) -> None:
    """Train a task, over all its seeds or folds, and write its bundle."""
    for chosen in TASKS.values() if task == "all" else [task_named(task)]:
        start_s = time.monotonic()
        print_numbers(publish.train_task(chosen, seed, repository, processes))
        console.print(f"trained and measured in {(time.monotonic() - start_s) / 60:.1f} minutes")


@app.command()
def evaluate(task: TaskArgument, repository: Repository = publish.REPOSITORY, bfloat16: Bfloat16 = False) -> None:
    """Measure a bundle anew on its held-out data; exit code 1 where the number is not the manifest's."""
    value, manifest = publish.measure_again(task, repository)
    quality = manifest.quality
    console.print(f"{manifest.name}: measured {value:.6f}, manifest {quality.value:.6f} ({quality.metric})")
    if abs(value - quality.value) > TOLERANCE:
        raise typer.Exit(1)
    if bfloat16:
        loss = publish.measure_bfloat16(task, repository)
        console.print(
            f"{manifest.name}: over all steps {loss.float32_percent:.3f} % right with float32 weights, "
            f"{loss.bfloat16_percent:.3f} % with bfloat16 ({loss.predictions:,} predictions)"
        )


@app.command()
def compare(
    study: Annotated[str, typer.Argument(help=f"one of {', '.join(STUDIES)}")],
    seed: Seed = 0,
    into: Annotated[Path, typer.Option(help="folder of the page and its picture")] = Path("docs/studies"),
) -> None:
    """Measure one of the course's ideas, and write a page with a picture."""
    if study not in STUDIES:
        raise typer.BadParameter(f"there is no study {study!r}; known are {', '.join(STUDIES)}")
    typer.echo(STUDIES[study](into, seed).read_text())


@app.command()
def gallery(
    repository: Repository = publish.REPOSITORY,
    into: Annotated[Path, typer.Option(help="the page")] = Path("docs/models.md"),
) -> None:
    """Write the page that shows every bundle."""
    into.write_text(describe_gallery(repository, into))
    typer.echo(f"wrote {into}")


@app.command("list")
def list_bundles(repository: Repository = publish.REPOSITORY) -> None:
    """Show the bundles and how good they are."""
    table = Table(Column("bundle", no_wrap=True), "network, and its quality on held-out data", box=None)
    for path in sorted(repository.glob("*/*/manifest.json")):
        manifest = load_manifest(path.parent)
        table.add_row(f"{manifest.name} v{manifest.version}", "\n".join(described(manifest)))
    console.print(table)


def described(manifest: Manifest) -> list[str]:
    """What `list` shows of a bundle."""
    spec, quality, repeats = manifest.network, manifest.quality, manifest.repeats
    serves = "streams" if spec.streamable else "whole sequences"
    network = f"{spec.layers} × {spec.cell}, {spec.direction}, {spec.hidden_size} units; {serves}"
    mean = f"; mean {repeats.mean:.2f} over {repeats.over}" if repeats and len(repeats.values) > 1 else ""
    return [network, f"{quality.value:.2f} {quality.metric} ({quality.items:,} items){mean}"]


def print_numbers(manifest: Manifest) -> None:
    """The held-out number of the shipped weights, and of every repeat."""
    console.print(f"{manifest.name}: {manifest.quality.value:.2f} {manifest.quality.metric}")
    if manifest.repeats:
        values = ", ".join(f"{value:.2f}" for value in manifest.repeats.values)
        console.print(f"{manifest.repeats.over}: {values}; mean {manifest.repeats.mean:.2f}")


def main() -> None:
    """Run the command; what the user can mend is one line, not a traceback."""
    try:
        app()
    except (DataError, BundleError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

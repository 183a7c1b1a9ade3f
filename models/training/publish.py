"""From a task to a bundle, and from a bundle back to its number."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from models.bfloat16 import Bfloat16Loss, write_loss
from models.bundle import load_bundle, save_bundle
from models.manifest import Manifest, Output, Quality, Repeats, Sample
from models.tasks.task import Recordings, Run, Split, Task
from models.training.card import write_card
from models.training.loss import accuracy_percent
from models.training.measure import accuracy_by_steps, confusions, measure_live
from models.training.plots import draw_curves, draw_heard
from models.training.runs import Job, Result, run_all
from models.training.sequences import Recording

REPOSITORY = Path(__file__).parents[1] / "repository"
VERSION = 1


def train_task(task: Task, seed: int, repository: Path = REPOSITORY, processes: int = 2) -> Manifest:
    """Run all seeds or folds of a task and write the bundle of the first."""
    runs = task.runs(seed)
    results = run_all([Job(task, run, rehearse=run == runs[0]) for run in runs], processes)
    shipped, split = results[0], task.split(runs[0])
    manifest = describe(task, split, results)
    folder = save_bundle(repository, manifest, shipped.network)
    _write_samples(folder, task, split)
    if shipped.rehearsal:
        draw_curves(folder / "curves.png", shipped.rehearsal)
    heard = accuracy_by_steps(shipped.predictor, split.test, task.heard_steps)
    if heard:
        draw_heard(folder / "frames_heard.png", heard)
    items = task.items(split.test)
    scores = [(run, result.test_percent, result.live) for run, result in zip(runs, results, strict=True)]
    write_card(folder, task, manifest, scores, confusions(shipped.predictor, items), items, heard)
    return manifest


def describe(task: Task, split: Split, results: list[Result]) -> Manifest:
    """The manifest of the first result's bundle."""
    return Manifest(
        name=task.name,
        version=VERSION,
        summary=task.summary,
        pattern=task.pattern,
        network=task.network,
        input=results[0].input_spec,
        output=Output(activation="softmax", labels=task.labels),
        data=task.source,
        quality=Quality(
            metric=task.metric,
            value=results[0].test_percent,
            split=task.test_items,
            items=len(task.items(split.test)),
        ),
        repeats=Repeats(
            metric=task.metric, over=task.repeats_over, values=tuple(result.test_percent for result in results)
        ),
        samples=tuple(_sample(task, recording) for recording in task.samples(split.test)),
        weights_sha256="0" * 64,  # set when the weights are written
    )


def measure_again(task: Task, repository: Path = REPOSITORY) -> tuple[float, Manifest]:
    """The metric of a bundle on its held-out data, computed anew, and the manifest that says what it was.

    Raises BundleError or DataError.
    """
    bundle = load_bundle(repository / task.name / str(VERSION))
    items = task.items(test_recordings(task))
    return accuracy_percent(bundle.predictor, items), bundle.manifest


def measure_bfloat16(task: Task, repository: Path = REPOSITORY) -> Bfloat16Loss:
    """What bfloat16 weights lose over all answers about held-out recordings and their beginnings; kept beside them.

    Raises BundleError or DataError.
    """
    bundle = load_bundle(repository / task.name / str(VERSION))
    recordings = test_recordings(task)
    exact = measure_live(bundle.predictor, recordings)
    bundle.predictor.network.to_bfloat16()
    loss = Bfloat16Loss(
        manifest_sha256=bundle.manifest.manifest_sha256,
        predictions=sum(len(recording.values) for recording in recordings),
        float32_percent=exact.settled,
        bfloat16_percent=measure_live(bundle.predictor, recordings).settled,
    )
    write_loss(bundle.folder, loss)
    return loss


def test_recordings(task: Task) -> Recordings:
    """What the shipped weights never saw; it does not depend on the seed."""
    return task.split(_shipped_run(task)).test


def _shipped_run(task: Task) -> Run:
    return task.runs(0)[0]


def _sample(task: Task, recording: Recording) -> Sample:
    label = task.labels[recording.label]
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower())
    seconds = len(recording.values) / task.input.steps_per_second
    return Sample(
        file=f"samples/{slug}.csv",
        label=label,
        description=f"{recording.name}, {len(recording.values)} steps, {seconds:.3g} s",
    )


def _write_samples(folder: Path, task: Task, split: Split) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    for recording in task.samples(split.test):
        write_csv(folder / _sample(task, recording).file, task.input.feature_names, recording.values)


def write_csv(path: Path, header: tuple[str, ...], values: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    """A header line, then one line a step, with the shortest digits that give the same float32 again."""
    lines = [",".join(header), *(",".join(str(value) for value in row) for row in values)]
    path.write_text("\n".join(lines) + "\n")

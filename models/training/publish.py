"""From a task to a bundle, and from a bundle back to its number."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.bfloat16 import Bfloat16Loss, write_loss
from models.bundle import Bundle, load_bundle, save_bundle
from models.manifest import FeatureInput, Manifest, Quality, Repeats, Sample
from models.tasks.task import Recordings, Run, Split, Task
from models.training.answers import PredictorAnswers
from models.training.card import write_card
from models.training.measure import accuracy_by_steps, confusion_matrix, measure_live
from models.training.plots import draw_confusions, draw_curves, draw_heard
from models.training.runs import Job, Result, run_all
from models.training.scores import Score
from models.training.sequences import Recording
from models.training.targets import target_of, target_text

REPOSITORY = Path(__file__).parents[1] / "repository"
VERSION = 1


def train_task(task: Task, seed: int, repository: Path = REPOSITORY, processes: int = 2) -> Manifest:
    """Run all seeds or folds of a task and write the bundle of the first."""
    runs = task.runs(seed)
    if task.is_long:
        results = run_all([Job(task, run, threads=processes) for run in runs], processes=1)
        curves = results[0].fitted
    else:
        rehearsal, *results = run_all(
            [Job(task, runs[0], is_rehearsal=True), *(Job(task, run) for run in runs)], processes
        )
        curves = rehearsal.fitted
    shipped, split = results[0], task.split(runs[0])
    manifest = describe(task, split, results)
    folder = save_bundle(repository, manifest, shipped.network)
    _write_samples(folder, task, split)
    draw_curves(folder / "curves.png", curves, manifest.quality.metric)
    heard = accuracy_by_steps(shipped.answers, split.test, task.heard_steps) if task.heard_steps else {}
    if heard:
        draw_heard(folder / "frames_heard.png", heard)
    items = task.items(split.test)
    errors = task.errors(shipped.answers, items, task.output)
    if isinstance(items[0].target, int):
        counts = confusion_matrix(shipped.answers, items, len(task.output.labels))
        draw_confusions(folder / "confusions.png", counts, task.output.labels)
        errors += "\n\n![which is taken for which](confusions.png)"
    write_card(folder, task, manifest, list(zip(runs, results, strict=True)), errors, heard)
    return manifest


def describe(task: Task, split: Split, results: list[Result]) -> Manifest:
    """The manifest of the first result's bundle."""
    shipped = results[0]
    best, samples = shipped.scores[0], task.samples(split.test)
    on_samples = task.measure(shipped.answers, task.items(samples))[0] if samples else None
    return Manifest(
        name=task.name,
        version=VERSION,
        summary=task.summary,
        pattern=task.pattern,
        network=task.network,
        input=shipped.input_spec,
        output=task.output,
        generation=task.generation,
        look_ahead=task.look_ahead,
        data=task.source,
        quality=_quality(best, task.test_items),
        repeats=Repeats(
            metric=best.metric, over=task.repeats_over, values=tuple(result.scores[0].value for result in results)
        ),
        on_samples=on_samples and _quality(on_samples, "the samples that ship with the bundle"),
        samples=tuple(_sample(task, i, recording) for i, recording in enumerate(samples, 1)),
        weights_sha256="0" * 64,  # set when the weights are written
    )


def _quality(score: Score, split: str) -> Quality:
    return Quality(
        metric=score.metric, value=score.value, split=split, items=score.items, interval_95=(score.low, score.high)
    )


def measure_again(task: Task, repository: Path = REPOSITORY) -> tuple[float, Manifest]:
    """The metric of a bundle on its held-out data, computed anew, and the manifest that says what it was.

    Raises BundleError or DataError.
    """
    bundle = load_bundle(repository / task.name / str(VERSION))
    scores = task.measure(PredictorAnswers(bundle.predictor), task.items(test_recordings(task)))
    return scores[0].value, bundle.manifest


def samples_of(bundle: Bundle) -> list[Recording]:
    """The recordings that ship with a bundle and say what they are."""
    labels, is_row = bundle.manifest.output.labels, not bundle.manifest.pattern.endswith("to-one")
    return [
        Recording(values, target_of(sample.label, labels, is_row=is_row), sample.description)
        for sample, values in zip(bundle.manifest.samples, bundle.samples, strict=True)
        if sample.label
    ]


def measure_bfloat16(task: Task, repository: Path = REPOSITORY) -> Bfloat16Loss:
    """What bfloat16 weights lose over all answers about held-out recordings and their beginnings; kept beside them.

    Raises BundleError or DataError.
    """
    bundle = load_bundle(repository / task.name / str(VERSION))
    recordings = test_recordings(task)
    answers = PredictorAnswers(bundle.predictor)
    exact = measure_live(answers, recordings)
    bundle.predictor.network.to_bfloat16()
    loss = Bfloat16Loss(
        manifest_sha256=bundle.manifest.manifest_sha256,
        predictions=sum(len(recording.values) for recording in recordings),
        float32_percent=exact.settled,
        bfloat16_percent=measure_live(answers, recordings).settled,
    )
    write_loss(bundle.folder, loss)
    return loss


def test_recordings(task: Task) -> Recordings:
    """What the shipped weights never saw; it does not depend on the seed."""
    return task.split(_shipped_run(task)).test


def _shipped_run(task: Task) -> Run:
    return task.runs(0)[0]


def _sample(task: Task, number: int, recording: Recording) -> Sample:
    label, steps = target_text(recording.target, task.output.labels), len(recording.values)
    if isinstance(recording.values, str):
        return Sample(file=f"samples/{number}.txt", label=label, description=recording.name)
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower())
    return Sample(file=f"samples/{slug}.csv", label=label, description=f"{recording.name}, {steps} steps")


def _write_samples(folder: Path, task: Task, split: Split) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    input_spec = task.input(split.train)
    for number, recording in enumerate(task.samples(split.test), 1):
        path = folder / _sample(task, number, recording).file
        if isinstance(recording.values, str):
            path.write_text(recording.values + "\n", encoding="utf-8")
        elif isinstance(input_spec, FeatureInput):
            write_csv(path, input_spec.feature_names, recording.values)


def write_csv(path: Path, header: tuple[str, ...], values: NDArray[np.generic]) -> None:
    """A header line, then one line a step, with the shortest digits that give the same float32 again."""
    lines = [",".join(header), *(",".join(str(value) for value in row) for row in values)]
    path.write_text("\n".join(lines) + "\n")

"""The runs of a task, side by side in processes of one thread each, under one progress bar."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from queue import Empty, Queue
from typing import NamedTuple

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from models.manifest import FeatureInput
from models.predictor import Predictor
from models.recurrent import RecurrentNetwork
from models.tasks.task import Run, Task
from models.training.loop import Epoch, Fitted, fit, quiet
from models.training.loss import accuracy_percent
from models.training.measure import Live, measure_live

Report = Callable[[Epoch], None]


class Job(NamedTuple):
    """One run to do. A rehearsal, before it, shows on the validation part how training goes."""

    task: Task
    run: Run
    rehearse: bool = False

    @property
    def epochs(self) -> int:
        """At most."""
        return self.task.settings.epochs * (1 + self.rehearse)


@dataclass(frozen=True)
class Result:
    """One finished run."""

    network: RecurrentNetwork
    input_spec: FeatureInput
    test_percent: float
    live: Live | None  # where pieces of recordings are scored: how it does on whole ones
    rehearsal: Fitted | None

    @property
    def predictor(self) -> Predictor:
        """The network with its normalisation."""
        return Predictor(self.network, self.input_spec)


def run_once(job: Job, report: Report = quiet) -> Result:
    """Train on all but the test for the number of epochs of the settings, then score the test, once."""
    torch.set_num_threads(1)
    task, split = job.task, job.task.split(job.run)
    rehearsal = rehearse(task, job.run, report) if job.rehearse else None
    known = [*split.train, *split.validation]
    input_spec = task.input.normalised_by(known)
    network = fit(
        task.network, input_spec, partial(task.examples, known), (), task.settings, job.run.seed, report
    ).network
    predictor = Predictor(network, input_spec)
    live = measure_live(predictor, split.test, task.settling_steps) if task.settling_steps else None
    return Result(network, input_spec, accuracy_percent(predictor, task.items(split.test)), live, rehearsal)


def rehearse(task: Task, run: Run, report: Report = quiet) -> Fitted:
    """Train on the training part alone, with early stopping on the validation part. Never looks at the test."""
    split = task.split(run)
    input_spec = task.input.normalised_by(split.train)
    examples, validation = partial(task.examples, split.train), task.items(split.validation)
    return fit(task.network, input_spec, examples, validation, task.settings, run.seed, report)


def run_all(jobs: Sequence[Job], processes: int = 2) -> list[Result]:
    """The results in the order of the jobs. Processes are spawned, never forked after torch was imported."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, mp_context=context) as pool:
        reports = manager.Queue()
        futures = [pool.submit(_work, number, job, reports) for number, job in enumerate(jobs)]
        try:
            _show_progress(jobs, futures, reports)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what has not begun shall not begin
            raise
        return [future.result() for future in futures]


def _work(number: int, job: Job, reports: Queue[tuple[int, Epoch]]) -> Result:
    return run_once(job, lambda epoch: reports.put((number, epoch)))


def _show_progress(jobs: Sequence[Job], futures: list[Future[Result]], reports: Queue[tuple[int, Epoch]]) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn()
    with Progress(*columns) as progress:
        bars = [progress.add_task(_name(job), total=job.epochs, now="") for job in jobs]
        waiting: set[Future[Result]] = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # raises where the run failed
                number = futures.index(future)
                progress.update(bars[number], completed=jobs[number].epochs)
            _take_reports(progress, bars, reports)


def _take_reports(progress: Progress, bars: list[TaskID], reports: Queue[tuple[int, Epoch]]) -> None:
    while True:
        try:
            number, epoch = reports.get_nowait()
        except Empty:
            return
        progress.update(bars[number], advance=1, now=f"loss {epoch.train_loss:.3f}")


def _name(job: Job) -> str:
    return f"{job.task.name}, {job.run}"

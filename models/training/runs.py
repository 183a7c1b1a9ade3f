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

from models.manifest import FeatureInput, TextInput
from models.predictor import Predictor
from models.recurrent import RecurrentNetwork
from models.tasks.task import Recordings, Run, Task
from models.training.answers import PredictorAnswers
from models.training.loop import Epoch, Fitted, Lesson, fit, quiet
from models.training.measure import Live, measure_live
from models.training.scores import Score

Report = Callable[[Epoch], None]


class Job(NamedTuple):
    """One run to do. A rehearsal, before it, shows on the validation part how training goes."""

    task: Task
    run: Run
    rehearse: bool = False
    threads: int = 1

    @property
    def epochs(self) -> int:
        """At most."""
        return self.task.settings.epochs * (1 + (self.rehearse and not self.task.is_long))


@dataclass(frozen=True)
class Result:
    """One finished run."""

    network: RecurrentNetwork
    input_spec: FeatureInput | TextInput
    scores: tuple[Score, ...]  # on the test; the first is what the task is about
    live: Live | None  # where pieces of recordings are scored: how it does on whole ones
    rehearsal: Fitted | None  # of a long task the run itself
    look_ahead: int = 0

    @property
    def answers(self) -> PredictorAnswers:
        """What the network says."""
        return PredictorAnswers(Predictor(self.network, self.input_spec, look_ahead=self.look_ahead))


def run_once(job: Job, report: Report = quiet) -> Result:
    """Train, then score the test, once.

    On all but the test for the number of epochs of the settings; a long task without its validation part, too.
    """
    torch.set_num_threads(job.threads)
    rehearsal: Fitted | None
    task, split = job.task, job.task.split(job.run)
    if task.is_long:
        lesson = _lesson(task, split.train, split.validation)
        fitted = rehearsal = fit(lesson, task.settings, job.run.seed, report)
    else:
        rehearsal = rehearse(task, job.run, report) if job.rehearse else None
        lesson = _lesson(task, [*split.train, *split.validation], ())
        fitted = fit(lesson, task.settings, job.run.seed, report)
    if task.half_precision:
        round_weights(fitted.network)
    answers = PredictorAnswers(Predictor(fitted.network, lesson.input_spec, look_ahead=task.look_ahead))
    live = measure_live(answers, split.test, task.settling_steps) if task.settling_steps else None
    scores = task.measure(answers, task.items(split.test))
    return Result(fitted.network, lesson.input_spec, scores, live, rehearsal, task.look_ahead)


def round_weights(network: RecurrentNetwork) -> None:
    """To what float16 holds, in place; they are float32 as before."""
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()


def rehearse(task: Task, run: Run, report: Report = quiet) -> Fitted:
    """Train on the training part alone, with early stopping on the validation part. Never looks at the test."""
    split = task.split(run)
    return fit(_lesson(task, split.train, task.items(split.validation)), task.settings, run.seed, report)


def _lesson(task: Task, known: Recordings, validation: Recordings) -> Lesson:
    examples = partial(task.examples, known)
    return Lesson(task.network, task.input(known), examples, validation, task.measure, task.look_ahead)


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

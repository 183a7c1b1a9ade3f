"""The runs of a task, side by side in processes of one thread each, under one progress bar."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
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
    """One training: a run, or its rehearsal, which shows on the validation part how the run goes."""

    task: Task
    run: Run
    is_rehearsal: bool = False
    threads: int = 1

    @property
    def holds_out_validation(self) -> bool:
        """A long task has no rehearsal: it is trained once, without its validation part."""
        return self.is_rehearsal or self.task.is_long

    def __str__(self) -> str:
        """`speaker, seed 0`."""
        return f"{self.task.name}, {self.run}{', rehearsal' if self.is_rehearsal else ''}"


@dataclass(frozen=True)
class Result:
    """What a job came to."""

    fitted: Fitted
    input_spec: FeatureInput | TextInput
    look_ahead: int = 0
    scores: tuple[Score, ...] = ()  # on the test, at which a rehearsal never looks; the first is what the task is about
    live: Live | None = None  # where pieces of recordings are scored: how it does on whole ones

    @property
    def network(self) -> RecurrentNetwork:
        """With the weights that are kept."""
        return self.fitted.network

    @property
    def answers(self) -> PredictorAnswers:
        """What the network says."""
        return PredictorAnswers(Predictor(self.network, self.input_spec, look_ahead=self.look_ahead))


def run_once(job: Job, report: Report = quiet) -> Result:
    """Train on all but the test for the epochs of the settings, then score the test, once.

    Where the validation part is held out, it may end the training early, and chooses the weights that are kept.
    """
    torch.set_num_threads(job.threads)
    task, split = job.task, job.task.split(job.run)
    known = split.train if job.holds_out_validation else [*split.train, *split.validation]
    lesson = Lesson(
        task.network,
        task.input(known),
        partial(task.examples, known),
        task.items(split.validation) if job.holds_out_validation else (),
        task.measure,
        task.look_ahead,
    )
    fitted = fit(lesson, task.settings, job.run.seed, report)
    if task.half_precision:
        round_weights(fitted.network)
    result = Result(fitted, lesson.input_spec, task.look_ahead)
    return result if job.is_rehearsal else scored(result, task, split.test)


def scored(result: Result, task: Task, test: Recordings) -> Result:
    """With what the network does on the test."""
    live = measure_live(result.answers, test, task.settling_steps) if task.settling_steps else None
    return replace(result, scores=task.measure(result.answers, task.items(test)), live=live)


def round_weights(network: RecurrentNetwork) -> None:
    """To what float16 holds, in place; they are float32 as before."""
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()


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
        bars = [progress.add_task(str(job), total=job.task.settings.epochs, now="") for job in jobs]
        waiting: set[Future[Result]] = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # raises where the run failed
                number = futures.index(future)
                progress.update(bars[number], completed=jobs[number].task.settings.epochs)
            _take_reports(progress, bars, reports)


def _take_reports(progress: Progress, bars: list[TaskID], reports: Queue[tuple[int, Epoch]]) -> None:
    while True:
        try:
            number, epoch = reports.get_nowait()
        except Empty:
            return
        progress.update(bars[number], advance=1, now=f"loss {epoch.train_loss:.3f}")

"""Training many recipes with one call: resumable, several at a time, packing what comes out.

Each job is a process of its own, ``python -m conam_zoo train``, with a run folder and a log file: one that fails does
not stop the others, and a queue that is called again goes on where the last one ended.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from types import FrameType

from conam_zoo.errors import UserError
from conam_zoo.files import make_folder
from conam_zoo.training.checkpoint import has_checkpoint
from conam_zoo.training.recipe import Recipe, list_recipes, load_recipe
from conam_zoo.training.run_folder import LOG, read_log, read_run
from conam_zoo.training.teacher_bank import epoch_file, read_epoch

__all__ = ["Job", "Progress", "plan_queue", "run_queue"]

POLL_SECONDS = 0.5
PACE_EPOCHS = 5  # that the time left is reckoned from
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        epoch: Epochs that are done.
        epochs: Epochs of the recipe.
        top1_percent: Accuracy of the last epoch: on the held-out images if there are any, else on the training images.
        held_out: Which of the two it is.
        seconds_left: Until the last epoch's end, at the pace of the last epochs.
    """

    epoch: int
    epochs: int
    top1_percent: float
    held_out: bool
    seconds_left: float


@dataclass(frozen=True, eq=False)
class Job:
    """One training of the queue.

    Attributes:
        recipe_name: The packaged recipe.
        recipe: What it says, with the job's seed and settings.
        settings: The settings that the job replaces in it.
        folder: The run folder.
        ships: Whether its weights are those that the recipe ships: its own seed, nothing replaced.
        teacher_bank: The bank that holds its teacher's logits, or None.
    """

    recipe_name: str
    recipe: Recipe
    settings: tuple[str, ...]
    folder: Path
    ships: bool
    teacher_bank: Path | None = None

    @property
    def name(self) -> str:
        """Recipe and seed."""
        return f"{self.recipe_name}, seed {self.recipe.seed}"

    @property
    def weights(self) -> str:
        """Name of the weights that it trains."""
        return f"{self.recipe.model}.{self.recipe.dataset}"

    def is_done(self) -> bool:
        """Whether its run folder holds a finished run.

        Raises:
            UserError: If its record is damaged.
        """
        return read_run(self.folder) is not None

    @property
    def log(self) -> Path:
        """What the training printed; beside the run folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def command(self, data: str, compile: bool = False) -> list[str]:
        """The command line that trains it, or goes on with it."""
        settings = [word for setting in self.settings for word in ("--set", setting)]
        arguments = ["train", self.recipe_name, "--data", data, "--output", str(self.folder), *settings]
        arguments += ["--teacher-bank", str(self.teacher_bank)] if self.teacher_bank is not None else []
        arguments += ["--compile"] if compile else []
        return [sys.executable, "-m", "conam_zoo", *arguments, *(["--resume"] if has_checkpoint(self.folder) else [])]

    def progress(self) -> Progress | None:
        """What its log says, or None before the first epoch's end."""
        try:
            rows = read_log(self.folder)
            age = time.time() - (self.folder / LOG).stat().st_mtime
            epoch = int(rows[-1]["epoch"])
            held_out = rows[-1]["holdout_top1_percent"]
            top1 = float(held_out or rows[-1]["train_top1_percent"])
            pace = statistics.median(float(row["seconds"]) for row in rows[-PACE_EPOCHS:])
        except (UserError, OSError, LookupError, ValueError, TypeError):
            return None
        left = max(0.0, pace * (self.recipe.epochs - epoch) - max(0.0, min(age, pace)))
        return Progress(epoch, self.recipe.epochs, top1, bool(held_out), left)

    def last_words(self) -> str:
        """Last line of its log."""
        log = self.log
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def plan_queue(
    patterns: Sequence[str],
    output: Path,
    *,
    seeds: Sequence[int] = (),
    settings: Sequence[str] = (),
    teacher_bank: Path | None = None,
) -> list[Job]:
    """The jobs of a queue: every recipe that a pattern names, with every seed.

    Args:
        patterns: Shell-style patterns of packaged recipes, such as ``"resnet*"``; none means all.
        output: Folder of the run folders.
        seeds: The seeds of each recipe; none means the recipe's own.
        settings: Replacements such as ``"epochs=1"`` for all of them.
        teacher_bank: Logits of a teacher, for the recipes that learn from it; or a folder of banks, each named after
            its teacher. Recipes of other teachers run these.

    Raises:
        UserError: If a pattern names no recipe, a setting is not what it should be, or no recipe learns from the bank.
    """
    names: list[str] = []
    for pattern in patterns or ["*"]:
        hits = [name for name in list_recipes() if fnmatch(name, pattern)]
        if not hits:
            raise UserError(f"No recipe matches {pattern!r}: there are {', '.join(list_recipes())}.")
        names += [name for name in hits if name not in names]
    jobs = []
    for name in names:
        shipped = load_recipe(name)
        for seed in dict.fromkeys(seeds or [shipped.seed]):
            own = (*settings, f"seed={seed}")
            recipe = load_recipe(name, list(own))
            folder = output / f"{name}.seed{seed}"
            bank = _bank_for(recipe, teacher_bank) if teacher_bank is not None else None
            jobs.append(Job(name, recipe, own, folder, ships=recipe == shipped, teacher_bank=bank))
    if teacher_bank is not None and not any(job.teacher_bank for job in jobs):
        teachers = ", ".join(sorted({job.recipe.teacher for job in jobs} - {""})) or "none"
        raise UserError(
            f"{teacher_bank} is no bank of a teacher of these recipes, and holds none (teachers: {teachers}): "
            "leave --teacher-bank out, or let conam record-teacher write it."
        )
    return jobs


def _bank_for(recipe: Recipe, folder: Path) -> Path | None:
    if not recipe.teacher:
        return None
    if epoch_file(folder, 0).exists():
        return folder if _bank_teacher(folder) == recipe.teacher else None
    inner = folder / recipe.teacher
    return inner if epoch_file(inner, 0).exists() else None


@lru_cache
def _bank_teacher(folder: Path) -> object:
    facts = read_epoch(folder, 0)[1]
    return facts.get("recipe", {}).get("teacher")


def run_queue(
    jobs: Sequence[Job],
    data: str,
    *,
    parallel: int = 1,
    compile: bool = False,
    on_event: Callable[[Job, str], None] = lambda job, event: None,
    on_done: Callable[[Job], None] = lambda job: None,
    on_poll: Callable[[Sequence[Job]], None] = lambda running: None,
) -> dict[str, str]:
    """Train all jobs, several at a time; those that are done are not trained again.

    A job whose teacher is trained by other jobs of the queue waits for these, but for those that wait for it in turn,
    if there is another. SIGTERM, SIGINT and SIGHUP are handed on to the trainings, which save their state, and end the
    queue. The cores are shared out evenly.

    Args:
        jobs: What ``plan_queue`` gave.
        data: Where the data sets are; see ``conam_zoo.data.read_split``.
        parallel: Trainings at a time.
        compile: Train with ``torch.compile``.
        on_event: Called with a job and a word: ``started``, ``resumed``, ``done``, ``failed: ...``, ``is there``.
        on_done: Called once for each job that is done, before those that wait for it are started; its UserError makes
            the job a failed one.
        on_poll: Called with the jobs that run, several times a minute at least.

    Returns:
        For each job's name ``"done"``, ``"stopped"`` or why it failed.

    Raises:
        UserError: If the log of a job cannot be written.
    """
    results: dict[str, str] = {}
    waiting = list(jobs)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    teachers = _teachers(jobs)

    def finish(job: Job, event: str) -> None:
        try:
            on_done(job)
        except UserError as error:
            fail(job, error)
        else:
            results[job.name] = "done"
            on_event(job, event)

    def fail(job: Job, reason: object) -> None:
        results[job.name] = f"failed: {reason}"
        on_event(job, results[job.name])

    with _stop_requests() as stopping, _no_orphans(running):
        while waiting or running:
            moved = False
            for job in list(waiting):
                if stopping or len(running) >= parallel:
                    break
                if teachers[job].intersection((*waiting, *running)):
                    continue
                waiting.remove(job)
                moved = True
                if _is_done(job, fail):
                    finish(job, "is there")
                    continue
                if job.name in results:
                    continue
                command = job.command(data, compile)
                running[job] = _start(job, command, parallel)
                on_event(job, "resumed" if "--resume" in command else "started")
            if stopping:
                for process in running.values():
                    process.send_signal(signal.SIGTERM)
                waiting.clear()
            for job, process in list(running.items()):
                if stopping:
                    process.wait()
                if process.poll() is None:
                    continue
                del running[job]
                moved = True
                if process.returncode == 0 and _is_done(job, fail):
                    finish(job, "done")
                elif job.name in results:
                    continue
                elif stopping:
                    results[job.name] = "stopped"
                    on_event(job, "stopped")
                else:
                    fail(job, job.last_words())
            if waiting and not running and not moved:
                for job in waiting:
                    fail(job, f"its teacher {job.recipe.teacher} waits for it in turn")
                waiting.clear()
            on_poll(list(running))
            if running:
                time.sleep(POLL_SECONDS)
    return results


def _teachers(jobs: Sequence[Job]) -> dict[Job, set[Job]]:
    """For each job those that it waits for.

    The recipes of a net may be of several generations: an early one teaches a net that teaches a later one.
    """
    direct = {
        job: {other for other in jobs if other is not job and other.ships and other.weights == job.recipe.teacher}
        for job in jobs
    }

    def needs(job: Job) -> set[Job]:
        reached, frontier = set[Job](), [job]
        while frontier:
            new = direct[frontier.pop()] - reached
            reached |= new
            frontier += new
        return reached

    return {job: {other for other in found if job not in needs(other)} or found for job, found in direct.items()}


def _is_done(job: Job, fail: Callable[[Job, object], None]) -> bool:
    try:
        return job.is_done()
    except UserError as error:
        fail(job, error)
        return False


@contextmanager
def _no_orphans(running: dict[Job, "subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Whatever ends the queue, its trainings save their states and end before it."""
    try:
        yield
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


def _start(job: Job, command: list[str], parallel: int) -> subprocess.Popen[bytes]:
    make_folder(job.folder.parent)
    environment = dict(os.environ)
    if parallel > 1:  # else each would take all cores, on a GPU too
        share = str(max(1, (os.cpu_count() or 1) // parallel))
        environment |= dict.fromkeys(THREADS, share)
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # huge pages: 6 to 9 % faster on a CPU
    with open(job.log, "ab") as log:
        # A session of its own: Ctrl-C reaches the queue alone, whose one signal lets the training save its state.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that stays empty until a signal asks for an end."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    heard = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Training many recipes with one call, several at a time, each in a process, a run folder and a log file of its own.

A job that fails does not stop the others, and a queue that is called again goes on where the last one ended.
"""

import fnmatch
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from conam_zoo.errors import UserError
from conam_zoo.files import make_folder
from conam_zoo.training.checkpoint import has_checkpoint
from conam_zoo.training.recipe import Recipe, list_recipes, load_recipe, recipe_from_dict
from conam_zoo.training.run_folder import LOG, read_log, read_run
from conam_zoo.training.teacher_bank import epoch_file, read_epoch
from conam_zoo.weights import ManifestError, WeightsError

POLL_SECONDS = 0.5
PACE_EPOCHS = 5  # that the time left is reckoned from
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    epoch: int  # that is done
    epochs: int  # of the recipe
    top1_percent: float  # of the last epoch: on the held-out images if there are any, else on the training images
    held_out: bool  # which of the two it is
    seconds_left: float  # until the last epoch's end, at the pace of the last epochs


@dataclass(frozen=True, eq=False)
class Job:
    """One training of the queue."""

    recipe_name: str  # of the packaged recipe
    recipe: Recipe  # what it says, with the job's seed and settings
    settings: tuple[str, ...]  # that the job replaces in it
    folder: Path  # the run folder
    ships: bool  # whether its weights are those that the recipe ships: its own seed, nothing replaced
    teacher_bank: Path | None = None  # that holds its teacher's logits
    program: str = "conam_zoo"  # the module that is run, with the arguments of ``conam``

    @property
    def name(self) -> str:
        return f"{self.recipe_name}, seed {self.recipe.seed}"

    @property
    def weights(self) -> str:
        """Name of the weights that it trains."""
        return f"{self.recipe.model}.{self.recipe.dataset}"

    def is_done(self) -> bool:
        """Whether its run folder holds a finished run; a damaged record, or another recipe's run, is a UserError."""
        run = read_run(self.folder)
        if run is None or "recipe" not in run:
            return run is not None
        before, own = recipe_from_dict(run["recipe"], f"of {self.folder}").to_dict(), self.recipe.to_dict()
        if changed := ", ".join(key for key in own if before[key] != own[key]):
            raise UserError(
                f"{self.folder} holds a training by another recipe ({changed} differ): choose another --output, or "
                "remove it."
            )
        return True

    @property
    def log(self) -> Path:
        """What the training printed; beside the run folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def command(self, data: str, compile: bool = False) -> list[str]:
        """The command line that trains it, or goes on with it."""
        command = [sys.executable, "-m", self.program, "train", self.recipe_name]
        command += ["--data", data, "--output", str(self.folder)]
        command += [word for setting in self.settings for word in ("--set", setting)]
        command += ["--teacher-bank", str(self.teacher_bank)] if self.teacher_bank is not None else []
        command += ["--compile"] if compile else []
        return [*command, "--resume"] if has_checkpoint(self.folder) else command

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
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n") if self.log.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def plan_queue(
    patterns: Sequence[str],
    output: Path,
    *,
    seeds: Sequence[int] = (),
    settings: Sequence[str] = (),
    teacher_bank: Path | None = None,
) -> list[Job]:
    """The jobs of a queue: every packaged recipe that a pattern such as ``"resnet*"`` names, with every seed.

    No pattern means all recipes, no seed the recipe's own. ``output`` is the folder of the run folders.
    ``teacher_bank`` has logits of a teacher, for the recipes that learn from it, or is a folder of banks, each named
    after its teacher; recipes of other teachers run these.
    """
    names: dict[str, None] = {}
    for pattern in patterns or ["*"]:
        matching = fnmatch.filter(list_recipes(), pattern)
        if not matching:
            raise UserError(f"No recipe matches {pattern!r}: there are {', '.join(list_recipes())}.")
        names |= dict.fromkeys(matching)
    recorded = None  # the teacher whose bank it is, if it is one bank
    if teacher_bank is not None and epoch_file(teacher_bank, 0).exists():
        recorded = read_epoch(teacher_bank, 0)[1]["recipe"]["teacher"]

    def bank_of(teacher: str) -> Path | None:
        if teacher_bank is None or not teacher:
            return None
        if recorded is not None:
            return teacher_bank if teacher == recorded else None
        return teacher_bank / teacher if epoch_file(teacher_bank / teacher, 0).exists() else None

    jobs = []
    for name in names:
        shipped = load_recipe(name)
        for seed in dict.fromkeys(seeds or [load_recipe(name, list(settings)).seed]):
            own = (*settings, f"seed={seed}")
            recipe = load_recipe(name, list(own))
            folder = output / f"{name}.seed{seed}"
            jobs.append(Job(name, recipe, own, folder, ships=recipe == shipped, teacher_bank=bank_of(recipe.teacher)))
    if teacher_bank is not None and not any(job.teacher_bank for job in jobs):
        teachers = ", ".join(sorted({job.recipe.teacher for job in jobs} - {""})) or "none"
        raise UserError(
            f"{teacher_bank} is not a bank of a teacher of these recipes, and holds none (teachers: {teachers}): "
            "leave --teacher-bank out, or let conam record-teacher write it."
        )
    return jobs


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
    """Train all jobs, so many at a time; for each job's name it gives ``"done"``, ``"stopped"`` or why it failed.

    Those that are done are not trained again. A job whose teacher is trained by other jobs of the queue waits for
    these, but for those that wait for it in turn, if there is another. SIGTERM, SIGINT and SIGHUP are handed on to the
    trainings, which save their state, and end the queue. The cores are shared out evenly.

    Args:
        jobs: What ``plan_queue`` gave.
        data: Where the data sets are; see ``conam_zoo.data.read_split``.
        parallel: Trainings at a time.
        compile: Train with ``torch.compile``.
        on_event: Gets a job and ``started``, ``resumed``, ``done``, ``stopped``, ``failed: ...`` or ``is there``.
        on_done: Called once for each job that is done, before those that wait for it are started; its UserError,
            or what is wrong with weights or files, makes the job a failed one.
        on_poll: Gets the jobs that run, several times a minute at least.
    """
    results: dict[str, str] = {}
    waiting = list(jobs)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    teachers = _teachers(jobs)

    def settle(job: Job, result: str, event: str = "") -> None:
        results[job.name] = result
        on_event(job, event or result)

    def settled(job: Job, event: str) -> bool:
        """Whether a job needs no training any more: it is done, or its record or what is done with it is at fault."""
        try:
            if not job.is_done():
                return False
            on_done(job)
        except (UserError, ManifestError, WeightsError, OSError) as error:
            settle(job, f"failed: {error}")
        else:
            settle(job, "done", event)
        return True

    with stop_requests() as stopping, ExitStack() as stack:
        stack.callback(_end, running)  # whatever ends the queue
        while waiting or running:
            moved = False
            for job in list(waiting):
                if stopping or len(running) >= parallel:
                    break
                if teachers[job].intersection((*waiting, *running)):
                    continue
                waiting.remove(job)
                moved = True
                if lost := [teacher.name for teacher in teachers[job] if results.get(teacher.name) != "done"]:
                    settle(job, f"failed: its teacher {lost[0]} is not done")
                    continue
                if not settled(job, "is there"):
                    command = job.command(data, compile)
                    running[job] = _start(job, command, parallel)
                    on_event(job, "resumed" if "--resume" in command else "started")
            if stopping:
                waiting.clear()
                _end(running)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                moved = True
                if process.returncode == 0 and settled(job, "done"):
                    continue
                reason = job.last_words()
                if process.returncode < 0:  # it had no time to say so
                    reason = f"killed by {signal.Signals(-process.returncode).name}, see {job.log}"
                settle(job, "stopped" if stopping else f"failed: {reason}")
            if waiting and not running and not moved:
                for job in waiting:
                    settle(job, f"failed: it and its teacher {job.recipe.teacher} wait for each other")
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


def _start(job: Job, command: list[str], parallel: int) -> "subprocess.Popen[bytes]":
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


def _end(running: dict[Job, "subprocess.Popen[bytes]"]) -> None:
    """Let the trainings save their states, and wait for their ends."""
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    for process in running.values():
        process.wait()


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that stays empty until a signal asks for an end."""
    received: list[int] = []
    signals = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP
    heard = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

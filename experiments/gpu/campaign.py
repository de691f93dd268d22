"""The trainings of the plan, several at a time, until they are done or the time is up; and what is handed back.

The folder of the campaign holds all state: ``code``, a copy of the checkout in which the teachers are packed; ``data``;
``runs``; ``banks``; ``logs``; ``delivered.json``. The same call on the same folder goes on where the last one stopped.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from conam_zoo.errors import UserError
from conam_zoo.files import make_folder, write_atomically, write_text
from conam_zoo.training.checkpoint import CHECKPOINT
from conam_zoo.training.queue import stop_requests
from conam_zoo.training.recipe import list_recipes, load_recipe
from experiments.gpu.parts import MIB, write_parts
from experiments.gpu.plan import Task

PART_BYTES, MAX_FILES = 15 * MIB, 8
RECORDS = ("run.json", "recipe.toml", "log.csv", "curves.png")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.part")
LEFT_OUT_ON_TOP = ("runs", "data", "dist", "build", "tests")  # of the checkout
GRACE_SECONDS = 40.0  # for a training to finish its step and save
POLL_SECONDS, LOG_SECONDS = 0.2, 30.0


def prepare_code(checkout: Path, work: Path, length: str, settings: Sequence[str] = ()) -> None:
    """Copy the checkout into the campaign, once; ``settings`` replace those of every recipe in the copy, for a trial.

    A campaign that was begun with another ``length`` or other settings is refused, and so is one within the checkout.
    """
    if work.is_relative_to(checkout):
        raise UserError(f"{work} lies within the checkout: name a folder outside of it.")
    code, stated = work / "code", json.dumps({"length": length, "settings": list(settings)})
    marker = code / "settings.json"
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != stated:
            raise UserError(f"{work} was begun with another length or other settings: name another folder.")
        return
    shutil.rmtree(code, ignore_errors=True)  # half a copy

    def left_out(folder: str, names: list[str]) -> set[str]:
        return LEFT_OUT(folder, names).union(LEFT_OUT_ON_TOP if Path(folder) == checkout else ())

    shutil.copytree(checkout, code, ignore=left_out)
    if settings:
        for name in list_recipes():
            text = load_recipe(name, list(settings)).to_toml()
            write_text(code / "conam_zoo" / "training" / "recipes" / f"{name}.toml", text)
    write_text(marker, stated)


def run_tasks(
    tasks: Sequence[Task],
    work: Path,
    *,
    seconds: float,
    parallel: int,
    report: Callable[[str], None] = print,
    each_while: Callable[[], object] = lambda: None,
) -> dict[str, str]:
    """Run tasks in order until all are done, the time is up or a signal says so; then each saves its state.

    A task starts once its data set is there and the tasks it needs are done; one that is done already is skipped. One
    that fails is not tried again in this call, and blocks only those that need it. ``work`` is the folder of the
    campaign, ``parallel`` the number of processes at a time; ``report`` gets a line for each event, and ``each_while``
    is called every half minute. For each task the result is ``"done"``, ``"stopped"``, ``"waiting"`` or
    ``"failed: ..."``.
    """
    end, next_while = time.monotonic() + seconds, time.monotonic() + LOG_SECONDS
    state = {task.name: "done" if task.done.is_file() else "waiting" for task in tasks}
    running: dict[str, subprocess.Popen[bytes]] = {}
    by_name = {task.name: task for task in tasks}
    with stop_requests() as stopping:
        try:
            while time.monotonic() < end and not stopping:
                for task in tasks:
                    if len(running) < parallel and _can_start(task, state, work):
                        running[task.name] = _start(task, work, parallel)
                        state[task.name] = "running"
                        report(f"{task.name}: started")
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        state[name] = _ended(by_name[name], process.returncode, work)
                        report(f"{name}: {state[name]}")
                if not running and not any(_can_start(task, state, work) for task in tasks):
                    break
                if time.monotonic() > next_while:
                    each_while()
                    next_while += LOG_SECONDS
                time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.send_signal(signal.SIGTERM)
            last = time.monotonic() + GRACE_SECONDS
            for name, process in running.items():
                try:
                    process.wait(max(0.0, last - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                ended = _ended(by_name[name], process.returncode, work)
                state[name] = ended if ended == "done" else "stopped"
                report(f"{name}: {state[name]}")
    return state


def _can_start(task: Task, state: dict[str, str], work: Path) -> bool:
    here = (work / "data" / task.dataset).is_dir()
    return here and state[task.name] == "waiting" and all(state[need] == "done" for need in task.needs)


def _start(task: Task, work: Path, parallel: int) -> subprocess.Popen[bytes]:
    code = work / "code"
    threads = max(1, (os.cpu_count() or 1) // parallel)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled"),  # a training that goes on need not compile again
    }
    with _log(task, work).open("ab") as log:
        return subprocess.Popen(
            task.command(), cwd=code, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )


def _log(task: Task, work: Path) -> Path:
    return make_folder(work / "logs") / f"{task.name.replace(' ', '.')}.log"


def _ended(task: Task, code: int, work: Path) -> str:
    if code != 0:
        lines = [line.strip() for line in _log(task, work).read_text(encoding="utf-8", errors="replace").splitlines()]
        return f"failed: {next((line for line in reversed(lines) if line), 'it printed nothing')}"
    if task.run is None:
        write_text(task.done, "")
    return "done" if task.done.is_file() else "failed: it ended without its result"


def deliver_logs(work: Path, output: Path) -> Path:
    """Write ``logs.tar``: the log of every process, and log, recipe and result of every training."""
    files = sorted((work / "logs").glob("*.log")) + [
        run / name for run in sorted((work / "runs").glob("*")) for name in RECORDS if (run / name).is_file()
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file in files:
            tar.add(file, file.relative_to(work).as_posix())
    target = make_folder(output) / "logs.tar"
    write_atomically(target, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    return target


def deliver(
    tasks: Sequence[Task], work: Path, output: Path, *, limit_bytes: int, again: bool = False
) -> tuple[list[str], list[str]]:
    """Write the logs, then the finished trainings that were not handed back yet, then states of unfinished ones.

    With what is handed back, a campaign can continue on a fresh machine; banks are recorded again there, and unfinished
    students start over. ``output`` gets ``logs.tar`` and at most seven parts of 15 MiB, together of at most
    ``limit_bytes``, filled in the order of ``tasks``; with ``again`` what was handed back before comes once more. The
    result is the names of the trainings that were handed back, finished and unfinished, and of those that did not fit.
    """
    room = min(limit_bytes - deliver_logs(work, output).stat().st_size, (MAX_FILES - 1) * PART_BYTES) - MIB // 8
    record = work / "delivered.json"
    before = set(json.loads(record.read_text(encoding="utf-8"))) if record.is_file() and not again else set()
    trainings = [(task, task.run) for task in tasks if task.run is not None]
    finished = [(task.name, run) for task, run in trainings if task.done.is_file() and task.name not in before]
    # A student goes on only with the very bank that it began with, which is too large to hand back.
    alone = [(task, run) for task, run in trainings if not task.needs and not task.done.is_file()]
    begun = [(task.name, run) for task, run in alone if (run / CHECKPOINT).is_file()]
    members: list[Path] = []
    handed, left = [], []
    for names, candidates in (((*RECORDS, "final"), finished), ((*RECORDS, CHECKPOINT), begun)):
        for name, run in candidates:
            own = [run / part for part in names if (run / part).exists()]
            size = sum(f.stat().st_size + 2048 for part in own for f in (part, *part.rglob("*")) if f.is_file())
            if size <= room:
                room -= size
                members += own
                handed.append(name)
            else:
                left.append(name)
    if members:
        write_parts("results", members, work, output, PART_BYTES)
        write_text(record, json.dumps(sorted(before | ({name for name, _ in finished} & set(handed)))))
    return handed, left

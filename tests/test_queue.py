"""The queue: what it plans, in which order, what it does about failures, and that a second call goes on."""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import conam_zoo.cli.training as training_commands
from conam_zoo.errors import UserError
from conam_zoo.release.pack import PACKED
from conam_zoo.training.queue import Job, Progress, plan_queue, run_queue
from conam_zoo.training.recipe import list_recipes, load_recipe
from conam_zoo.training.teacher_bank import write_epoch
from conam_zoo.weights import ManifestError, WeightsError, dump_manifest, load_manifest

pytestmark = pytest.mark.slow

NAME = "resnet20_conam.cifar10"


def test_a_plan_has_every_recipe_that_a_pattern_names_with_every_seed(tmp_path: Path) -> None:
    own = plan_queue([], tmp_path)
    assert [job.recipe_name for job in own] == list_recipes()
    assert all(job.ships and job.recipe == load_recipe(job.recipe_name) for job in own)
    three = plan_queue([NAME, "resnet20_conam.cifar1?"], tmp_path, seeds=[0, 1, 2])
    assert [(job.recipe_name, job.recipe.seed, job.ships) for job in three] == [(NAME, s, s == 0) for s in range(3)]
    assert len({job.folder for job in three}) == 3
    (short,) = plan_queue([NAME], tmp_path, settings=["epochs=4"])
    assert (short.recipe.epochs, short.ships) == (4, False)
    with pytest.raises(UserError, match="No recipe matches 'vgg\\*'"):
        plan_queue(["vgg*"], tmp_path)
    with pytest.raises(UserError, match="no setting 'epohcs'"):
        plan_queue([NAME], tmp_path, settings=["epohcs=3"])


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue looks after its trainings every 20 ms, since here they take no longer."""
    monkeypatch.setattr("conam_zoo.training.queue.POLL_SECONDS", 0.02)


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the trainings by short scripts, one for each weights' name."""

    def act(scripts: dict[str, str]) -> None:
        def command(job: Job, *arguments: object) -> list[str]:
            prelude = f"import os, pathlib, signal, sys, time; folder = pathlib.Path({str(job.folder)!r})\n"
            done = "\nfolder.mkdir(parents=True, exist_ok=True); (folder / 'run.json').write_text('{}')"
            return [sys.executable, "-S", "-c", prelude + scripts.get(job.weights, "") + done]

        monkeypatch.setattr(Job, "command", command)

    return act


def _jobs(tmp_path: Path, **teachers: str) -> list[Job]:
    """One job for each ResNet, in the order given, with its teacher."""
    jobs = []
    for model, teacher in teachers.items():
        (job,) = plan_queue([f"{model}_conam.cifar100"], tmp_path)
        jobs.append(replace(job, recipe=replace(job.recipe, teacher=teacher and f"{teacher}_conam.cifar100")))
    return jobs


def test_the_packaged_recipes_form_a_queue_that_reaches_its_end(tmp_path: Path, acted: Callable[..., None]) -> None:
    acted({})
    jobs = plan_queue([], tmp_path)
    ended: list[Job] = []
    results = run_queue(jobs, "data", parallel=2, on_done=ended.append)
    assert set(results.values()) == {"done"}
    students = [job for job in jobs if job.recipe.teacher]
    assert students
    for student in students:
        teachers = [place for place, job in enumerate(ended) if job.weights == student.recipe.teacher]
        assert teachers
        # On CIFAR-10 early recipes of a teacher were taught by nets that later recipes of it teach.
        last = max(teachers) if student.recipe.dataset == "cifar100" else min(teachers)
        assert last < ended.index(student)
    by_name = {job.recipe_name: place for place, job in enumerate(ended)}
    assert by_name["wide_resnet16_4_conam.cifar10"] < by_name["resnet20_conam.cifar10.campaign"]
    assert by_name["resnet20_conam.cifar10"] < by_name["resnet56_conam.cifar10"]


def test_a_student_waits_for_its_teacher(tmp_path: Path, acted: Callable[..., None]) -> None:
    acted({"resnet110_conam.cifar100": "time.sleep(0.3)"})
    events: list[tuple[str, str]] = []
    jobs = _jobs(tmp_path, resnet32="resnet110", resnet44="", resnet110="")
    results = run_queue(jobs, "data", parallel=3, on_event=lambda job, event: events.append((job.weights, event)))
    assert set(results.values()) == {"done"}
    assert events.index(("resnet32_conam.cifar100", "started")) > events.index(("resnet110_conam.cifar100", "done"))
    assert events.index(("resnet44_conam.cifar100", "started")) < events.index(("resnet110_conam.cifar100", "done"))


def test_a_failure_stops_nothing_else_and_is_told(tmp_path: Path, acted: Callable[..., None]) -> None:
    acted({"resnet32_conam.cifar100": "print('conam: the disk is full'); sys.exit(2)"})
    jobs = _jobs(tmp_path, resnet32="", resnet44="")
    done: list[str] = []
    results = run_queue(jobs, "data", on_done=lambda job: done.append(job.weights))
    assert list(results.values()) == ["failed: conam: the disk is full", "done"]
    assert done == ["resnet44_conam.cifar100"]
    acted({})
    events: list[tuple[str, str]] = []
    again = run_queue(jobs, "data", on_event=lambda job, event: events.append((job.weights, event)))
    assert set(again.values()) == {"done"}
    assert ("resnet44_conam.cifar100", "is there") in events
    assert ("resnet32_conam.cifar100", "started") in events


def test_a_killed_training_is_told_from_one_that_failed(tmp_path: Path, acted: Callable[..., None]) -> None:
    acted({"resnet20_conam.cifar100": "print('epoch 1', flush=True); os.kill(os.getpid(), signal.SIGKILL)"})
    (job,) = _jobs(tmp_path, resnet20="")
    assert run_queue([job], "data") == {job.name: f"failed: killed by SIGKILL, see {job.log}"}


def test_compilation_is_handed_on(tmp_path: Path) -> None:
    (job,) = _jobs(tmp_path, resnet32="")
    assert "--compile" not in job.command("data")
    assert job.command("data", compile=True)[-1] == "--compile"


def test_teachers_of_each_other_are_told_instead_of_waited_for(tmp_path: Path, acted: Callable[..., None]) -> None:
    acted({})
    results = run_queue(_jobs(tmp_path, resnet32="resnet44", resnet44="resnet32"), "data")
    assert all("wait for each other" in result for result in results.values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_handed_on_and_ends_the_queue(
    number: signal.Signals, tmp_path: Path, acted: Callable[..., None]
) -> None:
    """Once: the trainings are no part of the process group that Ctrl-C goes to, and a second signal would end them."""
    saved = tmp_path / "saved"
    stop = f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit(143)))"
    ready = f"pathlib.Path({str(tmp_path / 'ready')!r}).write_text(str(os.getpgrp()))"
    acted({"resnet32_conam.cifar100": f"{stop}; {ready}; time.sleep(60)"})

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.default_int_handler
    inherited = signal.signal(number, before)  # under nohup SIGHUP would be ignored, here as in the queue
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        jobs = _jobs(tmp_path, resnet32="", resnet44="")
        assert run_queue(jobs, "data") == {jobs[0].name: "stopped"}
        assert saved.exists()
        assert (tmp_path / "ready").read_text() != str(os.getpgrp())
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, inherited)


def test_the_command_trains_two_seeds_and_a_second_call_finds_them_done(
    small_data: Path,
    tmp_path: Path,
    conam: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    warm_python: str,
) -> None:
    monkeypatch.setattr(sys, "executable", warm_python)
    short = [word for setting in ("epochs=1", "warmup_epochs=0", "batch_size=32") for word in ("--set", setting)]
    call = ["queue", NAME, "--data", small_data, "--output", tmp_path / "runs", "--seed", 0, "--seed", 1, *short]
    code, out, err = conam(*call, "--parallel", 2)
    assert code == 0, err
    assert out.count("started") == out.count(": done") == 2
    for seed in (0, 1):
        run = json.loads((tmp_path / "runs" / f"{NAME}.seed{seed}" / "run.json").read_text())
        assert (run["recipe"]["seed"], run["recipe"]["epochs"]) == (seed, 1)
    code, out, _ = conam(*call)
    assert (code, out.count("is there"), out.count("started")) == (0, 2, 0)
    code, out, _ = conam(*call, "--dry-run")
    assert (code, out.count("done")) == (0, 2)
    code, out, err = conam(*call, "--set", "epochs=2")
    assert (code, out.count("started")) == (1, 0)
    assert (out + err).count("another recipe (epochs differ)") == 2


def test_bad_calls_end_in_a_sentence(conam: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = conam("queue", NAME)
    assert (code, err.count("\n")) == (2, 1)
    assert "pass --data" in err
    code, _, err = conam("queue", "vgg*", "--data", tmp_path)
    assert code == 2
    assert "No recipe matches 'vgg*'" in err


def test_weights_that_are_in_the_manifest_are_not_trained_again(
    conam: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, _ = conam("queue", NAME, "--data", tmp_path, "--output", tmp_path / "runs")
    assert (code, out.strip()) == (0, "0 done, 1 in the manifest, 0 not done")


def test_a_damaged_record_fails_its_own_training_alone(tmp_path: Path, acted: Callable[..., None]) -> None:
    acted({})
    jobs = _jobs(tmp_path, resnet32="", resnet44="")
    jobs[0].folder.mkdir()
    (jobs[0].folder / "run.json").write_text("{")
    results = run_queue(jobs, "data", parallel=2)
    assert "run.json is not a run record" in results[jobs[0].name]
    assert results[jobs[1].name] == "done"


def test_an_error_of_the_queue_leaves_no_training_behind(tmp_path: Path, acted: Callable[..., None]) -> None:
    write = f"import os; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    acted({"resnet44_conam.cifar100": f"{write}; time.sleep(60)"})

    def on_done(job: Job) -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
        raise KeyError(job.name)

    with pytest.raises(KeyError):
        run_queue(_jobs(tmp_path, resnet32="", resnet44=""), "data", parallel=2, on_done=on_done)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_each_training_gets_its_share_of_the_threads_and_huge_pages(
    tmp_path: Path, acted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    names = "'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'GLIBC_TUNABLES'"
    acted({"resnet32_conam.cifar100": f"print(*(__import__('os').environ[name] for name in ({names})))"})
    (job,) = _jobs(tmp_path, resnet32="")
    run_queue([job], "data", parallel=4)
    assert job.last_words() == "2 2 glibc.malloc.hugetlb=1"


LOG = "epoch,lr,loss,train_top1_percent,holdout_top1_percent,seconds\n"


def test_a_job_tells_how_far_it_is(tmp_path: Path) -> None:
    (job,) = plan_queue([NAME], tmp_path, settings=["epochs=10"])
    assert job.progress() is None
    job.folder.mkdir()
    log = job.folder / "log.csv"
    log.write_text(LOG + "1,0.1,2.0,20.5,,100\n2,0.1,1.5,40.25,,60\n")
    os.utime(log, (time.time() + 5, time.time() + 5))  # nothing of the third epoch has passed
    assert job.progress() == Progress(2, 10, 40.25, False, 640.0)
    log.write_text(LOG + "1,0.1,2.0,20.5,31.5,100\n")
    os.utime(log, (time.time() - 1000, time.time() - 1000))  # an epoch that takes longer is reckoned as at its end
    assert job.progress() == Progress(1, 10, 31.5, True, 800.0)
    for damaged in ("", "epoch\n", LOG + "x,,,,,\n", LOG + "1\n", "\0"):
        log.write_text(damaged)
        assert job.progress() is None


def test_the_command_prints_a_line_for_each_epoch_of_each_training(
    tmp_path: Path,
    acted: Callable[..., None],
    conam: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = "1,0.1,2.0,20.5,,7200"
    wait = "while not (folder / 'seen').exists(): time.sleep(0.01)"
    acted({NAME: f"folder.mkdir(parents=True); (folder / 'log.csv').write_text({LOG + row!r})\n{wait}"})
    show = training_commands._show

    def show_and_tell(running, out, live, reported) -> None:
        show(running, out, live, reported)
        for job in running:
            if job.name in reported:
                (job.folder / "seen").touch()

    monkeypatch.setattr(training_commands, "_show", show_and_tell)
    call = ["queue", NAME, "--data", tmp_path, "--output", tmp_path / "runs", "--set", "epochs=2", "--seed", 3]
    code, out, err = conam(*call, "--set", "warmup_epochs=0")
    assert code == 0, err
    (line,) = [line for line in out.split("\n") if "epoch 1/2" in line]
    assert line.startswith(f"{NAME}, seed 3: epoch 1/2, 20.50 % training, ")
    assert re.fullmatch(r"(2:00:00|1:59:\d\d) left", line.split(", ")[-1])


def test_a_bank_is_handed_to_the_recipes_of_its_teacher(tmp_path: Path) -> None:
    teacher, bank = "wide_resnet16_4_conam.cifar100", tmp_path / "bank"
    facts = {"recipe": {"teacher": teacher}, "teacher": {}, "epochs": 1, "computed_in": "fp32"}
    write_epoch(bank, 0, torch.zeros(2, 100, dtype=torch.float16), facts)
    patterns = ["resnet32_conam.*", "wide_resnet16_4_conam.cifar100"]
    jobs = plan_queue(patterns, tmp_path / "runs", teacher_bank=bank)
    given = {job.recipe_name: job.command("data") for job in jobs}
    assert [name for name, command in given.items() if "--teacher-bank" in command] == ["resnet32_conam.cifar100"]
    command = given["resnet32_conam.cifar100"]
    assert command[command.index("--teacher-bank") + 1] == str(bank)
    bank.rename(tmp_path / teacher)
    jobs = plan_queue(patterns, tmp_path / "runs", teacher_bank=tmp_path)
    assert {job.teacher_bank for job in jobs if job.recipe.teacher == teacher} == {tmp_path / teacher}
    assert not any("--teacher-bank" in job.command("data") for job in plan_queue(patterns, tmp_path / "runs"))
    with pytest.raises(UserError, match=r"teachers: wide_resnet16_4_conam\.cifar10\)"):
        plan_queue(["resnet32_conam.cifar10"], tmp_path / "runs", teacher_bank=tmp_path)


def test_two_seeds_have_logs_of_their_own(tmp_path: Path) -> None:
    assert len({job.log for job in plan_queue([NAME], tmp_path, seeds=[0, 1])}) == 2


def test_a_student_does_not_start_after_its_teacher_failed(tmp_path: Path, acted: Callable[..., None]) -> None:
    acted({"resnet110_conam.cifar100": "sys.exit(2)"})
    jobs = _jobs(tmp_path, resnet32="resnet110", resnet44="", resnet110="")
    results = run_queue(jobs, "data", parallel=2)
    assert results[jobs[0].name] == f"failed: its teacher {jobs[2].name} is not done"
    assert results[jobs[1].name] == "done"
    assert not jobs[0].folder.exists()


@pytest.mark.parametrize("error", [ManifestError("it has a typo"), WeightsError("no"), OSError("the disk is full")])
def test_what_is_done_with_a_training_may_fail_alone(
    tmp_path: Path, acted: Callable[..., None], error: Exception
) -> None:
    acted({})
    jobs = _jobs(tmp_path, resnet32="", resnet44="")

    def on_done(job: Job) -> None:
        if job is jobs[0]:
            raise error

    assert list(run_queue(jobs, "data", on_done=on_done).values()) == [f"failed: {error}", "done"]


def test_a_seed_among_the_settings_is_taken(tmp_path: Path) -> None:
    (job,) = plan_queue([NAME], tmp_path, settings=["seed=5"])
    assert (job.recipe.seed, job.folder.name, job.ships) == (5, f"{NAME}.seed5", False)


@pytest.fixture
def in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put weights of resnet32_conam.cifar100 with these facts into the manifest of the checkout, or with none, none."""
    monkeypatch.setattr("conam_zoo.release.documents.our_checkout", lambda: tmp_path)

    def put(**facts: Any) -> None:
        name, there = "resnet32_conam.cifar100", load_manifest()
        entry = replace(there.entry("resnet20_conam.cifar100"), name=name, repository=name, **facts)
        path = tmp_path / "weights_manifest.json"
        dump_manifest(replace(there, entries={name: entry} if facts else {}), path)

    put()
    return put


def test_the_recipe_s_own_seed_alone_is_packed_and_once(
    conam: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    acted: Callable[..., None],
    in_the_manifest: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = "folder.mkdir(parents=True); (folder / 'run.json').write_text('{\"sha256\": \"ab\"}'); sys.exit(0)"
    acted({"resnet32_conam.cifar100": write})
    packed: list[str] = []

    def pack(run: Path, data: object) -> None:
        packed.append(run.name)
        (run / PACKED).write_text("ab")
        in_the_manifest(recipe="resnet32_conam.cifar100")

    monkeypatch.setattr("conam_zoo.cli.publishing.pack", pack)
    arguments = ["queue", "resnet32_conam.cifar100", "--seed", "0", "--seed", "1", "--data", tmp_path]
    for _ in range(2):
        code, out, err = conam(*arguments, "--output", tmp_path / "runs")
        assert code == 0, err
        assert out.splitlines()[-1] == "2 done, 0 in the manifest, 0 not done"
    assert packed == ["resnet32_conam.cifar100.seed0"]
    in_the_manifest()  # as in another checkout, or after weights and manifest were put back
    conam(*arguments, "--output", tmp_path / "runs")
    assert packed == ["resnet32_conam.cifar100.seed0"] * 2


def test_a_longer_training_is_not_replaced_by_a_shorter_one(
    conam: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    acted: Callable[..., None],
    in_the_manifest: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "resnet32_conam.cifar100"
    acted({})
    folder = tmp_path / "runs" / f"{name}.seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"sha256": "ab"}')
    monkeypatch.setattr("conam_zoo.cli.publishing.pack", lambda run, data: pytest.fail("packed"))
    in_the_manifest(recipe=f"{name}.long", epochs=300)  # by another process: this one has read the manifest before
    code, out, err = conam("queue", name, "--data", tmp_path, "--output", tmp_path / "runs")
    assert code == 0, err
    said = f"not packed: the manifest has weights of {name}.long, trained for 300 epochs"
    assert said in " ".join(out.split())


def test_a_damaged_record_does_not_stop_the_command(
    conam: Callable[..., tuple[int, str, str]], tmp_path: Path, acted: Callable[..., None]
) -> None:
    acted({})
    folder = tmp_path / "runs" / "resnet32_conam.cifar100.seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{")
    arguments = ["queue", "resnet32_conam.cifar100", "--data", tmp_path, "--output", tmp_path / "runs"]
    code, out, _ = conam(*arguments, "--dry-run")
    assert code == 0
    assert "is not a run record" in " ".join(out.split())
    code, out, _ = conam(*arguments)
    assert (code, out.splitlines()[-1]) == (1, "0 done, 0 in the manifest, 1 not done")

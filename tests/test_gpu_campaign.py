"""Training on a GPU that is lent for a limited time: parts, order, interruptions, what is handed back."""

import json
import os
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_arrays

from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.training.recipe import Recipe, load_recipe
from experiments.gpu.campaign import deliver, deliver_logs, prepare_code, run_tasks
from experiments.gpu.parts import MIB, join_parts, write_parts
from experiments.gpu.plan import NETS, Task, plan_tasks

TRIAL = [
    "epochs=1", "warmup_epochs=0", "batch_size=16", "cutout=0", "early_epochs=0",
    "early_size=0", "ema_decay=0.9",
]  # fmt: skip


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign looks after its processes every 20 ms, since here they take no longer."""
    monkeypatch.setattr("experiments.gpu.campaign.POLL_SECONDS", 0.02)


@pytest.fixture
def work(tmp_path: Path, checkout: Path) -> Path:
    """A campaign's folder with the packaged recipes, the data and nothing else."""
    recipes = tmp_path / "work" / "code" / "conam_zoo" / "training" / "recipes"
    recipes.mkdir(parents=True)
    for path in (checkout / "conam_zoo" / "training" / "recipes").glob("*.toml"):
        (recipes / path.name).write_bytes(path.read_bytes())
    for dataset in ("cifar10", "cifar100"):
        (tmp_path / "work" / "data" / dataset).mkdir(parents=True)
    return tmp_path / "work"


def _task(work: Path, name: str, script: str = "", needs: tuple[str, ...] = (), dataset: str = "cifar10") -> Task:
    """A training that runs a script and leaves what a training leaves."""
    run = work / "runs" / name
    prelude = (
        f"import pathlib, signal, sys, time; run = pathlib.Path({str(run)!r}); run.mkdir(parents=True, exist_ok=True)\n"
    )
    done = (
        "\n(run / 'final').mkdir(); (run / 'final' / 'w').write_bytes(bytes(1000)); (run / 'run.json').write_text('{}')"
    )
    return Task(
        name, dataset, lambda: [sys.executable, "-S", "-c", prelude + script + done], run / "run.json", needs, run
    )


def test_parts_come_in_any_number_of_calls_and_are_checked(tmp_path: Path) -> None:
    source, out, work = tmp_path / "a", tmp_path / "parts", tmp_path / "work"
    (source / "cifar10").mkdir(parents=True)
    content = bytes(range(256)) * 40
    (source / "cifar10" / "train.npy").write_bytes(content)
    parts = write_parts("cifar10", [source / "cifar10"], source, out, 4096, prefix=Path("data"))
    assert len(parts) > 2
    assert all(part.stat().st_size <= 4096 for part in parts)
    assert sorted(out.iterdir()) == parts
    last = parts.pop().rename(tmp_path / "last")
    assert join_parts(out, work) == ([], [f"cifar10: {len(parts)} of {len(parts) + 1} parts"])
    carried = tmp_path / "second"
    carried.mkdir()
    whole = last.read_bytes()
    name = parts[0].name.replace(".00-of", f".{len(parts):02d}-of")
    (carried / name).write_bytes(whole[:-1] + b"\x01")
    (source / "log.txt").write_text("sound")
    write_parts("logs", [source / "log.txt"], source, carried, MIB)
    with pytest.raises(UserError, match="parts of cifar10 are damaged"):
        join_parts(carried, work)
    assert not (work / "data").exists()
    assert (work / "log.txt").read_text() == "sound"  # another archive's damage costs it nothing
    join_parts(out, work)
    (carried / name).write_bytes(whole)
    unpacked, missing = join_parts(carried, work)
    assert (sorted(unpacked), missing) == (["cifar10", "logs"], [])
    assert (work / "data" / "cifar10" / "train.npy").read_bytes() == content
    assert list((work / "parts").iterdir()) == []
    with pytest.raises(UserError, match="holds no part"):
        join_parts(tmp_path / "nowhere", work)


def test_a_hundred_parts_and_more_are_joined_in_their_order(tmp_path: Path) -> None:
    source, out, work = tmp_path / "a", tmp_path / "parts", tmp_path / "work"
    source.mkdir()
    (source / "x").write_bytes(os.urandom(101 * 512))
    assert len(write_parts("x", [source / "x"], source, out, 512)) > 100
    assert join_parts(out, work) == (["x"], [])
    assert (work / "x").read_bytes() == (source / "x").read_bytes()


def test_of_two_deliveries_of_a_run_the_newer_one_is_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "a", tmp_path / "out"
    source.mkdir()
    for order in range(4):  # in some of these the newer archive has the smaller hash, in some the larger
        for state, age in (("older", 1_000), ("newer", 2_000)):
            (source / "log").write_text(f"{state} {order}")
            os.utime(source / "log", (age, age))
            write_parts("results", [source / "log"], source, out, 4096)
        assert join_parts(out, tmp_path / "work") == (["results", "results"], [])
        assert (tmp_path / "work" / "log").read_text() == f"newer {order}"
        for part in out.iterdir():
            part.unlink()


def test_a_student_reads_the_same_bank_whoever_else_is_named(work: Path) -> None:
    def bank_of(net: str, nets: list[str]) -> tuple[str, ...]:
        (task,) = (task for task in plan_tasks(work, nets=nets) if task.name == net)
        return task.needs

    teacher, student = "wide_resnet16_4_conam.cifar10", "resnet20_conam.cifar10"
    (bank,) = bank_of(student, list(NETS))
    assert bank_of(student, [teacher, student]) == (bank,)
    record, _ = plan_tasks(work, nets=[student])
    assert record.name != bank  # it is that of the shipped teacher
    assert bank_of(student, [student]) == (record.name,)
    assert record.needs == ()
    (work / "runs" / teacher).mkdir(parents=True)
    (work / "runs" / teacher / "run.json").touch()
    assert bank_of(student, [student]) == (bank,)
    assert {task.name: task for task in plan_tasks(work, nets=[student])}[bank].needs == (f"{teacher} packed",)


def test_the_plan_is_teachers_banks_students_in_the_tables_order(work: Path) -> None:
    tasks = plan_tasks(work)
    names = [task.name for task in tasks]
    assert names[:2] == list(NETS)[:2]
    assert names[2:4] == [f"{net} packed" for net in list(NETS)[:2]]
    assert [name for name in names[4:] if "bank" not in name] == list(NETS)[2:]
    by_name = {task.name: task for task in tasks}
    banks = [task for task in tasks if "bank" in task.name]
    assert [task.needs[0] for task in banks] == [
        "wide_resnet16_4_conam.cifar100 packed",
        "wide_resnet16_4_conam.cifar10 packed",
        "wide_resnet16_4_conam.cifar100 packed",
    ]
    # One bank serves all students that see the same batches, plain twins among them.
    needs = {name: by_name[name].needs for name in NETS}
    assert needs["resnet20_conam.cifar10"] == needs["resnet56_conam.cifar10"] == needs["resnet20_conam.cifar10 plain"]
    assert needs["resnet20_conam.cifar100"] != needs["resnet56_conam.cifar100"]
    assert needs["resnet18_conam.cifar10"] == ()
    command = by_name["resnet20_conam.cifar10 plain"].command()
    assert command[command.index("--set") + 1] == 'model_args={attn_layer = "none"}'
    assert command[command.index("--teacher-bank") + 1].endswith(needs["resnet20_conam.cifar10"][0])
    assert "--resume" not in command
    assert "resnet20_conam.cifar10.campaign" in command
    assert banks[0].command()[-2:] == ["--epochs", "100"]


def test_long_recipes_are_taken_on_request_and_bad_choices_refused(work: Path) -> None:
    net = "wide_resnet16_4_conam.cifar10"
    for length, recipe in (("campaign", net), ("long", f"{net}.long")):
        (task,) = plan_tasks(work, nets=[net], length=length)
        assert recipe in task.command()
    record, task = plan_tasks(work, nets=["resnet56_conam.cifar100"], compile=True)
    assert task.needs == (record.name,)
    assert task.command()[-1] == "--compile"
    with pytest.raises(UserError, match="'resnet21' is not in the table"):
        plan_tasks(work, nets=["resnet21"])
    with pytest.raises(UserError, match="--length is 'short'"):
        plan_tasks(work, length="short")
    with pytest.raises(UserError, match="--bank-epochs is 33"):
        plan_tasks(work, bank_epochs=33)


def test_tasks_wait_for_what_they_need_and_failures_hold_up_no_others(work: Path) -> None:
    told: list[str] = []
    (work / "data" / "cifar100").rmdir()
    tasks = [
        _task(work, "student", "assert pathlib.Path(run.parent / 'teacher' / 'run.json').is_file()", ("teacher",)),
        _task(work, "teacher"),
        _task(work, "broken", "print('conam: no memory'); sys.exit(2)"),
        _task(work, "pupil", "", ("broken",)),
        _task(work, "other data", dataset="cifar100"),
    ]
    state = run_tasks(tasks, work, seconds=60, parallel=2, report=told.append)
    assert state == {
        "student": "done", "teacher": "done", "broken": "failed: conam: no memory", "pupil": "waiting",
        "other data": "waiting",
    }  # fmt: skip
    assert told.index("student: started") > told.index("teacher: done")
    again = run_tasks([*tasks[:2], replace(_task(work, "broken"), needs=())], work, seconds=60, parallel=2)
    assert set(again.values()) == {"done"}


def test_a_signal_ends_the_call_and_trainings_save(work: Path) -> None:
    script = "signal.signal(15, lambda *_: ((run / 'checkpoint.safetensors').write_bytes(b'x'), sys.exit(143)))\n"
    script += "import os; os.kill(os.getppid(), 15); time.sleep(60)"
    tasks = [_task(work, "long", script), _task(work, "next")]
    assert run_tasks(tasks, work, seconds=60, parallel=1) == {"long": "stopped", "next": "waiting"}
    assert (work / "runs" / "long" / "checkpoint.safetensors").is_file()


@pytest.mark.slow
def test_when_the_time_is_up_trainings_save_and_the_next_call_goes_on(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "signal.signal(15, lambda *_: ((run / 'checkpoint.safetensors').write_bytes(b'x'), sys.exit(143)))\n"
    script += "(run / 'began').touch()\nif not (run / 'checkpoint.safetensors').exists(): time.sleep(60)"
    began = work / "runs" / "long" / "began"
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: 100.0 * began.exists())  # the time is up once it began
    with monkeypatch.context() as patch:
        patch.setattr("experiments.gpu.campaign.time", clock)
        state = run_tasks([_task(work, "long", script)], work, seconds=50, parallel=1)
    assert state == {"long": "stopped"}
    assert (work / "runs" / "long" / "checkpoint.safetensors").is_file()
    assert run_tasks([_task(work, "long", script)], work, seconds=60, parallel=1) == {"long": "done"}


def test_what_is_handed_back_fits_and_is_handed_back_once(work: Path, tmp_path: Path) -> None:
    tasks = [_task(work, "first"), _task(work, "second"), _task(work, "third"), _task(work, "student", "", ("bank",))]
    run_tasks(tasks[:2], work, seconds=60, parallel=2)
    for name in ("third", "student"):
        (work / "runs" / name).mkdir()
        (work / "runs" / name / "checkpoint.safetensors").write_bytes(b"state")
    room = deliver_logs(work, tmp_path / "sizes").stat().st_size + MIB // 8 + 6000  # of one training
    assert deliver(tasks, work, tmp_path / "out1", limit_bytes=room) == (["first"], ["second", "third"])
    assert deliver(tasks, work, tmp_path / "out2", limit_bytes=50 * MIB) == (["second", "third"], [])
    assert deliver(tasks, work, tmp_path / "out3", limit_bytes=50 * MIB) == (["third"], [])
    assert deliver(tasks, work, tmp_path / "out4", limit_bytes=50 * MIB, again=True)[0] == ["first", "second", "third"]
    with tarfile.open(tmp_path / "out1" / "logs.tar") as tar:
        assert sorted(tar.getnames()) == [
            "logs/first.log", "logs/second.log", "runs/first/run.json", "runs/second/run.json",
        ]  # fmt: skip
    fresh = tmp_path / "fresh"
    assert join_parts(tmp_path / "out4", fresh) == (["results"], [])
    assert (fresh / "runs" / "first" / "final" / "w").stat().st_size == 1000
    assert (fresh / "runs" / "third" / "checkpoint.safetensors").read_bytes() == b"state"


def test_the_code_is_copied_once_and_a_trial_changes_its_recipes(tmp_path: Path, checkout: Path) -> None:
    work = tmp_path / "work"
    settings = ["epochs=1", "warmup_epochs=0", "early_epochs=0", "early_size=0"]
    prepare_code(checkout, work, "campaign", settings)
    recipe = load_recipe(str(work / "code/conam_zoo/training/recipes/resnet20_conam.cifar10.toml"))
    assert isinstance(recipe, Recipe)
    assert (recipe.epochs, recipe.model) == (1, "resnet20_conam")
    assert (work / "code" / "weights_manifest.json").is_file()
    packages = {path.parent.relative_to(checkout) for path in (checkout / "conam_zoo").rglob("__init__.py")}
    assert all((work / "code" / package / "__init__.py").is_file() for package in packages)
    assert not any((work / "code" / name).exists() for name in (".git", "tests"))
    for length, others in (("campaign", []), ("long", settings)):
        with pytest.raises(UserError, match="begun with another length or other settings"):
            prepare_code(checkout, work, length, others)
    with pytest.raises(UserError, match="lies within the checkout"):
        prepare_code(checkout, checkout / "campaign", "campaign")


@pytest.mark.slow
def test_a_trial_on_the_cpu_goes_through_teacher_bank_and_student(
    experiments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_python: str
) -> None:
    monkeypatch.setattr(sys, "executable", warm_python)
    write_arrays(tmp_path / "data" / "cifar10", DATASETS["cifar10"].classes, {"train": 32, "test": 40})
    write_arrays(tmp_path / "data" / "cifar100", DATASETS["cifar100"].classes, {"train": 100, "test": 100})
    work, out = tmp_path / "work", tmp_path / "out"
    assert experiments("gpu", "split", tmp_path / "data", tmp_path / "parts")[0] == 0
    code, printed, _ = experiments("gpu", "take", tmp_path / "parts", work)
    assert (code, printed.split("\n")[:2]) == (0, ["cifar10: unpacked", "cifar100: unpacked"])
    trial = [word for setting in TRIAL for word in ("--set", setting)]
    nets = ["--net", "wide_resnet16_4_conam.cifar10", "--net", "resnet20_conam.cifar10"]
    code, printed, _ = experiments("gpu", "train", work, "--out", out, "--minutes", 5, "--parallel", 1, *nets, *trial)
    assert (code, printed.count(": done, handed back")) == (0, 2), printed
    home = tmp_path / "home"
    assert experiments("gpu", "take", out, home)[0] == 0
    runs = {run.name: json.loads((run / "run.json").read_text()) for run in (home / "runs").iterdir()}
    student = runs["resnet20_conam.cifar10.campaign"]
    assert student["teacher"]["name"] == "wide_resnet16_4_conam.cifar10"
    assert student["teacher_bank"]["epochs"] == 1
    entry = json.loads((work / "code" / "weights_manifest.json").read_text())["entries"][
        "wide_resnet16_4_conam.cifar10"
    ]
    assert student["teacher"]["sha256"] == entry["sha256"]
    assert entry["epochs"] == 1

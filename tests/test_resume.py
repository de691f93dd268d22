"""Stopping a training in every way there is, and going on as if it had never been stopped."""

import copy
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAIN_RECIPE
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from conam_zoo.errors import UserError
from conam_zoo.training.checkpoint import (
    CHECKPOINT,
    PREVIOUS,
    StopRequest,
    TrainingStopped,
    load_checkpoint,
    save_checkpoint,
)
from conam_zoo.training.recipe import Recipe, load_recipe
from conam_zoo.training.train import train
from conam_zoo.training.train_state import TrainState, check_optimizer

pytestmark = [pytest.mark.slow, pytest.mark.forks, pytest.mark.usefixtures("no_curves")]

EPOCHS, STEPS, KILLS = 3, 6, 10


@pytest.fixture
def tiny_data(tmp_path: Path) -> Path:
    """44 training images: five batches of 8, and one of 4."""
    from conftest import write_arrays

    from conam_zoo.datasets import DATASETS

    write_arrays(tmp_path / "data" / "cifar10", DATASETS["cifar10"].classes, {"train": 44, "test": 20})
    return tmp_path / "data"


@pytest.fixture
def recipe() -> Recipe:
    """Everything on that draws random numbers or keeps a state."""
    settings = ["batch_size=8", "warmup_epochs=0.5", "ema_decay=0.5", "cutout=8", "mixup=0.2", "cutmix=1.0"]
    recipe = load_recipe(PLAIN_RECIPE, [f"epochs={EPOCHS}", *settings])
    return replace(recipe, model_args={"drop_rate": 0.2})


def in_a_child(work: Callable[[], object]) -> int:
    """Run something in a forked process, which needs no new import of torch; gives its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def same_weights(one: Path, other: Path) -> bool:
    folders = [path.relative_to(one) for path in one.glob("*/model.safetensors")]
    assert len(folders) == 2  # final/ and raw/
    pairs = [(load_file(one / path), load_file(other / path)) for path in folders]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a.keys() | b.keys())


def log_without_times(run: Path) -> list[str]:
    return [line.rpartition(",")[0] for line in (run / "log.csv").read_text().splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills_at_random_moments_change_nothing(
    recipe: Recipe, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at moments drawn over the whole training, saving included; every step's state is saved."""
    import matplotlib.figure  # noqa: F401 (which every fork would import anew)
    import torch.utils.tensorboard

    monkeypatch.undo()  # here the curves are drawn: a kill may come then, too
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads
    try:
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        started = time.monotonic()
        child = in_a_child(lambda: train(recipe, tiny_data, whole, checkpoint_minutes=0))
        assert os.waitpid(child, 0)[1] == 0
        duration = time.monotonic() - started
        draw, reach = random.Random(0), duration / 3
        killed, places = 0, set()
        for attempt in range(200):
            resume = (cut / CHECKPOINT).exists() or (cut / PREVIOUS).exists()
            child = in_a_child(lambda resume=resume: train(recipe, tiny_data, cut, resume=resume, checkpoint_minutes=0))
            if killed < KILLS:
                time.sleep(draw.uniform(0, reach))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if status == signal.SIGKILL:
                killed += 1
                state = (cut / CHECKPOINT).read_bytes() if (cut / CHECKPOINT).exists() else b""
                reach *= 1.3 if state in places else 1  # a machine that has become slower is given more time
                places.add(state)
            elif (cut / "run.json").exists() and killed >= KILLS:
                assert status == 0
                break
            else:
                assert status == 0, f"attempt {attempt} failed"  # done before its kill: begin again, with other moments
                shutil.rmtree(cut)
        assert killed == KILLS
        assert len(places) > 2  # not all of them before the first step
    finally:
        torch.set_num_threads(threads)
    assert same_weights(whole, cut)
    assert log_without_times(whole) == log_without_times(cut)
    assert {path.name for path in cut.iterdir() if path.name.startswith(".")} <= {".conam-lock", ".conam-holder"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state_and_the_training_goes_on_to_the_same_weights(
    number: signal.Signals, recipe: Recipe, tiny_data: Path, tmp_path: Path, stop_after
) -> None:
    handler = signal.getsignal(number)
    whole = train(recipe, tiny_data, tmp_path / "whole")
    stop_after(STEPS + 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(
        TrainingStopped, match=f"{number.name} stopped the training in epoch 2 after step 3:.*--resume"
    ) as stop:
        train(recipe, tiny_data, tmp_path / "cut")
    assert stop.value.exit_code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert signal.getsignal(number) is handler
    assert not (tmp_path / "cut" / "run.json").exists()
    facts = load_checkpoint(tmp_path / "cut" / CHECKPOINT)["facts"]
    assert (facts["epoch"], facts["step"], facts["sums"]["seen"]) == (1, 3, 24)
    resumed = train(recipe, tiny_data, tmp_path / "cut", resume=True)
    assert (resumed["sha256"], resumed["other_sha256"]) == (whole["sha256"], whole["other_sha256"])
    assert resumed["scores"] == whole["scores"]
    assert log_without_times(tmp_path / "cut") == log_without_times(tmp_path / "whole")


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_the_resumed_run(
    recipe: Recipe, tiny_data: Path, tmp_path: Path, stop_after
) -> None:
    recipe = replace(recipe, epochs=1, warmup_epochs=0.0)
    stop_after(STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStopped, match="in epoch 1 after step 6"):
        train(recipe, tiny_data, tmp_path / "run")
    run = train(recipe, tiny_data, tmp_path / "run", resume=True)
    assert run["scores"]["nll"] > 0
    assert len(log_without_times(tmp_path / "run")) == 2


def test_further_sigterms_do_not_keep_the_state_from_being_saved(
    recipe: Recipe, tiny_data: Path, tmp_path: Path, stop_after
) -> None:
    def twice() -> None:
        for _ in range(2):  # as systemd sends them, to the queue and to its training
            os.kill(os.getpid(), signal.SIGTERM)

    stop_after(2, twice)
    with pytest.raises(TrainingStopped, match="SIGTERM stopped the training in epoch 1 after step 2"):
        train(recipe, tiny_data, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["facts"]["step"] == 2


@pytest.mark.parametrize("opt", ["novograd", "adafactorbv"])
def test_an_optimiser_with_an_unusual_state_resumes(
    opt: str, recipe: Recipe, tiny_data: Path, tmp_path: Path, stop_after
) -> None:
    """One moment for a whole tensor; a type among its settings."""
    recipe = replace(recipe, opt=opt, lr=1e-3)
    whole = train(recipe, tiny_data, tmp_path / "whole")
    stop_after(STEPS + 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStopped):
        train(recipe, tiny_data, tmp_path / "cut")
    assert train(recipe, tiny_data, tmp_path / "cut", resume=True)["sha256"] == whole["sha256"]


def test_tuples_and_a_generator_in_the_state_of_an_optimiser_come_back(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm.optim.kron.has_opt_einsum", False)
    with pytest.raises(UserError, match=r"The optimiser kron cannot be used here .*: install opt_einsum, or choose"):
        check_optimizer(replace(recipe, opt="kron"))
    recipe, weights = replace(recipe, opt="kron", ema_decay=0.0), torch.nn.Linear(3, 2)
    states = [TrainState(copy.deepcopy(weights), recipe, 10) for _ in range(2)]
    for number in range(6):
        if number == 3:
            save_checkpoint(
                tmp_path / CHECKPOINT, model=states[0].model, ema=None, optimizer=states[0].optimizer, facts={}
            )
            states[1].load(load_checkpoint(tmp_path / CHECKPOINT), number)
        for state in states if number >= 3 else states[:1]:
            torch.manual_seed(number)
            state.model.weight.grad = torch.full((2, 3), 0.1 * number)
            state.model.bias.grad = torch.ones(2)
            state.step(number + 1)
    assert torch.equal(states[0].model.weight, states[1].model.weight)


def test_a_sigterm_after_a_sigint_is_noted_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_wait(recipe: Recipe, tiny_data: Path, tmp_path: Path, stop_after) -> None:
    before = signal.default_int_handler
    outside = signal.signal(signal.SIGINT, before)  # a shell's background jobs ignore it

    def impatient() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not before:  # until the first one is noted
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)  # which the second one interrupts

    stop_after(2, impatient)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tiny_data, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, outside)


def test_the_command_ends_a_stopped_training_with_one_sentence(
    conam, tiny_data: Path, tmp_path: Path, stop_after
) -> None:
    stop_after(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    arguments = ["resnet20_conam.cifar10", "--data", tiny_data, "--output", tmp_path / "run", "--set", "epochs=4"]
    code, _, err = conam("train", *arguments, "--set", "batch_size=16")
    assert code == 143
    assert err.startswith("conam: SIGTERM stopped the training in epoch 1 after step 2:")
    assert len(err.strip().splitlines()) == 1


def test_outside_of_the_main_thread_a_training_leaves_signals_alone(
    recipe: Recipe, tiny_data: Path, tmp_path: Path
) -> None:
    recipe, runs = replace(recipe, epochs=1, warmup_epochs=0.0), []
    thread = threading.Thread(target=lambda: runs.append(train(recipe, tiny_data, tmp_path / "run")))
    thread.start()
    thread.join()
    assert runs[0]["train_minutes"] > 0


def _state(path: Path, value: float) -> None:
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, value)
    save_checkpoint(path, model=model, ema=None, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), facts={})


def _value(path: Path) -> float:
    return load_checkpoint(path)["model"]["weight"][0, 0].item()


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        _state(tmp_path / CHECKPOINT, value)
    assert (_value(tmp_path / CHECKPOINT), _value(tmp_path / PREVIOUS)) == (3.0, 2.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, CHECKPOINT]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe, str]:
    """Data and run folder of a training stopped at its third step, its recipe, and the hash it would have come to."""
    from conftest import write_arrays

    from conam_zoo.datasets import DATASETS

    root = tmp_path_factory.mktemp("interrupted")
    write_arrays(root / "data" / "cifar10", DATASETS["cifar10"].classes, {"train": 44, "test": 20})
    recipe = load_recipe(PLAIN_RECIPE, ["epochs=1", "warmup_epochs=0", "batch_size=8"])
    whole = train(recipe, root / "data", root / "whole")
    accumulate, calls = TrainState.accumulate, []

    def stops_itself(self, *args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainState, "accumulate", stops_itself)
        with pytest.raises(TrainingStopped):
            train(recipe, root / "data", root / "run", checkpoint_minutes=0)
    return root, recipe, whole["sha256"]


@pytest.mark.parametrize("fault", ["truncated", "empty", "text", "missing", "renamed only"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    fault: str, interrupted: tuple[Path, Recipe, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, recipe, sha256 = interrupted
    cut = tmp_path / "cut"
    shutil.copytree(root / "run", cut)
    newest = cut / CHECKPOINT
    data = newest.read_bytes()
    if fault in ("missing", "renamed only"):  # between the two renames of a saving
        newest.unlink()
    else:
        newest.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"not a checkpoint"}[fault])
    if fault == "renamed only":
        half = cut / ".conam-tmp-123-abcd_123~"
        half.mkdir()
        (half / "file.safetensors").write_bytes(data[:100])
    capsys.readouterr()
    resumed = train(recipe, root / "data", cut, resume=True)
    told = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint before it is taken" in told
    assert "after step 2 of 6" in told
    assert resumed["sha256"] == sha256
    assert not list(cut.glob(".conam-tmp*"))


@pytest.mark.parametrize("place", [0.2, 0.5, 0.99])
def test_a_flipped_bit_is_told_and_the_checkpoint_before_is_taken(
    place: float, interrupted: tuple[Path, Recipe, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, recipe, sha256 = interrupted
    cut = tmp_path / "cut"
    shutil.copytree(root / "run", cut)
    data = bytearray((cut / CHECKPOINT).read_bytes())
    data[int(place * len(data))] ^= 1
    (cut / CHECKPOINT).write_bytes(data)
    with pytest.raises(UserError, match="its bytes do not have the hash that it states"):
        load_checkpoint(cut / CHECKPOINT)
    assert train(recipe, root / "data", cut, resume=True)["sha256"] == sha256
    assert " ".join(capsys.readouterr().out.split()).count("the checkpoint before it is taken") == 1


def _rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """Change what a checkpoint says besides its tensors, with a hash that is right."""
    with safe_open(path, framework="pt") as file:
        skeleton = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(skeleton)
    data = save(tensors, metadata={"state": json.dumps(skeleton), "sha256": "0" * 64})
    path.write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1))


def _items(node: dict) -> dict:
    return {key: pair for pair in node["items"] for key in pair[:1]}


def _fact(name: str, value: object) -> Callable[[dict], None]:
    return lambda skeleton: _items(_items(skeleton)["facts"][1])[name].__setitem__(1, value)


def _without(name: str) -> Callable[[dict], None]:
    return lambda skeleton: skeleton["items"].remove(_items(skeleton)[name])


def _other_momentum(skeleton: dict) -> None:
    buffers = _items(_items(skeleton)["optimizer"][1])["state"][1]["items"]
    buffers[0][1], buffers[-1][1] = buffers[-1][1], buffers[0][1]


MALFORMED = {
    "no model": _without("model"),
    "no optimiser": _without("optimizer"),
    "no facts": _without("facts"),
    "facts of text": lambda skeleton: _items(skeleton)["facts"].__setitem__(1, {"value": "x"}),
    "a model of a number": lambda skeleton: _items(skeleton)["model"].__setitem__(1, {"value": 3}),
    "epoch 10^9": _fact("epoch", {"value": 10**9}),
    "a negative epoch": _fact("epoch", {"value": -1}),
    "an epoch of text": _fact("epoch", {"value": "1"}),
    "NaN step": _fact("step", {"value": float("nan")}),
    "a step too far": _fact("step", {"value": 7}),
    "a log of text": _fact("log", {"value": "epoch,lr"}),
    "a row of text": _fact("log", {"list": [{"value": "row"}]}),
    "an empty row": _fact("log", {"list": [{"items": []}]}),
    "sums without names": _fact("sums", {"list": [{"value": 1.0}]}),
    "sums of text": _fact("sums", {"items": [["loss", {"value": "low"}], ["correct", {"value": 1}]]}),
    "a history of text": _fact("history", {"list": [{"value": "here"}]}),
    "a recipe of text": _fact("recipe", {"value": "resnet"}),
    "momenta of other layers": _other_momentum,
    "a tensor that is not there": lambda skeleton: _items(skeleton)["model"][1]["items"][0].__setitem__(
        1, {"tensor": "nowhere"}
    ),
    "a node of no kind": lambda skeleton: skeleton["items"].append(["more", 3]),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_state_that_is_none_ends_in_one_sentence(
    fault: str, interrupted: tuple[Path, Recipe, str], tmp_path: Path
) -> None:
    root, recipe, _ = interrupted
    cut = tmp_path / "cut"
    shutil.copytree(root / "run", cut)
    (cut / PREVIOUS).unlink()
    _rewrite(cut / CHECKPOINT, MALFORMED[fault])
    with pytest.raises(UserError) as refusal:
        train(recipe, root / "data", cut, resume=True)
    assert "is not a checkpoint of this training, or damaged" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_that_states_no_hash_is_refused(tmp_path: Path) -> None:
    save_file({"value": torch.ones(1)}, tmp_path / CHECKPOINT, metadata={"state": "{}"})
    with pytest.raises(UserError, match="it states no hash"):
        load_checkpoint(tmp_path / CHECKPOINT)


def test_where_a_training_ran_is_told_over_its_interruptions(
    recipe: Recipe, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after
) -> None:
    def describe(hardware: str) -> None:
        facts = {"hardware": hardware, "library_versions": {"torch": hardware}, "code_commit": hardware}
        monkeypatch.setattr("conam_zoo.training.train.describe_environment", lambda: facts)

    def dies() -> None:
        raise KeyboardInterrupt

    describe("one thread")
    whole = train(recipe, tiny_data, tmp_path / "whole")
    assert (whole["hardware"], "history" in whole) == ("one thread", False)
    for step in (STEPS + 1, 1):  # in the second epoch, and at once
        stop_after(step, dies)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tiny_data, tmp_path / "run", resume=step == 1)
        monkeypatch.undo()
        describe("two threads")
    run = train(recipe, tiny_data, tmp_path / "run", resume=True)
    assert (run["hardware"], run["code_commit"]) == ("one thread, then two threads", "two threads")
    assert [(part["begun_in_epoch"], part["hardware"]) for part in run["history"]] == [
        (1, "one thread"), (2, "two threads"),
    ]  # fmt: skip
    assert run["sha256"] == whole["sha256"]
    describe("three threads")  # which train nothing
    again = train(recipe, tiny_data, tmp_path / "run", resume=True)
    assert {**again, "command": ""} == {**run, "command": ""}


@pytest.mark.parametrize("what", ["images", "labels"])
def test_other_images_or_labels_of_the_same_number_are_refused(
    what: str, interrupted: tuple[Path, Recipe, str], tmp_path: Path
) -> None:
    root, recipe, _ = interrupted
    shutil.copytree(root, tmp_path / "all")
    path = tmp_path / "all" / "data" / "cifar10" / f"train_{what}.npy"
    values = np.load(path)
    values[[0, 1]] = values[[1, 0]]
    np.save(path, values)
    with pytest.raises(UserError, match=r"begun on other data \(pixels or labels differ\)"):
        train(recipe, tmp_path / "all" / "data", tmp_path / "all" / "run", resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_a_training_runs_is_refused_with_its_holder(
    resume: bool, interrupted: tuple[Path, Recipe, str], tmp_path: Path, warm_python: str
) -> None:
    root, recipe, sha256 = interrupted
    run = tmp_path / "run"
    if resume:
        shutil.copytree(root / "run", run)
    holder = "import os, time; from pathlib import Path; from conam_zoo.training.run_folder import hold\n"
    holder += f"with hold(Path({str(run)!r}), {resume}): print(os.getpid(), flush=True); time.sleep(100)"
    with subprocess.Popen([warm_python, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        before = sorted(run.iterdir())
        with pytest.raises(UserError, match=rf"is in use: process {number} on .*, since 20\d\d-.*--output"):
            train(recipe, root / "data", run, resume=resume)
        assert sorted(run.iterdir()) == before
        os.kill(number, signal.SIGKILL)
    assert train(recipe, root / "data", run, resume=resume)["sha256"] == sha256


def test_with_two_damaged_checkpoints_the_training_says_so(recipe: Recipe, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"x")
    (tmp_path / PREVIOUS).write_bytes(b"y")
    with pytest.raises(UserError, match="is not a checkpoint"):
        train(recipe, tiny_data, tmp_path, resume=True)


def test_a_checkpoint_that_cannot_be_read_now_is_kept(
    interrupted: tuple[Path, Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, recipe, sha256 = interrupted
    cut, read = tmp_path / "cut", Path.read_bytes
    shutil.copytree(root / "run", cut)
    before = sorted(path.name for path in cut.iterdir())

    def failing(path: Path) -> bytes:
        if path.name == CHECKPOINT:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
        train(recipe, root / "data", cut, resume=True)
    assert sorted(path.name for path in cut.iterdir()) == before
    monkeypatch.undo()
    assert train(recipe, root / "data", cut, resume=True)["sha256"] == sha256


def test_a_lack_of_memory_is_not_damage(
    interrupted: tuple[Path, Recipe, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, recipe, sha256 = interrupted
    cut = tmp_path / "cut"
    shutil.copytree(root / "run", cut)
    before = sorted(path.name for path in cut.iterdir())

    def failing(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainState, "load", failing)
    with pytest.raises(torch.OutOfMemoryError):
        train(recipe, root / "data", cut, resume=True)
    assert sorted(path.name for path in cut.iterdir()) == before
    monkeypatch.undo()
    assert train(recipe, root / "data", cut, resume=True)["sha256"] == sha256


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_stops_with_a_sentence_and_keeps_what_there_was(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _state(tmp_path / CHECKPOINT, 1.0)
    _state(tmp_path / CHECKPOINT, 2.0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, at, full)
    with pytest.raises(UserError, match=r"No space left on device.*: the checkpoints before are kept.*--resume"):
        _state(tmp_path / CHECKPOINT, 3.0)
    monkeypatch.undo()
    assert (_value(tmp_path / CHECKPOINT), _value(tmp_path / PREVIOUS)) == (2.0, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, CHECKPOINT]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_file_that_the_system_refuses_to_grow_is_reported_too(tmp_path: Path) -> None:
    """What safetensors itself makes of a failing write: here the system's limit on the size of a file."""
    import resource

    _state(tmp_path / CHECKPOINT, 1.0)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            _state(tmp_path / CHECKPOINT, 2.0)
        except UserError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
            (tmp_path / "sentence").write_text(str(error)[-90:])
            return
        raise AssertionError("it was written")

    assert os.waitpid(in_a_child(limited), 0)[1] == 0
    assert "the checkpoints before are kept" in (tmp_path / "sentence").read_text()
    assert _value(tmp_path / CHECKPOINT) == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "sentence"]


def test_resuming_on_other_data_is_refused(recipe: Recipe, tiny_data: Path, tmp_path: Path) -> None:
    from conftest import write_arrays

    from conam_zoo.datasets import DATASETS

    train(replace(recipe, epochs=1, warmup_epochs=0.0), tiny_data, tmp_path / "run")
    write_arrays(tmp_path / "more" / "cifar10", DATASETS["cifar10"].classes, {"train": 50, "test": 20})
    with pytest.raises(UserError, match=r"begun on other data \(pixels or labels, images differ\)"):
        train(replace(recipe, epochs=1, warmup_epochs=0.0), tmp_path / "more", tmp_path / "run", resume=True)

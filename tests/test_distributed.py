"""Training with two processes over gloo: what they see, what they measure, how they end.

Most tests fork the ranks from this process, which has torch in memory already; two go through ``torchrun``.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAIN_RECIPE
from safetensors.torch import load_file

import conam_zoo.training.evaluate as evaluate_module
from conam_zoo.models.registry import open_model
from conam_zoo.training.checkpoint import CHECKPOINT, TrainingStopped, load_checkpoint
from conam_zoo.training.distributed import ranks
from conam_zoo.training.engine import predict_logits
from conam_zoo.training.evaluate import evaluate
from conam_zoo.training.recipe import Recipe, load_recipe
from conam_zoo.training.train import train
from conam_zoo.training.train_state import TrainState

pytestmark = [
    pytest.mark.slow,
    pytest.mark.forks,
    pytest.mark.usefixtures("no_curves"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

SETTINGS = ["epochs=2", "warmup_epochs=0.5", "batch_size=8", "lr=0.05", "ema_decay=0.5", "precision=fp32"]
IMAGES = 29  # three steps of 8 images, and one of 5: two for a rank, three for the other


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from conftest import write_arrays

    from conam_zoo.datasets import DATASETS

    write_arrays(tmp_path / "data" / "cifar10", DATASETS["cifar10"].classes, {"train": IMAGES, "test": 20})
    return tmp_path / "data"


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe(PLAIN_RECIPE, SETTINGS)


def fork_ranks(work: Callable[[], object], folder: Path) -> list[tuple[int, str]]:
    """Run something in two forked ranks; gives status and traceback of each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            os.dup2(os.open(folder / f"rank{rank}.txt", os.O_CREAT | os.O_WRONLY), 1)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            work()
        except BaseException:
            (folder / f"error{rank}.txt").write_text(traceback.format_exc())
            os._exit(1)
        os._exit(0)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    torch.set_num_threads(threads)
    errors = [folder / f"error{rank}.txt" for rank in range(2)]
    return [(s, e.read_text() if e.exists() else "") for s, e in zip(statuses, errors, strict=True)]


def test_two_ranks_see_every_image_once_and_measure_what_one_process_measures(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, crop_padding=0, flip=False, holdout=8)  # images stay as they are, to be told apart
    monkeypatch.setattr(evaluate_module, "predict_logits", partial(predict_logits, batch_size=3))

    def work() -> None:
        accumulate, seen = TrainState.accumulate, []

        def recording(self, group, images):
            seen.append([value for inputs, _ in group for value in inputs.double().sum((1, 2, 3)).tolist()])
            return accumulate(self, group, images)

        TrainState.accumulate = recording
        train(recipe, data, tmp_path / "run")
        (tmp_path / f"seen{os.environ['RANK']}.json").write_text(json.dumps(seen))

    assert fork_ranks(work, tmp_path) == [(0, ""), (0, "")]
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(2)]
    assert [[len(step) for step in rank] for rank in seen] == [[4, 4, 2, 4, 4, 2], [4, 4, 3, 4, 4, 3]]
    for epoch in (slice(0, 3), slice(3, 6)):
        images = [image for rank in seen for step in rank[epoch] for image in step]
        assert len(set(images)) == IMAGES - 8
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["world_size"] == 2
    state = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    model = open_model(f"local-dir:{tmp_path / 'run' / 'final'}")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["ema"][name])
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:8]
    for kind in ("images", "labels"):  # the held-out images, as a test split of their own
        array = np.load(data / "cifar10" / f"train_{kind}.npy")
        np.save(data / "cifar10" / f"test_{kind}.npy", array[order])
    alone = evaluate(model, data, "cifar10").scores
    assert run["scores"] == pytest.approx(vars(alone), abs=1e-6)
    logged = (tmp_path / "run" / "log.csv").read_text().splitlines()[-1].split(",")[4]
    assert float(logged) == pytest.approx(alone.top1_percent, abs=1e-6)


def test_two_ranks_learn_what_one_process_learns(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate is that of the whole batch. Batch norms are in evaluation mode: they see one rank's images."""
    into_training_mode = TrainState.train

    def but_for_batch_norms(state: TrainState) -> None:
        into_training_mode(state)
        for module in state.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()

    monkeypatch.setattr(TrainState, "train", but_for_batch_norms)
    recipe = replace(recipe, lr=0.001)  # at larger steps the last digits of the sums grow from step to step
    assert fork_ranks(lambda: train(recipe, data, tmp_path / "two"), tmp_path) == [(0, ""), (0, "")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks: other sums within a convolution would grow over the steps
    try:
        train(recipe, data, tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    one, two = (load_file(tmp_path / run / "raw" / "model.safetensors") for run in ("one", "two"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_two_ranks_stop_together_and_resume_to_the_same_weights(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, model_args={"drop_rate": 0.2}, mixup=0.2, grad_accumulation=2)

    def stopped() -> None:
        accumulate, calls = TrainState.accumulate, []

        def asks_one_rank_to_stop(self, *args):
            calls.append(1)
            if len(calls) == 6 and ranks().rank == 1:  # the second of the second epoch
                os.kill(os.getpid(), signal.SIGTERM)
            return accumulate(self, *args)

        TrainState.accumulate = asks_one_rank_to_stop
        with pytest.raises(TrainingStopped, match="SIGTERM stopped the training in epoch 2 after step 2"):
            train(recipe, data, tmp_path / "cut")

    assert fork_ranks(stopped, tmp_path) == [(0, ""), (0, "")]
    facts = load_checkpoint(tmp_path / "cut" / CHECKPOINT)["facts"]
    assert (facts["step"], facts["sums"]["seen"]) == (2, 16)
    assert fork_ranks(lambda: train(recipe, data, tmp_path / "cut", resume=True), tmp_path) == [(0, ""), (0, "")]
    assert fork_ranks(lambda: train(recipe, data, tmp_path / "whole"), tmp_path) == [(0, ""), (0, "")]
    for name in ("final", "raw"):
        one, other = (load_file(tmp_path / run / name / "model.safetensors") for run in ("cut", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_wrong_on_one_rank_ends_both_with_a_sentence(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    def diverges() -> None:
        accumulate, calls = TrainState.accumulate, []

        def once(self, *args):
            calls.append(1)
            loss, hits = accumulate(self, *args)
            return (loss * float("nan") if len(calls) == 2 and ranks().rank == 1 else loss), hits

        TrainState.accumulate = once
        train(recipe, data, tmp_path / "run")

    outcomes = fork_ranks(diverges, tmp_path)
    assert [status for status, _ in outcomes] == [256, 256]
    assert "The loss is not finite on another process in epoch 1, step 2 of 4" in outcomes[0][1]
    assert "The loss is nan in epoch 1, step 2 of 4" in outcomes[1][1]


def test_a_folder_in_use_and_an_uneven_batch_are_refused_on_all_ranks(
    recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    uneven = replace(recipe, batch_size=9)
    for status, error in fork_ranks(lambda: train(uneven, data, tmp_path / "run"), tmp_path):
        assert (status, "batch_size is 9, but 2 process(es) x 1 accumulated batches" in error) == (256, True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT).touch()
    for status, error in fork_ranks(lambda: train(recipe, data, tmp_path / "run"), tmp_path):
        assert (status, "holds a training already" in error) == (256, True)


def torchrun(python: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_torchrun_trains_with_the_command(recipe: Recipe, data: Path, tmp_path: Path, warm_python: str) -> None:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["-m", "conam_zoo", "train", PLAIN_RECIPE, "--data", data, "--output", tmp_path / "run"]
    result = torchrun(warm_python, *command, *settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("top-1") == 1  # rank 0 alone speaks
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["world_size"], run["recipe"]) == (2, recipe.to_dict())
    scores = evaluate(open_model(f"local-dir:{tmp_path / 'run' / 'final'}"), data, "cifar10").scores
    assert run["scores"] == pytest.approx(vars(scores), abs=1e-6)


def test_torchrun_fine_tunes_with_the_command(data: Path, tmp_path: Path, warm_python: str) -> None:
    command = ["-m", "conam_zoo", "finetune", data / "cifar10", "--model", "resnet20_conam.cifar10"]
    result = torchrun(warm_python, *command, "--output", tmp_path / "run", "--epochs", "1", "--batch-size", "8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("written:") == 1  # rank 0 alone speaks
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    scores = evaluate(open_model(f"local-dir:{tmp_path / 'run' / 'final'}"), data, "cifar10").scores
    assert report["top1_percent"] == pytest.approx(scores.top1_percent)


def test_a_rank_that_is_killed_ends_all_with_a_sentence(data: Path, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(
        "import os, signal, time\n"
        "from rich.progress import Progress\n"
        "from conam_zoo import cli\n"
        "from conam_zoo.training.train_state import TrainState\n"
        "accumulate, calls = TrainState.accumulate, []\n"
        "def dies(self, *args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return accumulate(self, *args)\n"
        "TrainState.accumulate = dies\n"
        "stop = Progress.stop\n"
        "def slow(self):\n"  # torchrun's SIGTERM comes meanwhile
        "    time.sleep(2)\n"
        "    stop(self)\n"
        "Progress.stop = slow\n"
        "cli.main()\n"
    )
    arguments = [
        "train",
        PLAIN_RECIPE,
        "--data",
        data,
        "--output",
        tmp_path / "run",
        "--set",
        "batch_size=8",
    ]
    result = torchrun(sys.executable, tmp_path / "dies.py", *arguments, "--checkpoint-minutes", "0")
    assert result.returncode != 0
    assert "conam: Process 0 of 2 lost another one" in result.stderr
    assert "start all of them again with --resume" in result.stderr
    assert not (tmp_path / "run" / "run.json").exists()
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["facts"]["step"] == 2

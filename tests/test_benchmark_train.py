"""The three training loops: each trains the same net on the same images, and their ratios come out of the command."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import write_arrays

import conam_zoo.training.distributed as distributed
import conam_zoo.training.train_state as train_state
from conam_zoo.data import ImageSplit
from conam_zoo.datasets import DATASETS
from experiments.speed import loops
from experiments.speed import train as train_benchmark
from experiments.speed.loops import LOOPS, TEACHER_LOOPS, LoopSettings, noise_images

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SETTINGS = LoopSettings(model="resnet20_conam", batch_size=8, workers=0)


class Stem(torch.nn.Module):
    """A net of one convolution that remembers what it was shown."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, num_classes, 3)
        self.seen: list[tuple[torch.Tensor, bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((x.detach().clone(), last, torch.is_autocast_enabled("cpu")))
        return self.conv(x).mean((2, 3))


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> list[Stem]:
    """The nets that the loops build, in order."""
    made: list[Stem] = []

    def create(model: str, num_classes: int) -> Stem:
        made.append(Stem(num_classes))
        return made[-1]

    monkeypatch.setattr(loops.timm, "create_model", create)
    return made


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_shows_every_image_once_and_learns(name: str, nets: list[Stem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "has_bf16", lambda device: True)  # whatever this processor can
    torch.manual_seed(0)
    # Each image is one grey of its own, which neither crop nor flip changes where there is no black padding.
    greys = torch.arange(24, dtype=torch.uint8) * 4 + 100
    split = ImageSplit(
        greys[:, None, None, None].expand(24, 32, 32, 3).contiguous(), torch.arange(24) % 2, ("a", "b"), ""
    )
    run = LOOPS[name](SETTINGS, split, CPU)
    (net,) = nets
    before = net.conv.weight.detach().clone()
    run(None)
    assert [len(x) for x, _, _ in net.seen] == [8, 8, 8]
    fast = name != "plain DataLoader"
    assert all(channels_last == (name in ("conam_zoo", "timm, channels_last")) for _, channels_last, _ in net.seen)
    assert all(bf16 == fast for _, _, bf16 in net.seen)
    mean, std = (torch.tensor(v)[:, None, None] for v in (loops.MEAN, loops.STD))
    shown = torch.cat([x for x, _, _ in net.seen]) * std + mean
    assert sorted((shown[:, 0, 16, 16] * 255).round().int().tolist()) == greys.tolist()
    assert not torch.equal(net.conv.weight, before)


@pytest.mark.parametrize("name", TEACHER_LOOPS)
def test_a_loop_learns_from_its_teacher(name: str, nets: list[Stem], monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = []
    original = train_state.distillation_loss
    monkeypatch.setattr(
        train_state, "distillation_loss", lambda *a: learnt.append(a[1].clone()) or original(*a)
    )  # arguments: student, teacher, temperature
    split = noise_images(20)
    run = TEACHER_LOOPS[name](SETTINGS, split, CPU)
    run(None)
    student, *teacher = nets
    assert [len(x) for x, _, _ in student.seen] == [len(x) for x in learnt] == [8, 8, 4]
    assert all(not logits.requires_grad for logits in learnt)
    if name == "conam_zoo, bank":
        assert teacher == []
        run(None), run(None)
        first, second, third = (torch.cat(learnt[start : start + 3]) for start in (0, 3, 6))
        assert not torch.equal(first, second)
        assert torch.equal(first, third)  # the bank has two epochs
    else:
        (net,) = teacher
        assert not any(parameter.requires_grad for parameter in net.parameters())
        for (shown, _, _), (own, _, _) in zip(net.seen, student.seen, strict=True):
            assert torch.equal(shown, own)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_can_stop_after_a_few_steps(name: str, nets: list[Stem]) -> None:
    run = LOOPS[name](SETTINGS, noise_images(40), CPU)
    run(2)
    assert [len(x) for x, _, _ in nets[0].seen] == [8, 8]


def test_the_loops_begin_with_the_same_weights_and_noise_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = loops.timm.create_model
    monkeypatch.setattr(loops.timm, "create_model", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    split = noise_images(16)
    for loop in LOOPS.values():
        loop(SETTINGS, split, CPU)
    states = [net.state_dict() for net in made]
    assert len(states) == 4
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in states[0])
    assert torch.equal(split.images, noise_images(16).images)


def test_ratios_speeds_and_memory_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"conam_zoo": [2.0, 4.0, 2.0], "plain DataLoader": [6.0, 8.0, 8.0], "timm": [3.0, 4.0, 3.0]}
    seconds["timm, channels_last"] = [2.0, 4.0, 2.5]
    monkeypatch.setattr(train_benchmark, "time_in_turns", lambda calls, **_: {name: seconds[name] for name in calls})
    asked = []

    def memory(loop: str, settings, data, images: int, *_):
        asked.append((loop, images))
        return {"peak": 10.0 * len(asked), "workers": 0.0}

    monkeypatch.setattr(train_benchmark, "loop_memory", memory)
    monkeypatch.setattr(train_benchmark, "fresh_processes", lambda module: ThreadPoolExecutor(1))
    record = train_benchmark.benchmark_train(batch_size=8, steps=4, repeats=3, workers=0)
    ours, plain, timm, timm_fast = record.rows
    assert (ours.median, plain.median, timm.median) == (500.0, 2000.0, 750.0)  # ms for a step
    assert (ours.ratio, plain.ratio, timm.ratio, timm_fast.ratio) == (1.0, 3.0, 1.5, 1.0)
    assert [row.facts["images_per_second"] for row in record.rows] == [16.0, 4.0, 8 / 0.75, 12.8]
    assert [row.facts["peak_mib"] for row in record.rows] == [10.0, 20.0, 30.0, 40.0]
    assert asked == [(loop, 50_000) for loop in LOOPS]
    assert "bf16_peak_percent" not in ours.facts  # without a GPU there is nothing to compare with


def test_a_quick_run_prints_the_ratios(experiments, tmp_path: Path) -> None:
    write_arrays(tmp_path / "cifar10", DATASETS["cifar10"].classes, {"train": 8})
    arguments = ("train", "--quick", "--teacher", "--data", tmp_path)
    code, out, _ = experiments(*arguments, "--json", tmp_path / "train.json")
    assert code == 0
    assert "relative to conam_zoo" in out
    facts = json.loads((tmp_path / "train.json").read_text())
    assert [row["name"] for row in facts["rows"]] == [*LOOPS, *TEACHER_LOOPS]
    assert facts["settings"]["teacher"] is True
    assert facts["settings"]["data"] == "real"
    for row in facts["rows"]:
        assert row["name"] in out
        assert row["facts"]["images_per_second"] == pytest.approx(4000 / row["median"], rel=1e-3)
        assert row["facts"]["peak_mib"] > 1
        assert (row["facts"]["workers_mib"] > 1) == (
            not row["name"].startswith("conam_zoo")
        )  # ours has no worker processes
    code, out, _ = experiments("--help")
    assert code == 0
    assert all(command in out for command in ("train", "inference", "cost"))


BAD = {
    "model": (["--model", "resnet21_conam"], "did you mean resnet"),
    "steps": (["--steps", "0"], "The option --steps is 0, but it must be at least 1."),
    "batch size": (["--batch-size", "1"], "The option --batch-size is 1, but it must be at least 2."),
    "repeats": (["--repeats", "0"], "The option --repeats is 0"),
    "workers": (["--workers", "-1"], "The option --workers is -1, but it must be at least 0."),
    "no data": (["--data", "/nowhere"], "data folder /nowhere does not exist"),
    "few data": (["--data", "FEW", "--batch-size", "8"], "has 8 training images, but a measurement takes 320"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence(case: str, experiments, tmp_path: Path) -> None:
    few = write_arrays(tmp_path / "few", ("ant", "bee"), {"train": 8})
    arguments, sentence = BAD[case]
    code, _, err = experiments("train", *(few if word == "FEW" else word for word in arguments))
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1

"""Evaluation of a fine-tuned net: the images of its report, told by name; other images; names of every kind."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conam_zoo.datasets import DATASETS
from conam_zoo.deploy.export import calibration_images
from conam_zoo.errors import UserError
from conam_zoo.finetuning.run import finetune
from conam_zoo.models.registry import open_model
from conam_zoo.training.engine import predict_logits
from conam_zoo.training.evaluate import evaluate, run_folder_of

pytestmark = pytest.mark.slow

NET = "resnet20_conam.cifar10"
Conam = Callable[..., tuple[int, str, str]]


def write_pictures(root: Path, classes: tuple[str, ...], count: int, size: int = 40, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (size, size, 3)) // 2 + 100 * (label % 2)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """Data of 2 classes with CIFAR-10's names and one damaged picture, a run folder, and its report."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_pictures(folder / "my pictures", ("cat", "dog"), 10)
    (data / "cat" / "broken.png").write_bytes(b"x")
    report = finetune(
        data, model=NET, output=folder / "run", epochs=1, val_share=0.3, seed=7, corrupt="skip", quiet=True
    )
    return data, folder / "run", report


@pytest.mark.parametrize(
    ("key", "value"), [("crop_pct", 0.875), ("interpolation", "bilinear"), ("crop_mode", "border")]
)
def test_images_that_would_be_prepared_in_another_way_are_refused(run, key: str, value: object) -> None:
    model = open_model(NET)
    model.pretrained_cfg[key] = value
    with pytest.raises(UserError, match=f"has {key} {value}, but images are prepared here with"):
        evaluate(model, run[0], corrupt="skip")
    with pytest.raises(UserError, match=f"has {key} {value}"):
        calibration_images(model, run[0], None)


def test_a_net_that_sees_no_squares_is_refused(run) -> None:
    model = open_model(NET)
    model.pretrained_cfg["input_size"] = (3, 32, 64)
    for refused in (lambda: evaluate(model, run[0], corrupt="skip"), lambda: calibration_images(model, run[0], None)):
        with pytest.raises(UserError, match="takes 32 x 64 pixels, but images are prepared here as squares"):
            refused()


def test_the_command_of_the_report_gives_the_accuracy_of_the_report(run, conam: Conam) -> None:
    _, folder, report = run
    (line,) = (line for line in (folder / "report.md").read_text().splitlines() if line.startswith("conam evaluate"))
    code, out, err = conam(*shlex.split(line)[1:], "--json", "-")
    assert code == 0
    found = json.loads(out)
    assert (found["split"], found["images"], found["trained_on"]) == ("validation", 6, 0)
    assert found["top1_percent"] == report["top1_percent"]
    assert json.loads((folder / "run.json").read_text())["scores"]["nll"] == found["nll"]
    assert "trained on" not in err
    assert report["split"] == "validation"


def test_the_same_images_elsewhere_are_the_same_split(run, conam: Conam, tmp_path: Path) -> None:
    data, folder, report = run
    shutil.copytree(data, tmp_path / "copy")
    code, out, _ = conam("evaluate", f"local-dir:{folder / 'final'}", "--data", tmp_path / "copy", "--json", "-")
    assert (code, json.loads(out)["top1_percent"]) == (0, report["top1_percent"])
    assert json.loads(out)["split"] == "validation"


def test_images_that_were_trained_on_are_told(run, conam: Conam, tmp_path: Path) -> None:
    data, folder, _ = run
    model = f"local-dir:{folder / 'final'}"
    code, out, err = conam("evaluate", model, "--data", data, "--split", "train", "--json", "-")
    assert (code, json.loads(out)["trained_on"]) == (0, 14)
    assert "was trained on 14 of these 14 images" in err
    shutil.copytree(data, tmp_path / "more")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "more" / "cat" / "new.png")  # not the set of the run any more
    code, out, err = conam("evaluate", model, "--data", tmp_path / "more")
    assert code == 0
    assert "was trained on 14 of these 21 images" in err
    assert f"all images of {tmp_path / 'more'}: 21" in out


def test_new_pictures_are_evaluated_even_if_there_is_one_of_each_class(run, conam: Conam, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "new", ("cat", "dog"), 1, seed=3)
    code, out, err = conam("evaluate", f"local-dir:{run[1] / 'final'}", "--data", data)
    assert code == 0, err
    assert f"all images of {data}: 2" in out


def test_a_set_of_as_many_pictures_as_the_run_trained_on_is_not_the_run_s(run, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "new", ("cat", "dog"), 7, seed=3)
    found = evaluate(open_model(f"local-dir:{run[1] / 'final'}"), data, run=run[1])
    assert (found.part, len(found.split), found.trained_on) == ("all", 14, 0)


def test_a_run_of_an_earlier_version_takes_its_split_as_well(run, tmp_path: Path) -> None:
    data, folder, report = run
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "trained_on.npy").unlink()
    facts = json.loads((old / "run.json").read_text())
    facts["split_rule"].pop("corrupt")
    (old / "run.json").write_text(json.dumps(facts))
    found = evaluate(open_model(f"local-dir:{old / 'final'}"), data, run=old)
    assert (found.part, found.trained_on, found.scores.top1_percent) == ("validation", None, report["top1_percent"])
    del facts["split_rule"]  # which the share of validation images was: then it cannot be known
    (old / "run.json").write_text(json.dumps(facts))
    found = evaluate(open_model(f"local-dir:{old / 'final'}"), data, run=old)
    assert (found.part, len(found.split)) == ("all", 20)
    assert "does not say which images it trained on" in found.notes[-1]


def test_damaged_pictures_are_refused_or_skipped(run, conam: Conam, tmp_path: Path) -> None:
    data, folder, _ = run
    shutil.copytree(folder / "final", tmp_path / "alone")  # without its run folder
    model = f"local-dir:{tmp_path / 'alone'}"
    assert run_folder_of(model) is None
    code, _, err = conam("evaluate", model, "--data", data)
    assert code == 2
    assert "--corrupt skip" in err
    code, out, err = conam("evaluate", model, "--data", data, "--corrupt", "skip")
    assert code == 0
    assert ": 20\n" in out
    assert "cannot be read" in err
    code, _, err = conam("evaluate", model, "--data", data, "--corrupt", "eat")
    assert code == 2
    assert "must be 'stop' or 'skip'" in err


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """A part of the net's classes in another order of labels; pictures of another size than CIFAR's."""
    data = write_pictures(tmp_path / "photos", ("ship", "cat"), 3, size=50)
    found = evaluate(open_model(NET), data, "cifar10")
    assert found.split.classes == DATASETS["cifar10"].classes
    assert found.split.labels.tolist() == [3, 3, 3, 8, 8, 8]
    write_pictures(tmp_path / "photos2", ("cat", "zebra"), 2)
    with pytest.raises(UserError, match="has 2 classes, but the model has 10, and none of them is 'zebra'"):
        evaluate(open_model(NET), tmp_path / "photos2")


def test_logits_are_written_in_the_order_of_the_split(run, conam: Conam, tmp_path: Path) -> None:
    data, folder, report = run
    model, file = f"local-dir:{folder / 'final'}", tmp_path / "logits.npz"
    code, _, _ = conam("evaluate", model, "--data", data, "--logits", file)
    assert code == 0
    with np.load(file) as arrays:
        logits, labels = arrays["logits"], arrays["labels"]
        assert arrays["classes"].tolist() == ["cat", "dog"]
        assert arrays["names"].tolist()[0].startswith("cat")
    assert (logits.dtype, logits.shape, labels.dtype) == (np.float32, (6, 2), np.int64)
    assert 100 * (logits.argmax(1) == labels).mean() == pytest.approx(report["top1_percent"])
    code, _, err = conam("evaluate", model, "--data", data, "--logits", tmp_path / "logits.csv")
    assert code == 2
    assert "end in .npz" in err


def test_the_data_is_not_written_over(run, conam: Conam, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.arange(4) % 2, classes=np.array(["cat", "dog"]))
    before = data.read_bytes()
    for option in ("--logits", "--json"):
        code, _, err = conam("evaluate", f"local-dir:{run[1] / 'final'}", "--data", data, option, data)
        assert (code, err.count("\n")) == (2, 1)
        assert data.read_bytes() == before


def test_the_record_of_a_run_is_not_written_over(run, conam: Conam) -> None:
    before = (run[1] / "run.json").read_bytes()
    code, _, err = conam("evaluate", f"local-dir:{run[1] / 'final'}", "--data", run[0], "--json", run[1] / "run.json")
    assert (code, err.count("\n")) == (2, 1)
    assert (run[1] / "run.json").read_bytes() == before


def test_a_run_folder_inside_of_the_data_is_refused(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", ("a", "b"), 2)
    with pytest.raises(UserError, match="lies in the data"):
        finetune(data, model=NET, output=data / "run", quiet=True)
    assert not (data / "run").exists()


HOSTILE = ("[red]x[0] :tiger:", r"$\foo$", "| <b>a</b> | `x`", "\x1b[31mred", os.fsdecode(b"latin\xe9"), "猫")


def test_names_of_any_kind_reach_report_and_terminal_as_they_are(tmp_path: Path, conam: Conam) -> None:
    data = write_pictures(tmp_path / "a; touch PWNED $(touch PWNED)", HOSTILE, 3)
    output = tmp_path / "run [bold] `x`"
    code, out, err = conam("finetune", data, "--model", NET, "--output", output, "--epochs", 1)
    assert (code, err) == (0, "")
    assert r"\x1b[31mred" in out
    assert "[red]x[0] :tiger:" in out
    assert "\x1b[31m" not in out
    for name in ("confusion.png", "curves.png", "report.json"):
        assert (output / name).is_file(), name
    page = (output / "report.md").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert r"latin\\xe9" in page
    (line,) = re.findall(r"^conam evaluate .*$", page, re.MULTILINE)
    done = subprocess.run(
        ["bash", "-c", f'conam() {{ printf "%s\\n" "$@"; }}; {line}'], cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stdout.decode().splitlines() == ["evaluate", f"local-dir:{output / 'final'}", "--data", str(data)]
    assert not list(tmp_path.glob("PWNED*"))
    code, out, err = conam("evaluate", f"local-dir:{output / 'final'}", "--data", data)
    assert (code, err) == (0, "")


def test_the_commands_of_the_page_run(
    tmp_path: Path, conam: Conam, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of docs/finetuning.md, with one epoch."""
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("my_pictures"), ("ant", "bee"), 4)
    write_pictures(Path("new_pictures"), ("bee",), 2, seed=1)
    Image.new("RGB", (50, 40), "green").save("picture.jpg")
    page = (checkout / "docs" / "finetuning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 4
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "conam"
        code, _, err = conam(*arguments, *(["--epochs", 1] if arguments[0] == "finetune" else []))
        assert code == 0, f"{line}\n{err}"
    assert {"report.md", "report.json", "curves.png", "confusion.png", "trained_on.npy", "final", "run.json"} <= {
        path.name for path in Path("runs/my_pictures").iterdir()
    }
    assert Path("logits.npz").is_file()


def test_large_images_come_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return x.mean((2, 3))

    for side, expected in ((16, [6, 4]), (32, [6, 4]), (64, [1] * 10), (512, [1] * 10)):
        sizes.clear()
        images = torch.zeros(10, side, side, 3, dtype=torch.uint8)
        assert predict_logits(Net(), images, (0, 0, 0), (1, 1, 1), batch_size=6).shape == (10, 3)
        assert sizes == expected

"""The ``conam`` command: what a person types, what comes back, and one sentence for what is wrong."""

import importlib.metadata
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from conftest import PLAIN_RECIPE, write_arrays
from PIL import Image

from conam_zoo.cli import app
from conam_zoo.models.registry import model_names
from conam_zoo.weights import load_manifest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run folder of one epoch on synthetic images, and its data."""
    from conam_zoo.datasets import DATASETS
    from conam_zoo.training.recipe import load_recipe
    from conam_zoo.training.train import train

    root = tmp_path_factory.mktemp("trained")
    write_arrays(root / "data" / "cifar10", DATASETS["cifar10"].classes, {"train": 64, "test": 40})
    train(load_recipe(PLAIN_RECIPE, ["epochs=1", "warmup_epochs=0"]), root / "data", root / "run")
    return root / "run", root / "data"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.effect_noise((90, 60), 60).convert("RGB").save(path)
    return path


def test_list_shows_every_model_and_patterns_narrow_it(conam) -> None:
    code, out, _ = conam("list")
    assert code == 0
    assert all(name in out for name in model_names())
    _, out, _ = conam("list", "wide_*", "--json", "-")
    rows = json.loads(out)
    assert [row["model"] for row in rows] == [n for n in model_names() if n.startswith("wide_")]
    facts = json.loads(conam("info", rows[0]["model"], "--json", "-")[1])
    assert {key: facts[key] for key in ("parameters", "macs")} == {key: rows[0][key] for key in ("parameters", "macs")}


def test_names_and_hashes_are_whole_on_a_narrow_terminal(conam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")

    def shown(*words: str) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", conam(*words)[1])

    rows = shown("list", "densenetbc190*").partition("(top-1)")[2].strip().splitlines()
    assert "".join(row.split()[0] for row in rows) == "densenetbc190_40_conam"
    assert rows[0].split()[1:4] == ["28.32", "M", "9348"]
    sha256 = load_manifest().entry("resnet20_conam.cifar10").sha256
    assert sha256 in re.sub(r"\s", "", shown("info", "resnet20_conam.cifar10"))


def test_info_names_the_sites(conam) -> None:
    code, out, _ = conam("info", "resnet56_conam", "--json", "-")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"] == 858_970
    assert list(facts["sites"]) == ["layer1.0.attn", "layer2.0.attn", "layer3.0.attn"]
    assert facts["weights"]["resnet56_conam.cifar10"]["top1_percent"] > 92.5


def test_info_of_a_net_without_weights_says_so(conam) -> None:
    code, out, _ = conam("info", "densenetbc190_40_conam", "--json", "-")
    assert code == 0
    assert json.loads(out)["weights"] == {}


@pytest.mark.slow
def test_predict_prints_and_draws(conam, trained: tuple[Path, Path], photo: Path, tmp_path: Path) -> None:
    model = f"local-dir:{trained[0] / 'final'}"
    code, out, _ = conam("predict", model, photo, photo, "--output", tmp_path / "sheet.png")
    assert code == 0
    assert out.count("photo.jpg") == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 300
    code, out, _ = conam("predict", model, photo, "--json", "-")
    (row,) = json.loads(out)
    assert len(row["top"]) == 5
    assert 0 < sum(entry["probability"] for entry in row["top"]) <= 1.0001


def test_evaluate_agrees_with_the_run(conam, trained: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = trained
    code, _, _ = conam("evaluate", f"local-dir:{run / 'final'}", "--data", data, "--json", tmp_path / "scores.json")
    assert code == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    scores = json.loads((run / "run.json").read_text())["scores"]
    assert {key: result[key] for key in scores} == pytest.approx(scores)
    assert result["images"] == 40


@pytest.mark.slow
def test_train_runs_and_resumes_nothing_when_done(conam, trained: tuple[Path, Path], tmp_path: Path) -> None:
    settings = ["--set", "epochs=1", "--set", "warmup_epochs=0", "--set", "batch_size=32"]
    arguments = ["train", PLAIN_RECIPE, "--data", trained[1], "--output", tmp_path / "run", *settings]
    code, out, _ = conam(*arguments)
    assert code == 0
    assert "top-1" in out
    code, _, err = conam(*arguments)
    assert code == 2
    assert "--resume" in err


def test_a_dry_run_of_a_resumption_is_refused(conam, trained: tuple[Path, Path]) -> None:
    run, data = trained
    words = ("--data", data, "--output", run, "--resume", "--dry-run")
    code, _, err = conam("train", "resnet20_conam.cifar10", *words)
    assert (code, "leave out --resume or --dry-run" in err) == (2, True)


def test_the_version_is_that_of_the_package(conam) -> None:
    assert conam("--version") == (0, f"conam {version('conam-zoo')}\n", "")


def test_the_version_of_a_checkout_that_is_not_installed_is_unknown(conam, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", nothing)
    assert conam("--version") == (0, "conam unknown (not installed)\n", "")


def test_json_without_a_file_prints(conam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = conam("list", "--json", "-")
    assert conam("list", "--json") == printed
    assert conam("list", "--json", "--pretrained")[0] == 0
    assert len(json.loads(printed[1])) > len(json.loads(conam("list", "--json", "--pretrained")[1])) > 0
    assert conam("list", "--json", tmp_path / "list.json")[0] == 0
    assert json.loads((tmp_path / "list.json").read_text()) == json.loads(printed[1])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str, conam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CONAM_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", "conam ver")
    monkeypatch.setenv("COMP_CWORD", "1")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "conam ver")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    assert "verify" in conam()[1]


def test_windows_patterns_are_expanded(conam, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["predict", "resnet20_conam.cifar10", str(photo.with_name("*.jpg")), "--json", "-"]
    assert conam(*arguments)[0] == 2
    monkeypatch.setattr("conam_zoo.cli.os", SimpleNamespace(**vars(os) | {"name": "nt"}))
    assert conam(*arguments)[0] == 0


COMMANDS = [*typer.main.get_group(app).commands, ""]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_on_eighty_columns(command: str, conam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    code, out, _ = conam(*command.split(), "-h")
    assert code == 0
    assert max(map(len, out.split("\n"))) <= 80
    assert not re.findall(r"[^\s,]+…", out)  # what is cut; a list that goes on has a comma before its dots


def test_weights_that_do_not_exist_are_missed_before_any_image_is_read(conam, tmp_path: Path) -> None:
    call = ["finetune", tmp_path / "nowhere", "--model", "resnet110_conam.cifar10", "--output", tmp_path / "run"]
    code, _, err = conam(*call)
    assert (code, err.count("\n")) == (2, 1)
    assert "There are no pretrained weights for resnet110_conam.cifar10" in err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc.cpp:9] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_sentence(error: Exception, conam, photo: Path, monkeypatch) -> None:
    def fails(*_, **__) -> None:
        raise error

    monkeypatch.setattr("conam_zoo.deploy.runtime.open_classifier", fails)
    code, _, err = conam("predict", "resnet20_conam.cifar10", photo)
    assert (code, err.count("\n")) == (2, 1)
    assert "There is not enough memory" in err
    assert "lower the batch size or the image size" in err


@pytest.mark.parametrize("command", ["train", "finetune", "distill", "record-teacher", "queue"])
def test_a_home_of_nobody_is_one_sentence(
    command: str, conam, trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = "resnet20_conam.cifar10"
    arguments: dict[str, list] = {
        "train": [ours, "--data", trained[1]],
        "distill": [ours, "--data", trained[1], "--teacher", ours],
        "record-teacher": [ours, "--data", trained[1], "--set", f"teacher={ours}"],
        "finetune": [trained[1] / "cifar10", "--model", ours],
        "queue": [ours, "--data", trained[1], "--set", "epochs=1"],
    }
    code, _, err = conam(command, *arguments[command], "--output", "~nobody-of-that-name/run")
    assert (code, err.count("\n")) == (2, 1)
    assert "~nobody-of-that-name/run begins with a home folder that does not exist" in err
    assert list(tmp_path.glob("~*")) == []


def test_fine_tuning_checks_its_settings_before_it_looks_for_data(conam, tmp_path: Path) -> None:
    for setting, sentence in (
        ("opt=nonsense", "timm has no optimiser 'nonsense'"),
        ("opt=fusedadam", "The optimiser fusedadam cannot be used here"),
        ("momentum=-1", "The setting momentum is -1.0, which is out of its range"),
        ("min_lr=nan", "The setting min_lr is nan, which is out of its range"),
        ("seed=99999999999999999999999", "The setting seed is 99999999999999999999999, which is out of its range"),
        ("epochs", "has no '='"),
    ):
        call = ["finetune", tmp_path / "nowhere", "--model", "resnet20_conam.cifar10", "--output", tmp_path / "run"]
        code, _, err = conam(*call, "--set", setting)
        assert (code, err.count("\n")) == (2, 1)
        assert sentence in err
        assert not (tmp_path / "run").exists()


BAD = {
    "unknown model": (["predict", "resnet21_conam", "PHOTO"], "did you mean resnet"),
    "unknown tag": (["predict", "resnet20_conam.imagenet", "PHOTO"], "no tag 'imagenet'"),
    "no weights": (["predict", "resnet110_conam.cifar100", "PHOTO"], "no pretrained weights"),
    "missing image": (["predict", "MODEL", "nothing.png"], "no image file nothing.png"),
    "corrupt image": (["predict", "MODEL", "TEXT"], "is not an image"),
    "no model folder": (["predict", "local-dir:/nowhere", "PHOTO"], "not a model folder"),
    "missing data": (["evaluate", "MODEL", "--data", "/nowhere"], "data folder /nowhere does not exist"),
    "unknown recipe": (["train", "nonsense", "--data", "DATA", "--output", "OUT"], "no recipe 'nonsense'"),
    "missing training data": (
        ["train", "resnet20_conam.cifar10", "--data", "/nowhere", "--output", "OUT"],
        "data folder /nowhere does not exist",
    ),
    "bad setting": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "OUT", "--set", "epohcs=1"],
        "no setting 'epohcs'",
    ),
    "unknown optimiser": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "OUT", "--set", "opt=sgdx"],
        "no optimiser 'sgdx'",
    ),
    "optimiser for a GPU alone": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "OUT", "--set", "opt=fusedadam"],
        "The optimiser fusedadam cannot be used here",
    ),
    "optimiser of a second pass": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "OUT", "--set", "opt=adahessian"],
        "The optimiser adahessian cannot be used here",
    ),
    "channels that images have not": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "OUT", "--set", "model_args={in_chans=1}"],
        "in_chans = 1, but images are read with 3",
    ),
    "no pooling": (
        [
            "train",
            "resnet20_conam.cifar10",
            "--data",
            "DATA",
            "--output",
            "OUT",
            "--set",
            "model_args={global_pool=''}",
        ],
        "there is no classifier",
    ),
    "unknown model in a setting": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "OUT", "--set", "model=resnet20"],
        "did you mean resnet20_conam",
    ),
    "unknown model argument": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "OUT", "--set", "model_args={depth=3}"],
        "has 'depth', which no model takes: it knows num_classes",
    ),
    "wrong number of classes": (["evaluate", "MODEL", "--data", "THREE"], "has 3 classes, but the model has 10"),
    "wrong number of classes in a setting": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "OUT", "--set", "model_args={num_classes=5}"],
        "the classes are those of the data set",
    ),
    "unwritable run": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "/dev/null/run"],
        "cannot be written",
    ),
    "verify a home of nobody": (["verify", "--mirror", "~nobody-at-all/m"], "a home folder that does not exist"),
    "mirror into a home of nobody": (["mirror", "~nobody-at-all/m"], "a home folder that does not exist"),
    "evaluate in a home of nobody": (
        ["evaluate", "MODEL", "--data", "~nobody-at-all/m"],
        "a home folder that does not",
    ),
    "links in a circle": (
        ["train", "resnet20_conam.cifar10", "--data", "DATA", "--output", "LOOP"],
        "its links lead in a circle",
    ),
    "unwritable picture": (["predict", "MODEL", "PHOTO", "--output", "/dev/null/x.png"], "cannot be written"),
    "unknown picture format": (["predict", "MODEL", "PHOTO", "--output", "OUT.xyz"], "cannot be written"),
    "unwritable json": (["list", "--json", "/dev/null/x.json"], "cannot be written"),
    "verify unknown": (["verify", "resnet20"], "There is no model 'resnet20'"),
    "no such pattern": (["list", "vgg*"], "No model matches 'vgg*'"),
    "pack of nothing": (["pack", "DATA", "--data", "DATA"], "not a finished run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence_and_exit_code_2(
    case: str, conam, trained: tuple[Path, Path], photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    three = write_arrays(tmp_path / "three", ("ant", "bee", "cow"), {"test": 3})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {
        "LOOP": tmp_path / "loop",
        "THREE": three,
        "PHOTO": photo,
        "MODEL": f"local-dir:{trained[0] / 'final'}",
        "TEXT": tmp_path / "text.png",
        "DATA": trained[1],
        "OUT": tmp_path / "out",
        "OUT.xyz": tmp_path / "out.xyz",
    }
    arguments, sentence = BAD[case]
    before = sorted(tmp_path.rglob("*"))
    code, _, err = conam(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def test_a_terminal_of_another_code_page_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    from conam_zoo import cli

    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    for arguments in (["info", "resnet20_conam"], ["predict", "resnet20_conam.cifar10", "\x1b[31m猫.png"]):
        monkeypatch.setattr(sys, "argv", ["conam", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
    written = {}
    for name, stream in streams.items():
        stream.flush()
        written[name] = stream.buffer.getvalue()
    assert b"layer1.0.attn" in written["stdout"]
    assert rb"no image file \x1b[31m\u732b.png" in written["stderr"]

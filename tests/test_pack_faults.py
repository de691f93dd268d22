"""What packing refuses, and what it mends: damaged or mixed run folders, kills, two at once."""

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from conftest import CHECKOUT
from small_entry import entry_for

import conam_zoo.release.exchange as exchange_module
import conam_zoo.release.pack as pack_module
from conam_zoo.errors import UserError
from conam_zoo.models.registry import export_model
from conam_zoo.release.documents import model_card, result_table
from conam_zoo.release.exchange import packing
from conam_zoo.release.pack import pack
from conam_zoo.training.recipe import load_recipe
from conam_zoo.training.run_folder import LOG_FIELDS, draw_curves
from conam_zoo.weights import Manifest, dump_manifest, load_manifest

pytestmark = pytest.mark.slow

NAME = "resnet20_conam.cifar10"
EMPTY = {"schema_version": 1, "hub_namespace": None, "code_repository": None, "entries": {}}
SHORT = ["epochs=1", "warmup_epochs=0"]


def make_run(folder: Path, *, seed: int = 0, model: str = NAME) -> Path:
    """A run folder as a training leaves it, of a net that was not trained; its log is that of an older version."""
    torch.manual_seed(seed)
    sha256 = export_model(timm.create_model(model), folder / "final", tag=None)
    record = {
        "recipe": load_recipe(model, [*SHORT, f"seed={seed}"]).to_dict(),
        "hardware": "a processor",
        "train_minutes": 0.5,
        "library_versions": {"torch": "2"},
        "sha256": sha256,
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "log.csv").write_text(",".join(LOG_FIELDS) + "\n1,0.1,2.3,10.0,,5.0\n")
    row = {"epoch": 1, "lr": 0.1, "loss": 2.3, "train_top1_percent": 10.0, "holdout_top1_percent": None}
    draw_curves([row], folder / "curves.png", title="a run")
    return folder


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without weights, whose packaged recipes have the short settings."""
    monkeypatch.setattr(pack_module, "load_recipe", lambda name: load_recipe(name, SHORT))
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "weights_manifest.json").write_text(json.dumps(EMPTY))
    shutil.copyfile(CHECKOUT / "README.md", folder / "README.md")
    return folder


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(run: Path, **changes: object) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **changes}))


def put_final_of(run: Path, other: Path) -> None:
    shutil.rmtree(run / "final")
    shutil.copytree(other / "final", run / "final")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "run.json cut short": (
        lambda run: (run / "run.json").write_text('{"recipe": '),
        r"run\.json is not a run record",
    ),
    "run.json a list": (lambda run: (run / "run.json").write_text("[]"), r"run\.json is not a run record"),
    "run.json not UTF-8": (lambda run: (run / "run.json").write_bytes(b"\xff{}"), r"run\.json is not a run record"),
    "no sha256": (lambda run: edit(run, sha256=None), "its 'sha256' is None"),
    "a recipe of text": (lambda run: edit(run, recipe="resnet20"), "its 'recipe' is 'resnet20'"),
    "endless training": (lambda run: edit(run, train_minutes=float("inf")), "states inf"),
    "versions": (lambda run: edit(run, library_versions={"torch": 2}), "'library_versions' that are no text"),
    "no log": (lambda run: (run / "log.csv").unlink(), r"log\.csv is no log of a training"),
    "a log of text": (lambda run: (run / "log.csv").write_text("epoch,loss\none,two\n"), r"log\.csv is no log"),
    "a longer log": (lambda run: (run / "log.csv").write_text("epoch,loss\n1,2\n2,1\n"), "has 2 epochs and not"),
    "no curves": (lambda run: (run / "curves.png").unlink(), r"curves\.png cannot be read as a PNG"),
    "curves of text": (lambda run: (run / "curves.png").write_text("curves"), r"curves\.png cannot be read as a PNG"),
    "no final": (lambda run: shutil.rmtree(run / "final"), "final is not the folder of a net"),
    "config a list": (lambda run: (run / "final" / "config.json").write_text("[]"), "final is not the folder of a net"),
    "of another run": (
        lambda run: put_final_of(run, make_run(run.parent / "other", seed=7)),
        r"final holds other weights than .*run\.json states",
    ),
    "of another net": (
        lambda run: put_final_of(run, make_run(run.parent / "other", model="resnet32_conam.cifar10")),
        r"final holds other weights than .*run\.json states",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_mixed_run_is_refused_in_a_sentence_and_nothing_changes(
    damage: str, small_data: Path, checkout: Path, tmp_path: Path
) -> None:
    run, before = make_run(tmp_path / "run"), files(checkout)
    spoil, message = DAMAGES[damage]
    spoil(run)
    with pytest.raises(UserError, match=message):
        pack(run, small_data, checkout)
    assert files(checkout) == before


def test_a_net_with_an_even_site_is_packed_only_if_that_is_wanted(
    small_data: Path, checkout: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    model = timm.create_model(f"local-dir:{run / 'final'}", pretrained=True)
    torch.nn.init.zeros_(model.layer1[0].attn.fc2.weight)
    edit(run, sha256=export_model(model, run / "final", tag=None))
    before = files(checkout)
    with pytest.raises(UserError, match=r"less than 2% .*layer1\.0\.attn \(0\.00%\).*--allow-even-sites"):
        pack(run, small_data, checkout)
    assert files(checkout) == before
    entry = pack(run, small_data, checkout, allow_even_sites=True)
    assert entry.liveness is not None
    assert entry.liveness["layer1.0.attn"] < 1e-5
    card = (checkout / "weights" / NAME / "README.md").read_text()
    assert "`layer1.0.attn`" in card.partition("the confidences are even")[0]
    assert "`layer1.0.attn`" in result_table(load_manifest(checkout / "weights_manifest.json"))


def test_a_card_says_what_was_measured() -> None:
    awake = replace(entry_for(NAME, b"x", revision=None), liveness={"layer1.0.attn": 0.25})
    card = model_card(awake, Manifest({NAME: awake}))
    assert "0.2500 at `layer1.0.attn`" in card
    assert "confidences are even" not in card
    old = replace(awake, liveness=None)
    assert "was not measured" in model_card(old, Manifest({NAME: old}))


@pytest.mark.parametrize("had_weights", [False, True])
@pytest.mark.parametrize("step", ["building", "former away", "new in place", "manifest written"])
def test_what_a_killed_pack_leaves_is_mended_by_the_next(step: str, had_weights: bool, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    destination, scratch = checkout / "weights" / NAME, checkout / f".packing-{NAME}-abc_1234"
    old, new = (entry_for(NAME, data, revision=None) for data in (b"old", b"new"))
    scratch.mkdir(parents=True)
    destination.parent.mkdir()
    entries = {NAME: old} if had_weights else {}
    manifest_path = checkout / "weights_manifest.json"
    dump_manifest(Manifest(entries), manifest_path)
    for folder, data in ((destination, b"old"), (scratch / NAME, b"new")):
        if data == b"new" or had_weights:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(data)
    if step != "building" and had_weights:
        destination.replace(scratch / "former")
    if step in ("new in place", "manifest written"):
        (scratch / NAME).replace(destination)
    if step == "manifest written":
        dump_manifest(Manifest({NAME: new}), manifest_path)
    mine = checkout / ".packing-list" / "mine.txt", checkout / ".weights_manifest.json.bak"
    mine[0].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    (checkout / f".weights_manifest.json.{'0' * 32}.tmp").write_text("{")
    with packing(checkout):
        pass
    manifest = load_manifest(manifest_path)
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    ours = {path.name for path in checkout.iterdir()} - {mine[0].parent.name, mine[1].name}
    assert ours == {"weights", "weights_manifest.json"}
    expected = b"new" if step == "manifest written" else b"old" if had_weights else None
    found = destination / "model.safetensors"
    assert (found.read_bytes() if found.exists() else None) == expected
    assert list(manifest.entries) == ([NAME] if expected else [])


def test_two_at_once_take_turns(tmp_path: Path) -> None:
    (tmp_path / "weights_manifest.json").write_text(json.dumps(EMPTY))
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait(5)
        with packing(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with packing(tmp_path):
        inside.set()
        thread.join(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_weights_that_would_make_the_checkout_too_large_are_refused(
    small_data: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = make_run(tmp_path / "run"), files(checkout)
    monkeypatch.setattr(pack_module, "MAX_TOTAL_BYTES", 100_000)
    with pytest.raises(UserError, match=r"would take 0\.\d MiB with resnet20_conam\.cifar10"):
        pack(run, small_data, checkout, allow_even_sites=True)
    assert files(checkout) == before


def test_a_readme_without_its_table_is_told_before_anything_changes(
    small_data: Path, checkout: Path, tmp_path: Path
) -> None:
    (checkout / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        pack(make_run(tmp_path / "run"), small_data, checkout)
    (checkout / "README.md").write_text("no table")
    with pytest.raises(UserError, match="no place for its table results"):
        pack(tmp_path / "run", small_data, checkout)
    assert not (checkout / "weights").exists()


def test_ctrl_c_waits_until_weights_and_manifest_agree(tmp_path: Path) -> None:
    new, destination, scratch = (tmp_path / name for name in ("new", "weights/net", "scratch"))
    for folder, text in ((new, "new"), (destination, "old")):
        folder.mkdir(parents=True)
        (folder / "text").write_text(text)
    scratch.mkdir()

    def confirm() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / "manifest").write_text("new")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    noted: list[int] = []
    try:
        with pytest.raises(KeyboardInterrupt):
            exchange_module.exchange(new, destination, scratch, confirm)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))  # as conam queue does
        shutil.copytree(destination, new)
        shutil.rmtree(scratch / exchange_module.FORMER)
        exchange_module.exchange(new, destination, scratch, confirm)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (destination / "text").read_text() == (tmp_path / "manifest").read_text() == "new"
    assert noted == [signal.SIGINT]


def test_waiting_for_another_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "weights_manifest.json").write_text(json.dumps(EMPTY))
    monkeypatch.setattr(exchange_module, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(exchange_module, "LOCK_SECONDS", 1.0)
    with packing(tmp_path), pytest.raises(UserError, match="Another process is packing"), packing(tmp_path):
        pass
    assert "waiting until it is done" in caplog.text


def test_a_folder_that_the_manifest_does_not_know_outlives_a_killed_pack(tmp_path: Path, warm_python: str) -> None:
    (tmp_path / "weights_manifest.json").write_text(json.dumps(EMPTY))
    mine = tmp_path / "weights" / NAME / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    killed = "import os; from pathlib import Path; from conam_zoo.release.exchange import scratch_folder\n"
    killed += f"with scratch_folder(Path({str(tmp_path)!r}), {NAME!r}): os._exit(9)"
    assert subprocess.run([warm_python, "-c", killed]).returncode == 9
    with packing(tmp_path):
        assert not list(tmp_path.glob(".packing-*"))
    assert mine.read_text() == "mine"

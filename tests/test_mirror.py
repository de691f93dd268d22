"""A directory of verified weights for machines without network, and the check of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from small_entry import entry_for

from conam_zoo import weights
from conam_zoo.weights import Manifest, WeightsError, dump_manifest, find_verified, load_manifest, manifest
from conam_zoo.weights import resolve as hub
from conam_zoo.weights.resolve import fill_mirror

NAMES = ("resnet20_conam.cifar10", "resnet56_conam.cifar10", "resnet20_conam.cifar100")


def content_of(name: str) -> bytes:
    return save({"fc.bias": torch.full((4,), float(NAMES.index(name)))})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with three weights, which this process believes to run from."""
    entries = {name: entry_for(name, content_of(name), revision=None) for name in NAMES}
    folder = tmp_path / "checkout"
    for name in NAMES:
        (folder / "weights" / name).mkdir(parents=True)
        (folder / "weights" / name / "model.safetensors").write_bytes(content_of(name))
    dump_manifest(Manifest(entries, None), folder / "weights_manifest.json")
    monkeypatch.delenv("CONAM_ZOO_MIRROR", raising=False)
    monkeypatch.setattr(hub, "find_checkout", lambda: folder)
    found = load_manifest(folder / "weights_manifest.json")
    monkeypatch.setattr(weights, "load_manifest", lambda path=None: found)
    monkeypatch.setattr(manifest, "find_checkout", lambda: folder)
    return folder


def test_a_mirror_alone_is_enough(checkout: Path, tmp_path: Path, conam, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = conam("mirror", tmp_path / "mirror")
    assert code == 0
    assert out.count("written: ") == 3
    shutil.rmtree(checkout / "weights")
    monkeypatch.setenv("CONAM_ZOO_MIRROR", str(tmp_path / "mirror"))
    for name in NAMES:
        found = find_verified(load_manifest(checkout / "weights_manifest.json").entry(name))
        assert (found.source, found.path.read_bytes()) == ("mirror", content_of(name))
    assert not list((tmp_path / "mirror").rglob(".*")), "no temporary file is left"


def test_a_pattern_chooses_and_one_that_matches_nothing_is_named(checkout: Path, tmp_path: Path, conam) -> None:
    assert conam("mirror", tmp_path / "mirror", "*.cifar100")[0] == 0
    assert {path.name for path in (tmp_path / "mirror").iterdir()} == {"resnet20_conam.cifar100"}
    code, _, err = conam("mirror", tmp_path / "mirror", "vgg*")
    assert (code, "'vgg*'" in err) == (2, True)


def test_filling_again_renews_what_is_wrong_and_leaves_what_is_good(checkout: Path, tmp_path: Path, conam) -> None:
    conam("mirror", tmp_path / "mirror")
    wrong = tmp_path / "mirror" / NAMES[0] / "model.safetensors"
    good = tmp_path / "mirror" / NAMES[1] / "model.safetensors"
    wrong.write_bytes(b"wrong")
    before = good.stat()
    _, out, _ = conam("mirror", tmp_path / "mirror")
    assert f"written: {wrong}" in out
    assert f"is there: {good}" in out
    assert wrong.read_bytes() == content_of(NAMES[0])
    assert (good.stat().st_ino, good.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_link_is_replaced_and_not_written_through(checkout: Path, tmp_path: Path) -> None:
    entry = load_manifest(checkout / "weights_manifest.json").entry(NAMES[0])
    outside = tmp_path / "outside"
    outside.write_bytes(b"somebody else's")
    copy = tmp_path / "mirror" / NAMES[0] / "model.safetensors"
    copy.parent.mkdir(parents=True)
    copy.symlink_to(outside)
    assert fill_mirror(entry, tmp_path / "mirror") == (copy, True)
    assert not copy.is_symlink()
    assert outside.read_bytes() == b"somebody else's"
    shutil.rmtree(copy.parent)
    copy.parent.symlink_to(tmp_path)
    with pytest.raises(WeightsError, match="is a symbolic link"):
        fill_mirror(entry, tmp_path / "mirror")


def test_no_copy_to_be_had_and_no_place_to_write_are_one_sentence(checkout: Path, tmp_path: Path, conam) -> None:
    (tmp_path / "a_file").touch()
    code, _, err = conam("mirror", tmp_path / "a_file")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path / 'a_file'}" in err
    (checkout / "weights" / NAMES[0] / "model.safetensors").write_bytes(b"wrong")
    code, _, err = conam("mirror", tmp_path / "mirror", NAMES[0])
    assert code == 2
    assert "No verified copy" in err
    assert not (tmp_path / "mirror" / NAMES[0] / "model.safetensors").exists()


def test_verify_tells_good_missing_and_wrong_in_a_mirror(checkout: Path, tmp_path: Path, conam) -> None:
    def verify(*arguments: object) -> tuple[int, dict[str, str]]:
        code, out, _ = conam("verify", *arguments, "--mirror", tmp_path / "mirror", "--json", "-")
        return code, {row["weights"]: row["status"] for row in json.loads(out) if row["place"] == "mirror"}

    conam("mirror", tmp_path / "mirror")
    assert verify() == (0, dict.fromkeys(NAMES, "good"))
    (tmp_path / "mirror" / NAMES[0] / "model.safetensors").unlink()
    assert verify() == (0, {NAMES[0]: "missing", NAMES[1]: "good", NAMES[2]: "good"})  # a mirror may hold some
    assert verify(NAMES[0]) == (1, {NAMES[0]: "missing"})
    assert verify(NAMES[1])[0] == 0
    (tmp_path / "mirror" / NAMES[1] / "model.safetensors").write_bytes(b"wrong")
    assert verify(NAMES[1]) == (1, {NAMES[1]: "wrong"})


def test_verify_names_the_sites_whose_confidences_are_even(checkout: Path, conam, monkeypatch) -> None:
    alive = {"layer1.0.attn": 0.001, "layer2.0.attn": 0.5, "layer3.0.attn": 0.019}
    entries = {NAMES[0]: replace(weights.load_manifest().entries[NAMES[0]], liveness=alive)}
    monkeypatch.setattr(weights, "load_manifest", lambda path=None: Manifest(entries, None))
    _, out, _ = conam("verify", NAMES[0])
    assert f"{NAMES[0]}: ConAM gives all patches the same confidence at layer1.0.attn, layer3.0.attn\n" in out
    _, out, _ = conam("verify", NAMES[0], "--json")
    assert {tuple(row["even_sites"]) for row in json.loads(out)} == {("layer1.0.attn", "layer3.0.attn")}


def test_a_mirror_or_a_cache_in_a_home_of_nobody_is_one_sentence(checkout: Path, conam, monkeypatch) -> None:
    entry = weights.load_manifest().entries[NAMES[0]]
    published = replace(entry, revision="0" * 40)
    monkeypatch.setattr(hub, "find_checkout", lambda: None)
    with pytest.raises(WeightsError, match="a home folder that does not exist"):
        find_verified(published, cache_dir="~nobody-at-all/cache", namespace="somebody")
    monkeypatch.setenv("CONAM_ZOO_MIRROR", "~nobody-at-all/mirror")
    code, _, err = conam("verify")
    assert (code, err.count("\n")) == (2, 1)
    assert "~nobody-at-all/mirror begins with a home folder that does not exist" in err

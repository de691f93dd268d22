"""Weights in several files: written, read and verified shard by shard, from a folder, a mirror and a Hub."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_client import HubClient, assert_one_sentence
from hub_server import HubServer, serve
from safetensors.torch import save
from small_entry import NAMESPACE, REVISION, damaged, entry_for

import conam_zoo  # noqa: F401
from conam_zoo.models.registry import INDEX_FILE, export_model
from conam_zoo.weights import Manifest, WeightEntry, WeightsError, WrongWeightsError, dump_manifest, read_verified
from conam_zoo.weights.folder import read_folder
from conam_zoo.weights.resolve import fill_mirror
from conam_zoo.weights.verify import Shard, examine_copy, make_index, read_index

pytestmark = [pytest.mark.enable_socket, pytest.mark.timeout(300)]

NAME = "tiny_conam.cifar10"
HUB_ID = f"{NAMESPACE}/{NAME}"
LIMIT = 400_000  # bytes; resnet20_conam has 1.1 MB
TENSORS = {"conv1.weight": torch.arange(48.0).reshape(4, 3, 2, 2), "fc.weight": torch.eye(4), "fc.bias": torch.ones(4)}
SUMS = {name: float(tensor.sum()) for name, tensor in TENSORS.items()}
PLACES = {"conv1.weight": "a.safetensors", "fc.weight": "b.safetensors", "fc.bias": "b.safetensors"}


def small_files() -> dict[str, bytes]:
    """Two shards and their index."""
    files = {
        file: save({name: TENSORS[name] for name in PLACES if PLACES[name] == file})
        for file in sorted(set(PLACES.values()))
    }
    shards = tuple(Shard(file, hashlib.sha256(data).hexdigest(), len(data)) for file, data in files.items())
    return files | {INDEX_FILE: make_index(PLACES, shards).encode()}


@pytest.fixture
def files() -> dict[str, bytes]:
    return small_files()


@pytest.fixture
def entry(files: dict[str, bytes]) -> WeightEntry:
    return entry_for(NAME, files[INDEX_FILE], file=INDEX_FILE)


def lay(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# --- folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = timm.create_model("resnet20_conam.cifar10")
    folder = tmp_path_factory.mktemp("exported")
    sha256 = export_model(model, folder, tag=None, max_shard_bytes=LIMIT)
    assert sha256 == hashlib.sha256((folder / INDEX_FILE).read_bytes()).hexdigest()
    return model, folder


def test_a_large_model_is_written_as_shards_and_loaded_from_them(exported: tuple[torch.nn.Module, Path]) -> None:
    model, folder = exported
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 3
    assert not (folder / "model.safetensors").exists()
    assert all(path.stat().st_size < LIMIT + 20_000 for path in shards)  # tensors, and a header
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_small_model_stays_one_file(exported: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    export_model(exported[0], tmp_path, tag=None, max_shard_bytes=2_000_000)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def test_one_of_several_files_is_refused_as_a_checkpoint(exported: tuple[torch.nn.Module, Path]) -> None:
    shard = str(max(exported[1].glob("*.safetensors")))
    with pytest.raises(WeightsError, match="is one of several files: load the model local-dir:"):
        timm.create_model("resnet20_conam", checkpoint_path=shard)


def _spoil_shard(folder: Path) -> str:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(damaged(path.read_bytes()))
    return path.name


def _remove_shard(folder: Path) -> str:
    path = max(folder.glob("*.safetensors"))
    path.unlink()
    return path.name


def _spoil_index(folder: Path) -> str:
    path = folder / INDEX_FILE
    path.write_bytes(path.read_bytes() + b"\n")
    return INDEX_FILE


def _swap_shards(folder: Path) -> str:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    first_data, second_data = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_data)
    second.write_bytes(first_data)
    return first.name


@pytest.mark.parametrize("spoil", [_spoil_shard, _remove_shard, _spoil_index, _swap_shards])
def test_a_folder_with_a_wrong_part_is_refused(
    spoil: Callable[[Path], str], exported: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported[1], folder)
    name = spoil(folder)
    with pytest.raises(WrongWeightsError) as caught:
        read_folder(folder)
    assert name in str(caught.value)
    assert_one_sentence(str(caught.value))


def test_a_config_that_names_no_weights_is_refused(exported: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported[1], folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("../outside.safetensors", "pytorch_model.bin", 3):
        (folder / "config.json").write_text(json.dumps(config | {"weights_file": name}))
        with pytest.raises(WeightsError, match="which is no safetensors file"):
            read_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: [],
        lambda document: document | {"metadata": {"total_size": 3}},
        lambda document: document | {"weight_map": {"fc.bias": "a.safetensors"}},
        lambda document: document | {"weight_map": {}},
        lambda document: json.loads(json.dumps(document).replace("a.safetensors", "../a.safetensors")),
        lambda document: json.loads(json.dumps(document).replace("a.safetensors", "a.safetensors.index.json")),
        lambda document: json.loads(json.dumps(document).replace('"size_bytes": ', '"size_bytes": -')),
        lambda document: json.loads(json.dumps(document).replace('"sha256": "', '"sha256": "x')),
    ],
)
def test_an_index_that_is_none_or_contradicts_itself_is_refused(
    change: Callable[[Any], Any], files: dict[str, bytes]
) -> None:
    data = json.dumps(change(json.loads(files[INDEX_FILE]))).encode()
    with pytest.raises(WeightsError) as caught:
        read_index(data, Path(INDEX_FILE))
    assert_one_sentence(str(caught.value))


# --- what the manifest describes ----------------------------------------------------------------------------


def test_a_verified_copy_is_one_whose_every_shard_is_right(
    files: dict[str, bytes], entry: WeightEntry, tmp_path: Path
) -> None:
    index = lay(tmp_path, files) / INDEX_FILE
    state = read_verified(index, entry)
    assert {name: float(tensor.sum()) for name, tensor in state.items()} == SUMS
    (tmp_path / "b.safetensors").write_bytes(damaged(files["b.safetensors"]))
    with pytest.raises(WrongWeightsError, match=r"b\.safetensors is not the published file"):
        read_verified(index, entry)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(WrongWeightsError, match=r"b\.safetensors does not exist; .* and the files that it names"):
        read_verified(index, entry)
    assert examine_copy("mirror", index, entry).status == "wrong"
    assert examine_copy("cache", index, entry).status == "missing", "a download may have been interrupted"


def test_files_that_hold_other_tensors_than_the_index_says_are_refused(tmp_path: Path) -> None:
    files = {file: save(TENSORS) for file in ("a.safetensors", "b.safetensors")}
    shards = tuple(Shard(file, hashlib.sha256(data).hexdigest(), len(data)) for file, data in files.items())
    index = make_index(PLACES, shards).encode()
    lay(tmp_path, files | {INDEX_FILE: index})
    with pytest.raises(WeightsError, match=r"a\.safetensors disagree about the tensor fc\.bias"):
        read_verified(tmp_path / INDEX_FILE, entry_for(NAME, index, file=INDEX_FILE))


def test_a_mirror_gets_every_part_and_the_index_last(
    files: dict[str, bytes], entry: WeightEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONAM_ZOO_MIRROR", str(tmp_path / "source"))
    lay(tmp_path / "source" / NAME, files)
    target = tmp_path / "mirror"
    assert fill_mirror(entry, target) == (target / NAME / INDEX_FILE, True)
    assert {path.name: path.read_bytes() for path in (target / NAME).iterdir()} == files
    assert fill_mirror(entry, target)[1] is False
    (target / NAME / "a.safetensors").write_bytes(b"wrong")
    before = (target / NAME / "b.safetensors").stat()
    assert fill_mirror(entry, target)[1] is True
    assert (target / NAME / "a.safetensors").read_bytes() == files["a.safetensors"]
    assert (target / NAME / "b.safetensors").stat().st_mtime_ns == before.st_mtime_ns


# --- the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serve({(HUB_ID, REVISION, name): data for name, data in small_files().items()}) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Iterator[HubClient]:
    folder = tmp_path_factory.mktemp("user")
    client = HubClient(warm_python, folder, hub.url, environment={"HF_TOKEN": "hf_ofSomeLab"})
    yield client
    client.close()


@pytest.fixture
def task(hub: HubServer, entry: WeightEntry, tmp_path: Path) -> dict[str, Any]:
    """Finding the weights with a cache of its own."""
    hub.set_mode("ok")
    hub.requests.clear()
    dump_manifest(Manifest({NAME: entry}, NAMESPACE), tmp_path / "manifest.json")
    return {"name": NAME, "manifest": str(tmp_path / "manifest.json"), "cache_dir": str(tmp_path / "cache")}


def test_first_use_downloads_each_file_once_and_later_ones_ask_nobody(
    hub: HubServer, client: HubClient, task: dict[str, Any]
) -> None:
    first = client.do("find", **task)
    assert (first["source"], first["sums"]) == ("hub", SUMS), first
    assert hub.count("GET") == 3
    hub.requests.clear()
    second = client.do("find", **task)
    assert (second["source"], second["sums"]) == ("cache", SUMS)
    assert hub.requests == []
    assert client.do("check", **task)["copies"]["cache"] == "good"


def test_a_wrong_shard_in_the_cache_is_fetched_again_and_the_others_are_not(
    hub: HubServer, client: HubClient, task: dict[str, Any], files: dict[str, bytes]
) -> None:
    client.do("find", **task)
    sha256 = hashlib.sha256(files["a.safetensors"]).hexdigest()
    (blob,) = Path(task["cache_dir"]).glob(f"*/blobs/{sha256}")
    blob.write_bytes(damaged(files["a.safetensors"]))
    hub.requests.clear()
    assert client.do("check", **task)["copies"]["cache"] == "wrong"
    again = client.do("find", **task)
    assert (again["source"], again["sums"]) == ("hub", SUMS)
    assert [r for r in hub.requests if r.startswith("GET")] == [f"GET /{HUB_ID}/resolve/{REVISION}/a.safetensors"]
    assert "a.safetensors is not the published file" in again["log"]


def test_a_hub_that_delivers_another_shard_is_refused(
    hub: HubServer, client: HubClient, task: dict[str, Any], files: dict[str, bytes]
) -> None:
    hub.files[HUB_ID, REVISION, "b.safetensors"] = damaged(files["b.safetensors"])
    answer = client.do("find", **task)
    hub.files[HUB_ID, REVISION, "b.safetensors"] = files["b.safetensors"]
    assert answer["error"] == "WrongWeightsError"
    assert "offers another b.safetensors" in answer["message"]
    assert_one_sentence(answer["message"])
    assert not any(f"GET /{HUB_ID}/resolve/{REVISION}/b.safetensors" == request for request in hub.requests)


def test_a_repository_of_ones_own_in_several_files(
    hub: HubServer, client: HubClient, files: dict[str, bytes], tmp_path: Path
) -> None:
    config = {"weights_file": INDEX_FILE, "sha256": hashlib.sha256(files[INDEX_FILE]).hexdigest()}
    hub.files[HUB_ID, REVISION, "config.json"] = json.dumps(config).encode()
    task = {"hub_id": f"{HUB_ID}@{REVISION}", "cache_dir": str(tmp_path / "cache")}
    assert client.do("folder", **task)["sums"] == SUMS
    (blob,) = (tmp_path / "cache").glob(f"*/blobs/{hashlib.sha256(files['b.safetensors']).hexdigest()}")
    blob.write_bytes(damaged(files["b.safetensors"]))
    assert client.do("folder", **task)["sums"] == SUMS
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    (link,) = (tmp_path / "cache").glob("*/snapshots/*/b.safetensors")
    link.unlink()
    link.write_bytes(damaged(files["b.safetensors"]))  # as in a cache without symbolic links
    assert client.do("folder", **task)["sums"] == SUMS


def test_publishing_uploads_every_part_and_first_use_reads_them(
    hub: HubServer, client: HubClient, entry: WeightEntry, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.tokens.add("hf_ofSomeLab")
    config = {"architecture": entry.arch, "num_classes": entry.num_classes, "sha256": entry.sha256}
    extra = {"config.json": json.dumps(config | {"weights_file": INDEX_FILE}).encode()}
    lay(tmp_path / "weights" / NAME, files | extra)
    manifest = tmp_path / "weights_manifest.json"
    dump_manifest(Manifest({NAME: entry_for(NAME, files[INDEX_FILE], file=INDEX_FILE, revision=None)}), manifest)
    card = "---\nlicense: apache-2.0\nlibrary_name: timm\n---\n\n# A card\n"
    options = {"names": [NAME], "namespace": "publisher", "cards": {NAME: card}, "tag": "v1"}
    (done,) = client.do("publish", options=options | {"manifest_path": str(manifest)})["done"]
    assert set(files) < set(done[3])
    (again,) = client.do("publish", options=options | {"manifest_path": str(manifest)})["done"]
    assert again[5] is False  # nothing changed, and the tag marks these weights
    shutil.rmtree(tmp_path / "weights")
    answer = client.do("find", name=NAME, manifest=str(manifest), cache_dir=str(tmp_path / "cache"))
    assert (answer["source"], answer["sums"]) == ("hub", SUMS), answer

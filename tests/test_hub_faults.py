"""Every fault of ``faults.py``, on a machine of its own: the right weights, or one sentence within ten seconds."""

import fcntl
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from faults import FAULTS, FOLDER_FAULTS, PAGE, Fault, render
from hub_client import HubClient, assert_one_sentence, install_package
from hub_server import SLOW_S, HubServer, Mode, refusing_url, serve
from safetensors.torch import save
from small_entry import NAMESPACE, REVISION, Bomb, entry_for

import conam_zoo  # noqa: F401 (registers the models)
from conam_zoo.datasets import DATASETS
from conam_zoo.weights import Manifest, dump_manifest

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket, pytest.mark.timeout(300)]

NAME = "tiny_conam.cifar10"
HUB_ID = f"{NAMESPACE}/{NAME}"
TOKEN = "hf_theTokenOfTheUser"
DATA = save({"conv1.weight": torch.arange(24_000, dtype=torch.float32), "fc.bias": torch.ones(4)})
SPOILT = DATA[:-1] + bytes([DATA[-1] ^ 1])
SUMS = {"conv1.weight": float(torch.arange(24_000, dtype=torch.float64).sum()), "fc.bias": 4.0}
CONFIG = json.dumps({"architecture": "tiny_conam", "sha256": hashlib.sha256(DATA).hexdigest()}).encode()


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serve({}) as server:
        yield server


@pytest.fixture(scope="module")
def clients(
    hub: HubServer, tmp_path_factory: pytest.TempPathFactory, warm_python: str
) -> Iterator[Callable[[str], HubClient]]:
    """Clients by the Hub that they know, started when first asked for."""
    started: dict[str, HubClient] = {}

    def client(kind: str) -> HubClient:
        if kind not in started:
            endpoint = {"refused": refusing_url(), "unresolved": "http://hub.invalid"}.get(kind, hub.url)
            environment = {"HF_HUB_OFFLINE": "1"} if kind == "offline" else {}
            folder = tmp_path_factory.mktemp(kind)
            started[kind] = HubClient(warm_python, folder, endpoint, environment=environment)
            # The ten seconds are for the fault; and forked processes need not import anything.
            imports = ["safetensors.torch", "huggingface_hub.file_download", "filelock", "httpx2"]
            started[kind].do("get_ready", imports=imports)
        return started[kind]

    yield client
    for started_client in started.values():
        started_client.close()


@dataclass
class Scene:
    """One fault: a server, an empty cache, a manifest, and the clients that may use them."""

    folder: Path
    hub: HubServer
    client: Callable[[str], HubClient]
    fault: Fault

    def __post_init__(self) -> None:
        self.cache = self.folder / "cache"
        self.manifest_path = self.folder / "manifest.json"
        self.offer(DATA)
        self.hub.private.clear()
        self.hub.tokens.clear()
        self.hub.requests.clear()
        self.hub.lies.clear()
        self.hub.set_mode("ok")

    def offer(self, data: bytes) -> None:
        """Publish ``data``: the Hub delivers it, and the manifest describes it."""
        self.hub.files.clear()
        self.hub.files[HUB_ID, REVISION, "model.safetensors"] = data
        for revision in (REVISION, "main"):
            self.hub.files[HUB_ID, revision, "config.json"] = CONFIG
        dump_manifest(Manifest({NAME: entry_for(NAME, data)}, NAMESPACE), self.manifest_path)

    @property
    def task(self) -> dict[str, Any]:
        return {"action": "find", "manifest": str(self.manifest_path), "name": NAME, "cache_dir": str(self.cache)}

    def find(self, kind: str = "hub", **more: Any) -> dict[str, Any]:
        return self.client(kind).do(**(self.task | more))

    def forked(self, processes: int = 1, hardships: tuple[str, ...] = (), **more: Any) -> list[dict[str, Any]]:
        """The answers of processes that are forked from one that has asked nobody anything yet."""
        task = self.task | {"hardships": hardships}
        answer = self.client("fork").do("forked", task=task, processes=processes, **more)
        return cast(list[dict[str, Any]], answer["told"])

    def break_cache(self) -> Path:
        """Spoil a byte of the cached copy."""
        (blob,) = (self.cache / f"models--{NAMESPACE}--{NAME}" / "blobs").glob(hashlib.sha256(DATA).hexdigest())
        blob.write_bytes(SPOILT)
        return blob

    def judge(self, answer: dict[str, Any]) -> None:
        """Hold an answer against what the fault should end in."""
        assert answer["seconds"] < 10, answer
        if not self.fault.says:
            assert answer.get("sums") == SUMS, answer
        else:
            assert {"WeightsError", "ManifestError"} & set(answer["kinds"]), answer["traceback"]
            assert self.fault.says in answer["message"]
            assert_one_sentence(answer["message"])
            assert TOKEN not in answer["traceback"] + answer.get("log", "")

    def recover(self) -> None:
        """Without the fault, the same cache gives the right weights."""
        self.hub.set_mode("ok")
        self.offer(DATA)
        assert self.find().get("sums") == SUMS


def scene_of(name: str) -> Fault:
    (fault,) = [fault for fault in FAULTS if fault.scene == name]
    return fault


@pytest.fixture
def make_scene(tmp_path: Path, hub: HubServer, clients: Callable[[str], HubClient]) -> Callable[[Fault], Scene]:
    return lambda fault: Scene(tmp_path, hub, clients, fault)


@pytest.fixture
def scene(request: pytest.FixtureRequest, make_scene: Callable[[Fault], Scene]) -> Scene:
    """The scene that the test is named after."""
    name = request.function.__name__.removeprefix("test_").replace("_", " ")
    names = {fault.scene.replace("-", " "): fault for fault in FAULTS}
    return make_scene(names[name])


def named(fault: Fault) -> str:
    return fault.name


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.scene == "load"], ids=named)
def test_load(fault: Fault, make_scene: Callable[[Fault], Scene]) -> None:
    scene = make_scene(fault)
    scene.hub.set_mode(cast(Mode, fault.mode))
    token = {"HF_TOKEN": TOKEN} if fault.mode in ("expired-token", "gated") else {}
    scene.judge(scene.find(environment=token))
    assert not list(scene.cache.rglob("*.incomplete"))
    scene.recover()


LIES = [
    {"ETag": value}
    for value in (
        '"../../../victim.txt"',
        "/tmp/conam_victim.txt",
        '""',
        'W/"../../../victim.txt"',
        '"' + "0" * 39 + '"',
        '"' + "g" * 64 + '"',
        '"' + "0" * 40 + '/../../victim.txt"',
    )
] + [
    {"X-Linked-Etag": '"../../../victim.txt"'},
    {"X-Repo-Commit": "../../../victim.txt"},
    {"X-Repo-Commit": "/tmp/conam_victim"},
    {"X-Repo-Commit": None},
]


def tell_lies(scene: Scene, load: Callable[[], dict[str, Any]], asked: str) -> None:
    """Every lie about where a file belongs ends in a sentence, before a byte is asked for, and leaves nothing."""
    victim = scene.folder / "victim.txt"
    victim.write_text("precious")
    for lies in LIES:
        before = {path: path.read_bytes() for path in scene.folder.rglob("*") if path.is_file()}
        scene.hub.lies = dict(lies)
        scene.hub.requests.clear()
        scene.judge(load())
        assert scene.hub.requests, lies
        assert all(line.startswith("HEAD") and asked in line for line in scene.hub.requests)
        scene.hub.lies.clear()
        assert {path: path.read_bytes() for path in scene.folder.rglob("*") if path.is_file()} == before
    assert load()["sums"] == SUMS
    assert victim.read_text() == "precious"


def test_lies(scene: Scene) -> None:
    tell_lies(scene, scene.find, "model.safetensors")


def test_a_hash_in_upper_case_and_a_weak_one_are_hashes(make_scene: Callable[[Fault], Scene]) -> None:
    scene = make_scene(scene_of("lies"))
    scene.hub.lies = {"ETag": 'W/"' + hashlib.sha256(DATA).hexdigest().upper() + '"'}
    assert scene.find()["sums"] == SUMS


def test_a_file_where_the_blobs_should_be_is_no_end(make_scene: Callable[[Fault], Scene]) -> None:
    """An empty ETag left one there."""
    scene = make_scene(scene_of("lies"))
    repository = scene.cache / f"models--{NAMESPACE}--{NAME}"
    repository.mkdir(parents=True)
    (repository / "blobs").write_bytes(DATA)
    assert scene.find()["sums"] == SUMS


def test_a_link_in_the_cache_leads_nowhere_else(make_scene: Callable[[Fault], Scene]) -> None:
    scene = make_scene(scene_of("lies"))
    elsewhere = scene.folder / "elsewhere"
    elsewhere.mkdir()
    repository = scene.cache / f"models--{NAMESPACE}--{NAME}"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").symlink_to(elsewhere)
    assert "leads out of the cache" in scene.find()["message"]
    assert not list(elsewhere.iterdir())


def test_the_token_does_not_travel_to_storage(make_scene: Callable[[Fault], Scene]) -> None:
    scene = make_scene(scene_of("lies"))
    scene.hub.elsewhere = True
    scene.hub.with_token.clear()
    try:
        assert scene.find(environment={"HF_TOKEN": TOKEN})["sums"] == SUMS
    finally:
        scene.hub.elsewhere = False
    assert scene.hub.with_token
    assert not any("/storage/" in path for path in scene.hub.with_token)


def test_stopped_process(scene: Scene) -> None:
    lock = scene.cache / ".locks" / "conam_zoo" / f"{NAME}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        answer = scene.find(lock_timeout_s=2.5)
    assert 2.5 < answer["seconds"] < 10
    scene.judge(answer)
    assert "Waiting for another process that fetches" in answer["log"]
    assert str(lock) in answer["log"]


@pytest.mark.parametrize("kind", ["refused", "unresolved", "offline"])
def test_no_hub(kind: str, make_scene: Callable[[Fault], Scene]) -> None:
    scene = make_scene(scene_of(kind))
    scene.judge(scene.find(kind))
    scene.recover()


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.scene == "corrupt cache"], ids=named)
def test_corrupt_cache(fault: Fault, make_scene: Callable[[Fault], Scene]) -> None:
    scene = make_scene(fault)
    assert scene.find()["source"] == "hub"
    scene.break_cache()
    scene.hub.set_mode(cast(Mode, fault.mode))
    scene.judge(scene.find())
    scene.recover()


@pytest.mark.parametrize("name", ["truncated header", "huge header"])
def test_header(name: str, make_scene: Callable[[Fault], Scene]) -> None:
    scene = make_scene(scene_of(name))
    scene.offer(DATA[:60] if name == "truncated header" else (2**62).to_bytes(8, "little") + DATA[8:])
    scene.judge(scene.find())


def test_pickle(scene: Scene) -> None:
    scene.offer(pickle.dumps(Bomb(scene.folder / "exploded")))
    scene.judge(scene.find())
    assert not (scene.folder / "exploded").exists()
    scene.offer(DATA)
    scene.hub.files[HUB_ID, REVISION, "model.safetensors"] = pickle.dumps(Bomb(scene.folder / "exploded"))
    assert scene.find()["error"] == "WrongWeightsError"
    assert not (scene.folder / "exploded").exists()


def test_full_disk(scene: Scene) -> None:
    (answer,) = scene.forked(hardships=("full disk",))
    scene.judge(answer)
    scene.recover()


def test_read_only_cache(scene: Scene) -> None:
    scene.cache.mkdir()
    scene.cache.chmod(0o555)
    try:
        (answer,) = scene.forked(hardships=("read-only",))
    finally:
        scene.cache.chmod(0o755)
    scene.judge(answer)
    scene.recover()


def test_read_only_full_cache(scene: Scene) -> None:
    assert scene.find()["source"] == "hub"
    shutil.rmtree(scene.cache / ".locks")
    folders = [scene.cache, *(path for path in scene.cache.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        (answer,) = scene.forked(hardships=("read-only",))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    scene.judge(answer)


def test_killed(scene: Scene) -> None:
    moments = random.Random(20)
    scene.hub.set_mode("slow")
    downloads = 0
    for _ in range(20):
        before = scene.hub.count("GET")
        (told,) = scene.forked(kill_after_s=moments.uniform(0, SLOW_S))
        downloads += scene.hub.count("GET") > before and "signal" in told
        copies = scene.client("hub").do(
            "check", manifest=str(scene.manifest_path), name=NAME, cache_dir=str(scene.cache)
        )
        assert copies["copies"]["cache"] != "wrong"
        if copies["copies"]["cache"] == "good":
            shutil.rmtree(scene.cache)
    assert downloads >= 10, "most of the processes have to die in the middle"
    partial = list(scene.cache.rglob("*.incomplete"))
    for path in partial[1:]:
        os.utime(path, (0, 0))
    shutil.rmtree(scene.cache / f"models--{NAMESPACE}--{NAME}" / "snapshots", ignore_errors=True)
    scene.judge(scene.find())
    assert list(scene.cache.rglob("*.incomplete")) == partial[:1], "but for the one that may still be written to"


def test_eight_at_once(scene: Scene) -> None:
    scene.hub.set_mode("slow")
    answers = scene.forked(processes=8)
    for answer in answers:
        scene.judge(answer)
    assert sorted(answer["source"] for answer in answers) == ["cache"] * 7 + ["hub"]
    assert scene.hub.count("GET") == 1


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors", "..\\model.safetensors"]
)
def test_climbing_path(file: str, scene: Scene) -> None:
    text = scene.manifest_path.read_text().replace('"model.safetensors"', json.dumps(file))
    scene.manifest_path.write_text(text)
    scene.judge(scene.find())
    assert scene.hub.requests == []


@pytest.mark.parametrize("field", ["hub_namespace", "repository", "file"])
def test_http_in_manifest(field: str, scene: Scene) -> None:
    document = json.loads(scene.manifest_path.read_text())
    (document if field == "hub_namespace" else document["entries"][NAME])[field] = scene.hub.url + "/x.safetensors"
    scene.manifest_path.write_text(json.dumps(document))
    scene.judge(scene.find())
    assert scene.hub.requests == []


def test_open_token(scene: Scene) -> None:
    scene.judge(scene.find("unresolved", environment={"HF_TOKEN": TOKEN}))


def test_link_to_right_file(scene: Scene) -> None:
    right = scene.folder / "elsewhere.safetensors"
    right.write_bytes(DATA)
    copy = scene.folder / "mirror" / NAME / "model.safetensors"
    copy.parent.mkdir(parents=True)
    copy.symlink_to(right)
    answer = scene.find(environment={"CONAM_ZOO_MIRROR": str(scene.folder / "mirror")})
    scene.judge(answer)
    assert answer["source"] == "mirror"


@pytest.mark.parametrize("target", ["other file", "/dev/zero", "itself", "nowhere"])
def test_other_links(target: str, scene: Scene) -> None:
    copy = scene.folder / "mirror" / NAME / "model.safetensors"
    copy.parent.mkdir(parents=True)
    (scene.folder / "other.safetensors").write_bytes(SPOILT)
    paths = {"other file": scene.folder / "other.safetensors", "itself": copy, "nowhere": scene.folder / "nowhere"}
    copy.symlink_to(paths.get(target, Path(target)))
    answer = scene.find(environment={"CONAM_ZOO_MIRROR": str(scene.folder / "mirror")})
    scene.judge(answer)
    assert answer["source"] == "hub"


# --- files that are right by their hash, and of another net -------------------------------------------------


@pytest.fixture(scope="module")
def other_nets(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Iterator[tuple[HubClient, HubServer]]:
    """A machine whose manifest describes files of other nets: one of more blocks, one of seven classes."""
    folder = tmp_path_factory.mktemp("other_nets")
    deeper, seven = timm.create_model("resnet32_conam"), timm.create_model("resnet20_conam", num_classes=7)
    entries, files = {}, {}
    for tag, model in (("cifar10", deeper), ("cifar100", seven)):
        name = f"resnet20_conam.{tag}"
        data = save({key: value.contiguous() for key, value in model.state_dict().items()})
        classes = DATASETS[tag].classes
        entries[name] = entry_for(name, data, num_classes=len(classes), classes=classes)
        files[f"{NAMESPACE}/{name}", REVISION, "model.safetensors"] = data
    site = install_package(folder / "site", Manifest(entries, NAMESPACE))
    with serve(files) as server:
        client = HubClient(warm_python, folder, server.url, site=site)
        client.do("get_ready", imports=["timm", "conam_zoo"])
        yield client, server
        client.close()


@pytest.mark.parametrize(("scene_name", "tag"), [("other net", "cifar10"), ("classes", "cifar100")])
def test_other_nets(
    scene_name: str, tag: str, other_nets: tuple[HubClient, HubServer], make_scene: Callable[[Fault], Scene]
) -> None:
    for options in ({}, {"num_classes": 5}):
        answer = other_nets[0].do("create", name=f"resnet20_conam.{tag}", options=options)
        make_scene(scene_of(scene_name)).judge(answer)


def test_the_command_asks_a_repository_before_timm_does(
    other_nets: tuple[HubClient, HubServer], tmp_path: Path
) -> None:
    """It knows within ten seconds that the Hub is away, and never lets timm read a net that is not of this package."""
    client, server = other_nets
    server.files["some-lab/stranger", "main", "config.json"] = json.dumps({"architecture": "resnet18"}).encode()
    stranger = {"name": "hf-hub:some-lab/stranger", "cache_dir": str(tmp_path)}
    assert "There is no model 'resnet18'" in client.do("open_model", **stranger)["message"]
    server.requests.clear()
    server.set_mode("500")
    away = client.do("open_model", name="hf-hub:some-lab/other", cache_dir=str(tmp_path))
    server.set_mode("ok")
    assert "answered with status 500" in away["message"]
    assert_one_sentence(away["message"])
    assert away["seconds"] < 10


# --- a repository of the caller's own -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", FOLDER_FAULTS, ids=named)
def test_hub_folder(fault: Fault, make_scene: Callable[[Fault], Scene]) -> None:
    scene = make_scene(fault)
    scene.hub.files[HUB_ID, "main", "model.safetensors"] = DATA
    task = {"action": "folder", "hub_id": HUB_ID, "cache_dir": str(scene.cache)}
    if fault.scene == "corrupt cache":
        assert scene.client("hub").do(**task)["sums"] == SUMS
        (blob,) = scene.cache.glob(f"*/blobs/{hashlib.sha256(DATA).hexdigest()}")
        blob.write_bytes(SPOILT)
    if fault.scene == "corrupt config":
        assert scene.client("hub").do(**task)["sums"] == SUMS
        (config,) = scene.cache.glob("*/snapshots/*/config.json")
        config.write_bytes(CONFIG.replace(b"sha256", b"sha257"))
    if fault.scene == "lies":
        tell_lies(scene, lambda: scene.client("hub").do(**task), "config.json")
        return
    scene.hub.set_mode(cast(Mode, fault.mode))
    scene.judge(scene.client("refused" if fault.scene == "refused" else "hub").do(**task))
    scene.hub.set_mode("ok")
    assert scene.client("hub").do(**task)["sums"] == SUMS
    if fault.scene == "corrupt config":
        assert config.read_bytes() == CONFIG
    assert not list(scene.cache.rglob("*.incomplete"))


# --- the list itself ----------------------------------------------------------------------------------------


def test_every_fault_of_the_list_has_a_test() -> None:
    tested = {"load", "refused", "unresolved", "offline", "corrupt cache", "truncated header", "huge header"}
    tested |= {"other net", "classes"}
    tests = {name.removeprefix("test_").replace("_", " ") for name in globals() if name.startswith("test_")}
    assert {fault.scene for fault in FAULTS} <= tested | tests | {
        name.replace("read only", "read-only") for name in tests
    }


def test_the_page_is_written_from_the_list() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run 'python tests/faults.py'"

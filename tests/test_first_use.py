"""From `conam publish` to a user's first `timm.create_model`, with a wheel, in clean environments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import CHECKOUT
from hatchling.build import build_wheel
from hub_client import HubClient, assert_one_sentence
from hub_server import HubServer, serve
from small_entry import NAMESPACE, entry_for

import conam_zoo  # noqa: F401 (registers the models)
from conam_zoo.datasets import DATASETS
from conam_zoo.models.registry import export_model
from conam_zoo.weights import Manifest, dump_manifest, load_manifest

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket, pytest.mark.timeout(300)]

NAME = "resnet20_conam.cifar10"
HUB_ID = f"{NAMESPACE}/{NAME}"
TOKEN = "hf_theTokenOfSomeLab"


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The standard output of a command that has to succeed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CONAM_", "PYTHON"))}
    environment |= {"NO_PROXY": "127.0.0.1,localhost"}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return result.stdout


@dataclass
class World:
    """What is published, where, and the wheel that pins it."""

    hub: HubServer
    checkout: Path
    site: Path
    revision: str
    sums: dict[str, float]
    publish: Callable[[], str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Iterator[World]:
    """A checkout whose weights were published by the command, and a wheel of it, unpacked."""
    root = tmp_path_factory.mktemp("world")
    checkout = root / "checkout"
    shutil.copytree(CHECKOUT / "conam_zoo", checkout / "conam_zoo", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("hubconf.py", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"):
        shutil.copy(CHECKOUT / file, checkout)
    torch.manual_seed(1)
    model = timm.create_model("resnet20_conam")
    export_model(model, checkout / "weights" / NAME, tag="cifar10")
    for picture in ("curves.png", "confidence.png"):
        (checkout / "weights" / NAME / picture).write_bytes(b"a picture")
    facts = DATASETS["cifar10"]
    data = (checkout / "weights" / NAME / "model.safetensors").read_bytes()
    entry = entry_for(NAME, data, revision=None, num_classes=10, classes=facts.classes, mean=facts.mean, std=facts.std)
    dump_manifest(Manifest({NAME: entry}, None, "some-lab/conam_zoo"), checkout / "weights_manifest.json")
    with serve({}) as hub:
        hub.elsewhere = True
        hub.tokens = {TOKEN}

        def publish(*options: str) -> str:
            return run(
                *(warm_python, "-m", "conam_zoo", "publish", NAME, "--namespace", NAMESPACE, "--no-onnx", *options),
                cwd=checkout,
                PYTHONPATH=str(checkout),
                HF_ENDPOINT=hub.url,
                HF_HOME=str(root / "publisher"),
                HF_TOKEN=TOKEN,
                HF_HUB_DISABLE_XET="1",
                HF_HUB_DISABLE_TELEMETRY="1",
            )

        assert f"{NAME}: published at " in publish("--private")
        hub.repositories[HUB_ID].private = False
        revision = load_manifest(checkout / "weights_manifest.json").entry(NAME).revision
        assert revision is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(checkout)
            shutil.unpack_archive(root / build_wheel(str(root)), root / "site", format="zip")
        shutil.rmtree(checkout / "weights")
        sums = {key: float(value.double().sum()) for key, value in model.state_dict().items()}
        yield World(hub, checkout, root / "site", revision, sums, publish)


@pytest.fixture(scope="module")
def user(world: World, tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Iterator[HubClient]:
    """A process on a machine that has the wheel, and progress bars although no terminal."""
    folder = tmp_path_factory.mktemp("user")
    client = HubClient(warm_python, folder, world.hub.url, world.site, {"TQDM_POSITION": "-1"})
    client.do("get_ready", imports=["timm", "conam_zoo"])
    yield client
    client.close()


def files_got(hub: HubServer) -> list[str]:
    return [request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and HUB_ID in request]


def test_first_use_is_one_verified_download_and_the_next_asks_nobody(
    world: World, user: HubClient, tmp_path: Path, warm_python: str
) -> None:
    world.hub.requests.clear()
    first = user.do("create", name=NAME)
    assert first.get("sums") == world.sums, first
    assert Path(first["imported"]).is_relative_to(world.site)
    downloads = [request for request in world.hub.requests if request.startswith("GET")]
    assert len(downloads) == 1, downloads
    assert downloads[0].startswith("GET /storage/"), "a large file comes from where the Hub redirects to"
    assert all(request.startswith("HEAD") for request in world.hub.requests if request not in downloads)
    assert "model.safetensors: 100%" in first["log"]

    world.hub.requests.clear()
    assert user.do("create", name=NAME)["sums"] == world.sums
    assert world.hub.requests == []

    shutil.copytree(user.home / "hf", tmp_path / "hf", symlinks=True)
    offline = HubClient(warm_python, tmp_path, world.hub.url, world.site, {"HF_HUB_OFFLINE": "1"})
    try:
        assert offline.do("create", name=NAME)["sums"] == world.sums
        answer = offline.do("create", name=NAME, options={"cache_dir": str(tmp_path / "empty")})
    finally:
        offline.close()
    assert "HF_HUB_OFFLINE is set" in answer["message"]
    assert world.hub.requests == []


def test_a_cache_folder_of_ones_own(world: World, user: HubClient, tmp_path: Path) -> None:
    for _ in range(2):
        answer = user.do("create", name=NAME, options={"cache_dir": str(tmp_path / "own"), "num_classes": 3})
        assert answer["sums"]["conv1.weight"] == world.sums["conv1.weight"]
    assert (tmp_path / "own" / f"models--{NAMESPACE}--{NAME}" / "snapshots" / world.revision).is_dir()


@pytest.mark.parametrize("at", ["pinned", "tag", "branch"])
def test_by_repository(at: str, world: World, user: HubClient, tmp_path: Path) -> None:
    (tag,) = world.hub.repositories[HUB_ID].tags
    suffix = {"pinned": f"@{world.revision}", "tag": f"@{tag}", "branch": ""}[at]
    world.hub.requests.clear()
    answer = user.do("create", name=f"hf-hub:{HUB_ID}{suffix}", options={"cache_dir": str(tmp_path / "own")})
    assert answer.get("sums") == world.sums, answer
    assert set(files_got(world.hub)) <= {"config.json"}
    opened = user.do("open_model", name=f"hf-hub:{HUB_ID}{suffix}", cache_dir=str(tmp_path / "own"))
    assert opened.get("architecture") == "resnet20_conam", opened


def test_a_mirror_is_filled_from_the_hub(world: World, tmp_path: Path, warm_python: str) -> None:
    client = HubClient(warm_python, tmp_path, world.hub.url, world.site)
    try:
        first, second = (client.do("mirror", name=NAME, folder=str(tmp_path / "mirror")) for _ in range(2))
    finally:
        client.close()
    assert (first.get("written"), second.get("written")) == (True, False), first
    published = world.hub.repositories[HUB_ID].commits[-1][1]["model.safetensors"]
    assert Path(first["path"]).read_bytes() == published


def test_torch_hub(world: World, tmp_path: Path, warm_python: str) -> None:
    (tmp_path / "nothing").mkdir()
    client = HubClient(warm_python, tmp_path, world.hub.url, tmp_path / "nothing")
    world.hub.requests.clear()
    try:
        for requests in (True, False):
            answer = client.do("torch_hub", repository=str(world.checkout), name="resnet20_conam", tag="cifar10")
            assert answer.get("sums") == world.sums, answer
            assert Path(answer["imported"]).is_relative_to(world.checkout)
            assert bool(world.hub.requests) is requests
            world.hub.requests.clear()
    finally:
        client.close()


def test_a_private_repository_opens_to_a_token_that_is_never_shown(
    world: World, user: HubClient, tmp_path: Path
) -> None:
    def create(cache: str, **environment: str) -> dict[str, Any]:
        return user.do("create", name=NAME, options={"cache_dir": str(tmp_path / cache)}, environment=environment)

    world.hub.repositories[HUB_ID].private = True
    world.hub.with_token.clear()
    try:
        anonymous = create("first")
        stranger = create("second", HF_TOKEN="hf_theTokenOfAStranger")
        broken = create("third", HF_TOKEN="hf_broken\u00e9Token")
        member = create("fourth", HF_TOKEN=TOKEN)
    finally:
        world.hub.repositories[HUB_ID].private = False
    for answer in (anonymous, stranger):
        assert "no repository some-lab/resnet20_conam.cifar10 that is public or open to the token" in answer["message"]
        assert_one_sentence(answer["message"])
    assert "WeightsError" in broken["kinds"]
    assert_one_sentence(broken["message"])
    assert member.get("sums") == world.sums, member
    assert world.hub.with_token
    assert not [path for path in world.hub.with_token if path.startswith("/storage/")], "it goes to the Hub alone"
    for answer in (anonymous, stranger, broken, member):
        assert answer["seconds"] < 10
        assert not [t for t in (TOKEN, "TokenOfAStranger", "hf_broken") if t in json.dumps(answer)]


def test_publishing_again_from_the_command_line_changes_nothing(world: World, tmp_path: Path) -> None:
    before = (world.checkout / "weights_manifest.json").read_bytes()
    commits = len(world.hub.repositories[HUB_ID].commits)
    snapshot = world.hub.repositories[HUB_ID].commits[-1][1]
    folder = world.checkout / "weights" / NAME
    folder.mkdir(parents=True)
    try:
        for file in ("model.safetensors", "config.json", "curves.png", "confidence.png"):
            (folder / file).write_bytes(snapshot[file])
        assert f"{NAME}: is there at {world.revision}" in world.publish()
        assert (folder / "README.md").read_bytes() == snapshot["README.md"], "the folder mirrors the repository"
    finally:
        shutil.rmtree(world.checkout / "weights")
    assert len(world.hub.repositories[HUB_ID].commits) == commits
    assert (world.checkout / "weights_manifest.json").read_bytes() == before

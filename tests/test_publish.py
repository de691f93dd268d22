"""Publishing with huggingface_hub's own client, to a Hub on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import HubClient, assert_one_sentence, install_weights_only
from hub_server import HubServer, serve
from safetensors.torch import save
from small_entry import NAMESPACE, REVISION, entry_for

from conam_zoo.release.documents import model_card
from conam_zoo.release.exchange import packing
from conam_zoo.weights import Manifest, OnnxFile, dump_manifest, load_manifest

pytestmark = [pytest.mark.enable_socket, pytest.mark.timeout(300)]

FIRST, SECOND = "tiny_conam.cifar10", "tiny_conam.cifar100"
HUB_ID = f"{NAMESPACE}/{FIRST}"
TOKEN = "hf_theTokenOfSomeLab"
MADE = {"onnx/model.onnx": [92.25, "the float32 graph"], "onnx/model_int8.onnx": [92.125, "the int8 graph"]}
CARD = "---\nlicense: apache-2.0\nlibrary_name: timm\ntags:\n- timm\n---\n\n# A card\n"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serve({}) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Iterator[HubClient]:
    folder = tmp_path_factory.mktemp("publisher")
    client = HubClient(warm_python, folder, hub.url, environment={"HF_TOKEN": TOKEN})
    yield client
    client.close()


@dataclass
class Checkout:
    """A checkout with two entries and their files, and what publishing from it does."""

    folder: Path
    client: HubClient
    hub: HubServer

    @property
    def manifest_path(self) -> Path:
        return self.folder / "weights_manifest.json"

    def publish(self, *names: str, **options: Any) -> dict[str, Any]:
        names = names or (FIRST,)
        defaults = {
            "names": names,
            "namespace": NAMESPACE,
            "cards": dict.fromkeys(names, CARD),
            "tag": "v1.2.3",
            "manifest_path": str(self.manifest_path),
        }
        environment = options.pop("environment", {})
        answer = self.client.do("publish", options=defaults | options, environment=environment)
        if "message" in answer:
            assert_one_sentence(answer["message"])
        return answer


def content_of(name: str) -> bytes:
    return save({"conv1.weight": torch.full((4, 3, 2, 2), float(len(name))), "fc.bias": torch.ones(4)})


@pytest.fixture
def checkout(tmp_path: Path, hub: HubServer, client: HubClient) -> Checkout:
    hub.set_mode("ok")
    hub.tokens, hub.fails_at, hub.spoils_uploads = {TOKEN}, "", False
    hub.repositories.clear()
    hub.requests.clear()
    entries = {}
    for name in (FIRST, SECOND):
        data = content_of(name)
        entries[name] = entry_for(name, data, revision=None)
        folder = tmp_path / "weights" / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(data)
        config = {"architecture": "tiny_conam", "num_classes": 2, "sha256": entries[name].sha256}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "log.csv").write_text("epoch\n1\n")
    dump_manifest(Manifest(entries, None), tmp_path / "weights_manifest.json")
    return Checkout(tmp_path, client, hub)


def test_what_was_published_is_there_read_back_tagged_and_pinned(checkout: Checkout) -> None:
    (done,) = checkout.publish()["done"]
    repository = checkout.hub.repositories[HUB_ID]
    commit, tree = repository.commits[-1]
    assert done[:3] == [FIRST, HUB_ID, "v1.2.3"]
    assert done[4:] == [commit, True]
    assert set(tree) == {".gitattributes", "model.safetensors", "config.json", "README.md", "log.csv"}
    assert tree["model.safetensors"] == content_of(FIRST)
    assert tree["README.md"].decode() == CARD
    assert repository.tags == {"v1.2.3": commit}
    assert not repository.private
    manifest = load_manifest(checkout.manifest_path)
    assert manifest.hub_namespace == NAMESPACE
    assert {name: entry.revision for name, entry in manifest.entries.items()} == {FIRST: commit, SECOND: None}
    assert f"GET /{HUB_ID}/resolve/{commit}/model.safetensors" in checkout.hub.requests


def test_the_manifest_is_not_written_while_weights_are_packed(checkout: Checkout) -> None:
    with ThreadPoolExecutor(1) as pool:
        with packing(checkout.folder):
            publishing = pool.submit(checkout.publish)
            for _ in range(1200):
                if publishing.done() or (
                    HUB_ID in checkout.hub.repositories and checkout.hub.repositories[HUB_ID].tags
                ):
                    break
                time.sleep(0.05)
            with pytest.raises(TimeoutError):  # all is up, and the manifest waits
                publishing.result(timeout=0.5)
            assert checkout.hub.repositories[HUB_ID].tags
            assert load_manifest(checkout.manifest_path).entries[FIRST].revision is None
        ((*_, changed),) = publishing.result()["done"]
    assert changed
    assert load_manifest(checkout.manifest_path).entries[FIRST].revision is not None


def test_a_second_time_changes_nothing(checkout: Checkout) -> None:
    checkout.publish(FIRST, SECOND)
    before = checkout.manifest_path.read_bytes()
    commits = {hub_id: list(repository.commits) for hub_id, repository in checkout.hub.repositories.items()}
    tags = {hub_id: dict(repository.tags) for hub_id, repository in checkout.hub.repositories.items()}
    again = checkout.publish(FIRST, SECOND)["done"]
    assert [done[5] for done in again] == [False, False]
    assert checkout.manifest_path.read_bytes() == before
    assert {hub_id: repository.commits for hub_id, repository in checkout.hub.repositories.items()} == commits
    assert {hub_id: repository.tags for hub_id, repository in checkout.hub.repositories.items()} == tags


def test_onnx_files_lie_beside_the_weights_and_their_figures_in_manifest_and_card(checkout: Checkout) -> None:
    (done,) = checkout.publish(onnx=MADE)["done"]
    commit, tree = checkout.hub.repositories[HUB_ID].commits[-1]
    files = load_manifest(checkout.manifest_path).entry(FIRST).onnx
    assert files is not None
    assert list(files) == list(MADE)
    for path, (top1, text) in MADE.items():
        assert tree[path] == text.encode()
        assert (files[path].sha256, files[path].size_bytes) == (hashlib.sha256(tree[path]).hexdigest(), len(text))
        assert files[path].top1_percent == top1
        assert done[3][path] == len(text)
        assert f"{top1} % in {path}" in tree["README.md"].decode()
        assert f"GET /{HUB_ID}/resolve/{commit}/{path}" in checkout.hub.requests
    before = checkout.manifest_path.read_bytes()
    (again,) = checkout.publish(onnx=MADE)["done"]
    assert (again[4], again[5]) == (commit, False)
    assert checkout.manifest_path.read_bytes() == before


def test_published_onnx_files_stay_with_a_new_card_and_are_asked_about(checkout: Checkout) -> None:
    checkout.publish(onnx=MADE)
    files = load_manifest(checkout.manifest_path).entry(FIRST).onnx
    (done,) = checkout.publish(onnx="published", cards={FIRST: CARD + "More.\n"})["done"]
    commit, tree = checkout.hub.repositories[HUB_ID].commits[-1]
    assert (done[4], done[5]) == (commit, True)
    assert set(MADE) < set(tree)
    entry = load_manifest(checkout.manifest_path).entry(FIRST)
    assert (entry.onnx, entry.revision) == (files, commit)

    tree["onnx/model_int8.onnx"] = b"another graph"
    before = checkout.manifest_path.read_bytes()
    message = checkout.publish(onnx="published")["message"]
    assert f"another onnx/model_int8.onnx, expected SHA-256 {files['onnx/model_int8.onnx'].sha256}" in message
    assert "make it again with --data" in message
    assert checkout.manifest_path.read_bytes() == before


def test_onnx_files_that_the_manifest_does_not_know_leave_the_repository(checkout: Checkout) -> None:
    checkout.publish(onnx=MADE)
    (done,) = checkout.publish(onnx="none")["done"]
    tree = checkout.hub.repositories[HUB_ID].commits[-1][1]
    assert done[5]
    assert not [path for path in tree if path.startswith("onnx/")]
    assert " % in onnx/" not in tree["README.md"].decode()
    assert load_manifest(checkout.manifest_path).entry(FIRST).onnx is None


def test_weights_of_another_layout_leave_the_repository(checkout: Checkout) -> None:
    checkout.publish()
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
    checkout.hub.repositories[HUB_ID].commits[-1][1].update(dict.fromkeys(stale, b"{}"))
    assert "done" in checkout.publish(cards={FIRST: CARD + "more"})
    tree = checkout.hub.repositories[HUB_ID].commits[-1][1]
    assert not set(stale) & set(tree)
    assert tree["model.safetensors"] == content_of(FIRST)


def test_without_onnx_files_that_is_to_be_said(checkout: Checkout) -> None:
    checkout.publish(onnx=MADE)
    checkout.hub.requests.clear()
    for dry_run in (True, False):
        message = checkout.publish(FIRST, SECOND, onnx="published", dry_run=dry_run)["message"]
        assert f"The ONNX files of {SECOND} have to be made and measured first" in message
        assert "--data" in message
        assert "--no-onnx" in message
    assert checkout.hub.requests == []


def test_a_try_that_failed_after_its_commit_can_be_repeated(checkout: Checkout) -> None:
    (first,) = checkout.publish()["done"]
    checkout.hub.fails_at = "/resolve/"
    assert "stopped at" in checkout.publish(onnx=MADE, tag="v1.2.4")["message"]
    assert load_manifest(checkout.manifest_path).entry(FIRST).revision == first[4]
    checkout.hub.fails_at = ""
    (again,) = checkout.publish(onnx=MADE, tag="v1.2.4")["done"]
    assert again[4] == checkout.hub.repositories[HUB_ID].commits[-1][0] != first[4]
    assert load_manifest(checkout.manifest_path).entry(FIRST).revision == again[4]


def test_a_new_card_alone_is_a_new_commit_and_the_release_keeps_its_tag(checkout: Checkout) -> None:
    (first,) = checkout.publish()["done"]
    (second,) = checkout.publish(cards={FIRST: CARD + "More.\n"})["done"]
    assert second[4] != first[4]
    assert checkout.hub.repositories[HUB_ID].tags == {"v1.2.3": first[4]}
    assert load_manifest(checkout.manifest_path).entry(FIRST).revision == second[4]


def test_a_dry_run_sends_nothing(checkout: Checkout) -> None:
    before = checkout.manifest_path.read_bytes()
    (done,) = checkout.publish(dry_run=True)["done"]
    assert done[4:] == [None, False]
    assert done[3]["model.safetensors"] == len(content_of(FIRST))
    assert checkout.hub.requests == []
    assert checkout.manifest_path.read_bytes() == before


def test_a_private_repository_is_created_as_one(checkout: Checkout) -> None:
    (done,) = checkout.publish(private=True)["done"]
    assert checkout.hub.repositories[HUB_ID].private
    assert done[5]


def test_a_public_repository_is_not_taken_for_a_private_one(checkout: Checkout) -> None:
    checkout.publish()
    before = checkout.manifest_path.read_bytes()
    commits = len(checkout.hub.repositories[HUB_ID].commits)
    refused = checkout.publish(private=True, tag="v9.9.9")
    assert "it exists and is public, so make it private on the Hub or leave --private out" in refused["message"]
    assert len(checkout.hub.repositories[HUB_ID].commits) == commits
    assert checkout.manifest_path.read_bytes() == before


@pytest.mark.parametrize(
    ("fails_at", "says", "up"),
    [
        ("/validate-yaml", "the check of its model card", "nothing is up yet"),
        ("/repos/create", "creating its repository", "nothing is up yet"),
        ("/refs", "looking for the tag", f"already up are the repository {HUB_ID},"),
        ("/preupload/", "uploading its files", f"already up are the repository {HUB_ID},"),
        ("/storage/", "uploading its files", f"already up are the repository {HUB_ID},"),
        ("/commit/", "uploading its files", f"already up are the repository {HUB_ID},"),
        ("/resolve/", "reading them back", "its files at commit"),
        ("/tag/", "setting the tag v1.2.3", "its files at commit"),
    ],
)
def test_a_failure_half_way_says_what_is_up_and_leaves_the_manifest(
    checkout: Checkout, fails_at: str, says: str, up: str
) -> None:
    before = checkout.manifest_path.read_bytes()
    checkout.hub.fails_at = fails_at
    answer = checkout.publish()
    assert answer["error"] == "WeightsError", answer
    assert all(part in answer["message"] for part in (FIRST, says, up, "the manifest is as it was"))
    assert checkout.manifest_path.read_bytes() == before

    checkout.hub.fails_at = ""
    (done,) = checkout.publish()["done"]
    assert load_manifest(checkout.manifest_path).entry(FIRST).revision == done[4]
    assert checkout.hub.repositories[HUB_ID].tags == {"v1.2.3": done[4]}


def test_a_failure_at_the_second_names_the_first_as_up(checkout: Checkout) -> None:
    before = checkout.manifest_path.read_bytes()
    checkout.hub.fails_at = f"{NAMESPACE}/{SECOND}/commit/"
    answer = checkout.publish(FIRST, SECOND)
    first = checkout.hub.repositories[HUB_ID].commits[-1][0]
    for part in (f"Publishing {SECOND}", HUB_ID, f"its files at commit {first}", "its tag v1.2.3"):
        assert part in answer["message"]
    assert checkout.manifest_path.read_bytes() == before


def test_a_file_that_arrived_otherwise_is_noticed(checkout: Checkout) -> None:
    before = checkout.manifest_path.read_bytes()
    checkout.hub.spoils_uploads = True
    message = checkout.publish()["message"]
    expected = hashlib.sha256(content_of(FIRST)).hexdigest()
    assert f"the Hub has another model.safetensors, expected SHA-256 {expected}" in message
    assert checkout.manifest_path.read_bytes() == before
    assert checkout.hub.repositories[HUB_ID].tags == {}


def test_wrong_local_files_are_refused_before_anything_is_sent(checkout: Checkout) -> None:
    folder = checkout.folder / "weights" / FIRST
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_classes": 2', '"num_classes": 3'))
    assert "describes another file" in checkout.publish()["message"]
    (folder / "config.json").write_text(config)
    assert "has no curves.png, which" in checkout.publish(cards={FIRST: CARD + "![c](curves.png)\n"})["message"]
    (folder / "config.json").unlink()
    assert "cannot be published" in checkout.publish()["message"]
    (folder / "model.safetensors").write_bytes(content_of(SECOND))
    assert "is not the published file" in checkout.publish()["message"]
    assert checkout.hub.requests == []


def test_the_namespace_has_to_be_the_manifests(checkout: Checkout) -> None:
    checkout.publish()
    checkout.hub.requests.clear()
    assert f"published by {NAMESPACE}, not by other-lab" in checkout.publish(namespace="other-lab")["message"]
    for wrong in ("a/b", "..", "https://huggingface.co/x", ""):
        assert "not the name of a Hub account" in checkout.publish(namespace=wrong)["message"]
    assert checkout.hub.requests == []


def test_a_release_that_marks_other_weights_is_refused(checkout: Checkout) -> None:
    checkout.publish()
    data = content_of(SECOND)
    folder = checkout.folder / "weights" / FIRST
    (folder / "model.safetensors").write_bytes(data)
    manifest = load_manifest(checkout.manifest_path)
    entry = replace(
        manifest.entry(FIRST), sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), revision=REVISION
    )
    config = json.loads((folder / "config.json").read_text()) | {"sha256": entry.sha256}
    (folder / "config.json").write_text(json.dumps(config))
    dump_manifest(replace(manifest, entries={**manifest.entries, FIRST: entry}), checkout.manifest_path)
    commits = len(checkout.hub.repositories[HUB_ID].commits)
    assert "raise the version of conam_zoo first" in checkout.publish()["message"]
    assert len(checkout.hub.repositories[HUB_ID].commits) == commits


def test_a_refused_token_is_never_shown(checkout: Checkout) -> None:
    checkout.hub.tokens = set()
    refused = checkout.publish()
    assert "may not write to" in refused["message"]
    checkout.hub.set_mode("expired-token")
    expired = checkout.publish()
    assert "may not write to" in expired["message"]
    for answer in (refused, expired):
        assert TOKEN not in json.dumps(answer)


def test_without_a_token_that_is_said(checkout: Checkout, tmp_path: Path, warm_python: str) -> None:
    site = install_weights_only(tmp_path / "site")
    anonymous = HubClient(warm_python, tmp_path, checkout.hub.url, site=site)
    try:
        answer = Checkout(checkout.folder, anonymous, checkout.hub).publish()
    finally:
        anonymous.close()
    assert "takes a token that may write there" in answer["message"]
    assert checkout.hub.requests == []


def test_the_generated_card_passes_the_clients_validation_and_a_broken_one_does_not(checkout: Checkout) -> None:
    entry = entry_for("resnet20_conam.cifar10", b"x", revision=None)
    card = model_card(entry, Manifest({entry.name: entry}), NAMESPACE)
    assert "error" not in checkout.client.do("validate_card", card=card)
    for part in (
        f"hf-hub:{NAMESPACE}/resnet20_conam.cifar10",
        "torch.hub.load(",
        "library_name: timm",
        "license: apache-2.0",
        "conam evaluate resnet20_conam.cifar10 --data cifar10",
        "conam train resnet20_conam.cifar10 --data cifar10",
        "(curves.png)",
        "(confidence.png)",
        "log.csv",
        "## Limitations",
        "withdrawn by the authors in 2022",
    ):
        assert part in card
    assert "onnx" not in card
    files = {path: OnnxFile("ab" * 32, 1000, top1) for path, (top1, _) in MADE.items()}
    with_onnx = model_card(replace(entry, onnx=files), Manifest({entry.name: entry}), NAMESPACE)
    assert "error" not in checkout.client.do("validate_card", card=with_onnx)
    assert "| top-1 | 50.00 % |\n| top-1 of `onnx/model.onnx` (float32) | 92.25 % |" in with_onnx
    assert "| top-1 of `onnx/model_int8.onnx` (int8) | 92.12 % |" in with_onnx
    assert "`logits`, (N, 2), without a softmax" in with_onnx
    assert "error" in checkout.client.do("validate_card", card=card.replace("license: ", "licence: "))
    assert "the check of its model card" in checkout.publish(cards={FIRST: CARD.replace("apache", "Apache")})["message"]


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (
            "wide_resnet16_4_conam.cifar10",
            "training images, the first 36 on random 24 x 24 crops of them, last epoch",
        ),
        ("resnet20_conam.cifar10", "on all 50,000 training images, last epoch"),
        ("a recipe of somebody's own", "on all 50,000 training images, last epoch"),
    ],
)
def test_the_card_says_what_the_epochs_showed(recipe: str, sentence: str) -> None:
    entry = replace(entry_for("resnet20_conam.cifar10", b"x", revision=None), recipe=recipe)
    assert sentence in model_card(entry, Manifest({entry.name: entry}))

"""From a manifest entry to a verified state dict, against a Hub on the loopback interface.

huggingface_hub reads its ``HF_…`` variables when it is imported, so whatever asks the Hub runs in a new process, on a
copy of ``conam_zoo/weights`` alone: that it needs nothing else of conam_zoo is tested along the way.
"""

import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hub_client import HubClient, assert_one_sentence
from hub_server import HubServer, Mode, refusing_url, serve
from safetensors.torch import save
from small_entry import NAMESPACE, REVISION, Bomb, damaged, entry_for

from conam_zoo import checks
from conam_zoo.weights import (
    Manifest,
    WeightEntry,
    WeightsError,
    WrongWeightsError,
    check_copies,
    client,
    dump_manifest,
    find_verified,
    read_safetensors,
    read_verified,
    verify,
)
from conam_zoo.weights import (
    resolve as hub,
)

pytestmark = pytest.mark.enable_socket  # pytest-socket's mark: the loopback server needs one

NAME = "tiny_conam.cifar10"
HUB_ID = f"{NAMESPACE}/{NAME}"


def tensors() -> dict[str, torch.Tensor]:
    return {
        "conv1.weight": torch.arange(48, dtype=torch.float32).reshape(4, 3, 2, 2),
        "fc.bias": torch.ones(4),
    }


SUMS = {key: float(value.sum()) for key, value in tensors().items()}


@pytest.fixture
def data() -> bytes:
    return save(tensors())


@pytest.fixture
def entry(data: bytes) -> WeightEntry:
    return entry_for(NAME, data)


@dataclass
class Client:
    """A user's machine: a copy of the package, a home with a Hub cache, a manifest."""

    folder: Path
    entry: WeightEntry
    endpoint: str
    namespace: str | None = NAMESPACE
    cache_dir: str | None = None
    process: ClassVar[HubClient]

    def __post_init__(self) -> None:
        package = self.folder / "installed" / "conam_zoo"
        shutil.copytree(Path(hub.__file__).parent, package / "weights", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(checks.__file__), package)
        (package / "__init__.py").touch()

    @property
    def checkout_copy(self) -> Path:
        return self.folder / "installed" / "weights" / NAME / "model.safetensors"

    @property
    def cached_copy(self) -> Path:
        folder = Path(self.cache_dir) if self.cache_dir else self.folder / "home" / "hub"
        return folder / f"models--{NAMESPACE}--{NAME}" / "snapshots" / REVISION / "model.safetensors"

    def find(self, action: str = "find", **environment: str) -> dict[str, Any]:
        return self.find_together(1, action, **environment)[0]

    def find_together(self, processes: int, action: str = "find", **environment: str) -> list[dict[str, Any]]:
        """What several new processes tell that begin at once."""
        manifest = self.folder / "manifest.json"
        dump_manifest(Manifest({NAME: self.entry}, self.namespace), manifest)
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.folder / "home")}
        task = {"action": action, "manifest": str(manifest), "name": NAME, "cache_dir": self.cache_dir}
        answer = self.process.do(
            "forked",
            processes=processes,
            site=str(self.folder / "installed"),
            task=task | {"environment": environment},
            patience_s=300,
        )
        for told in answer["told"]:
            if "message" in told:
                assert_one_sentence(told["message"])
        return [told | {"log": answer["log"]} for told in answer["told"]]


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Iterator[None]:
    """What the processes are forked from: it has imported PyTorch, which takes seconds, and no huggingface_hub."""
    Client.process = HubClient(warm_python, tmp_path_factory.mktemp("process"), "")
    Client.process.do("get_ready", imports=["torch", "safetensors.torch"])
    yield
    Client.process.close()


def serving(data: bytes, mode: Mode = "ok") -> AbstractContextManager[HubServer]:
    return serve({(HUB_ID, REVISION, "model.safetensors"): data}, mode)


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- one local file -----------------------------------------------------------------------------------------


def test_the_right_file_is_read(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    read = read_verified(put(tmp_path / "model.safetensors", data), entry)
    assert read.keys() == tensors().keys()
    assert all(torch.equal(read[key], value) for key, value in tensors().items())


def test_a_file_beyond_all_weights_is_not_even_hashed(tmp_path: Path, entry: WeightEntry) -> None:
    path = put(tmp_path / "model.safetensors", b"")
    os.truncate(path, 10**12)
    with pytest.raises(WrongWeightsError, match="has 1000000000000 bytes, more than any weights") as refused:
        read_verified(path, entry)
    assert_one_sentence(str(refused.value))


@pytest.mark.parametrize("change", ["one bit", "longer", "shorter", "empty", "much longer"])
def test_a_wrong_file_is_refused_with_both_hashes(tmp_path: Path, entry: WeightEntry, data: bytes, change: str) -> None:
    wrong = {
        "one bit": damaged(data),
        "longer": data + b"\0",
        "shorter": data[:-1],
        "empty": b"",
        "much longer": data + bytes(3 << 20),
    }[change]
    path = put(tmp_path / "model.safetensors", wrong)
    with pytest.raises(WrongWeightsError) as refused:
        read_verified(path, entry)
    found = hashlib.sha256(wrong).hexdigest()
    assert all(part in str(refused.value) for part in (str(path), entry.sha256, found, f"{len(wrong)} bytes"))
    assert_one_sentence(str(refused.value))


def test_the_hash_is_compared_before_anything_is_parsed(
    tmp_path: Path, entry: WeightEntry, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("parsed before it was verified")

    monkeypatch.setattr(verify, "parse_safetensors", never)
    garbage = put(tmp_path / "model.safetensors", b"\xff" * len(data))
    with pytest.raises(WrongWeightsError, match="expected SHA-256"):
        read_verified(garbage, entry)


def test_what_was_checked_is_what_is_used(
    tmp_path: Path, entry: WeightEntry, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "model.safetensors", data)
    parse = verify.parse_safetensors

    def swap_then_parse(checked: bytes, name: Path) -> dict[str, torch.Tensor]:
        path.write_bytes(damaged(data))  # between the check and the use
        return parse(checked, name)

    monkeypatch.setattr(verify, "parse_safetensors", swap_then_parse)
    assert torch.equal(read_verified(path, entry)["fc.bias"], torch.ones(4))


@pytest.mark.parametrize("in_manifest", [True, False])
def test_a_pickle_by_the_name_of_safetensors_is_refused(tmp_path: Path, in_manifest: bool) -> None:
    """Even one whose hash the manifest itself gives."""
    content = pickle.dumps(Bomb(tmp_path / "exploded"))
    path = put(tmp_path / "model.safetensors", content)
    with pytest.raises(WeightsError, match="is not a safetensors file") as refused:
        read_verified(path, entry_for(NAME, content)) if in_manifest else read_safetensors(path)
    assert_one_sentence(str(refused.value))
    assert not (tmp_path / "exploded").exists()


def torch_archive(path: Path) -> bytes:
    torch.save(tensors(), path)
    return path.read_bytes()


def test_other_files_are_refused_in_one_sentence(tmp_path: Path, data: bytes) -> None:
    header_bytes = int.from_bytes(data[:8], "little")
    no_such_type = data.replace(b'"F32"', b'"F33"')
    contents = {
        "not a safetensors file": [
            b"",
            b"{}",
            torch_archive(tmp_path / "archive.pt"),
            (2**63).to_bytes(8, "little") + data[8:],
            (len(data)).to_bytes(8, "little") + data[8:],
            b"\x02" + bytes(7) + b"[]",
        ],
        "damaged safetensors file": [data[:-1], data + b"\0", no_such_type, data[:8] + b"{" * header_bytes],
    }
    for says, wrong in ((says, wrong) for says, all_wrong in contents.items() for wrong in all_wrong):
        path = put(tmp_path / "own.safetensors", wrong)
        with pytest.raises(WeightsError, match=says) as refused:
            read_safetensors(path)
        assert str(path) in str(refused.value)
        assert_one_sentence(str(refused.value))


@pytest.mark.parametrize("name", ["own.bin", "own.pth", "own", "safetensors"])
def test_other_suffixes_are_refused_unread(tmp_path: Path, data: bytes, name: str) -> None:
    with pytest.raises(WeightsError, match=r"does not end in \.safetensors"):
        read_safetensors(put(tmp_path / name, data))


def test_files_of_ones_own_are_read(tmp_path: Path, data: bytes) -> None:
    assert torch.equal(read_safetensors(put(tmp_path / "own.safetensors", data))["fc.bias"], torch.ones(4))


def test_absent_files_and_folders_are_named(tmp_path: Path, entry: WeightEntry) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("absent.safetensors", "folder.safetensors"):
        for read in (read_safetensors, lambda path: read_verified(path, entry)):
            with pytest.raises(WeightsError, match=re.escape(str(tmp_path / name))) as refused:
                read(tmp_path / name)
            assert_one_sentence(str(refused.value))


# --- mirror and checkout, in this process -------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The paths of a mirror's and a checkout's copy, both still absent."""
    monkeypatch.setenv("CONAM_ZOO_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setattr(hub, "find_checkout", lambda: tmp_path / "checkout")
    return {
        "mirror": tmp_path / "mirror" / NAME / "model.safetensors",
        "checkout": tmp_path / "checkout" / "weights" / NAME / "model.safetensors",
    }


def test_the_mirror_comes_before_the_checkout(places: dict[str, Path], entry: WeightEntry, data: bytes) -> None:
    put(places["checkout"], data)
    assert find_verified(replace(entry, revision=None)).source == "checkout"
    put(places["mirror"], data)
    found = find_verified(replace(entry, revision=None))
    assert (found.source, found.path) == ("mirror", places["mirror"])


def test_a_wrong_mirror_is_passed_over_with_a_warning(
    places: dict[str, Path], entry: WeightEntry, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    put(places["mirror"], damaged(data))
    put(places["checkout"], data)
    assert find_verified(replace(entry, revision=None)).source == "checkout"
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert all(part in warning.message for part in (NAME, str(places["mirror"]), entry.sha256))


def test_unpublished_weights_are_said_to_be_so(places: dict[str, Path], entry: WeightEntry, data: bytes) -> None:
    put(places["mirror"], damaged(data))
    found = hashlib.sha256(damaged(data)).hexdigest()
    for unpublished, namespace in ((replace(entry, revision=None), NAMESPACE), (entry, None)):
        with pytest.raises(WeightsError, match="not published on the Hub yet") as refused:
            find_verified(unpublished, namespace=namespace)
        sentence = str(refused.value)
        assert_one_sentence(sentence)
        for part in (*map(str, places.values()), entry.sha256, found, "CONAM_ZOO_MIRROR", "pretrained=False"):
            assert part in sentence
        assert "go online" not in sentence


def test_every_local_copy_is_judged(places: dict[str, Path], entry: WeightEntry, data: bytes) -> None:
    unpublished = replace(entry, revision=None)
    assert [copy.status for copy in check_copies(unpublished)] == ["missing"] * 3
    put(places["mirror"], damaged(data))
    put(places["checkout"], data)
    mirror, checkout, cache = check_copies(unpublished)
    assert (mirror.place, mirror.status, mirror.path) == ("mirror", "wrong", places["mirror"])
    assert (checkout.place, checkout.status, checkout.path) == ("checkout", "good", places["checkout"])
    assert (cache.place, cache.status, cache.path) == ("cache", "missing", None)


def test_without_mirror_and_checkout_that_is_said(entry: WeightEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONAM_ZOO_MIRROR", raising=False)
    monkeypatch.setattr(hub, "find_checkout", lambda: None)
    with pytest.raises(WeightsError, match=r"CONAM_ZOO_MIRROR is not set; conam_zoo does not run from a checkout"):
        find_verified(replace(entry, revision=None))


# --- the Hub, in processes of their own ---------------------------------------------------------------------


def test_first_use_downloads_and_later_ones_ask_nobody(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    with serving(data) as server:
        client = Client(tmp_path, entry, server.url)
        first = client.find()
        assert (first["source"], first["sums"]) == ("hub", SUMS), first
        assert Path(first["path"]) == client.cached_copy
        assert sum(request.startswith("GET") for request in server.requests) == 1
        server.requests.clear()
        second = client.find()
        assert (second["source"], second["sums"]) == ("cache", SUMS)
        assert server.requests == []

    offline = client.find(HF_HUB_OFFLINE="1")  # and the server is gone
    assert (offline["source"], offline["sums"]) == ("cache", SUMS)
    assert list(client.find("check")["copies"].items()) == [
        ("mirror", "missing"),
        ("checkout", "missing"),
        ("cache", "good"),
    ]


def test_the_callers_cache_folder_is_used_even_if_nothing_can_be_written_there(
    tmp_path: Path, entry: WeightEntry, data: bytes
) -> None:
    with serving(data) as server:
        client = Client(tmp_path, entry, server.url, cache_dir=str(tmp_path / "own_cache"))
        assert client.find()["source"] == "hub"
        assert client.cached_copy.exists()
        assert not (tmp_path / "home" / "hub").exists()
    folders = [tmp_path / "own_cache", *(p for p in (tmp_path / "own_cache").rglob("*") if p.is_dir())]
    shutil.rmtree(tmp_path / "own_cache" / ".locks")
    put(tmp_path / "own_cache" / ".locks", b"")  # in the way of any lock, also for a root user
    for folder in folders:
        if folder.exists():
            folder.chmod(0o555)
    try:
        assert client.find()["source"] == "cache"
    finally:
        for folder in folders:
            if folder.exists():
                folder.chmod(0o755)


def test_the_checkout_comes_before_the_hub(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    with serving(data) as server:
        client = Client(tmp_path, entry, server.url)
        put(client.checkout_copy, data)
        put(tmp_path / "installed" / "weights_manifest.json", b"{}")  # what makes a checkout of it
        assert client.find()["source"] == "checkout"
        assert server.requests == []


def test_a_wrong_mirror_falls_through_to_the_hub_and_is_named(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    copy = put(tmp_path / "mirror" / NAME / "model.safetensors", damaged(data))
    with serving(data) as server:
        found = Client(tmp_path, entry, server.url).find(CONAM_ZOO_MIRROR=str(tmp_path / "mirror"))
    assert (found["source"], found["sums"]) == ("hub", SUMS)
    assert str(copy) in found["log"]
    assert entry.sha256 in found["log"]


@pytest.mark.parametrize("linked", [True, False], ids=["symbolic link", "plain file"])
def test_a_wrong_cached_copy_is_fetched_once_more(
    tmp_path: Path, entry: WeightEntry, data: bytes, linked: bool
) -> None:
    with serving(data) as server:
        client = Client(tmp_path, entry, server.url)
        blob = tmp_path / "home" / "hub" / f"models--{NAMESPACE}--{NAME}" / "blobs" / entry.sha256
        client.cached_copy.parent.mkdir(parents=True)
        put(blob, damaged(data))
        if linked:
            client.cached_copy.symlink_to(os.path.relpath(blob, client.cached_copy.parent))
        else:
            put(client.cached_copy, damaged(data))
        found = client.find()
        assert (found["source"], found["sums"]) == ("hub", SUMS)
        assert sum(request.startswith("GET") for request in server.requests) == 1
        assert client.cached_copy.read_bytes() == data
        assert "not the published file" in found["log"]


def test_a_wrong_cached_copy_without_a_hub_is_not_used(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    client = Client(tmp_path, entry, refusing_url())
    put(client.cached_copy, damaged(data))
    answer = client.find()
    found = hashlib.sha256(damaged(data)).hexdigest()
    assert answer["error"] == "WeightsError"
    assert all(part in answer["message"] for part in (str(client.cached_copy), entry.sha256, found))
    assert client.cached_copy.exists()  # nothing is thrown away before there is something better


def test_a_hub_that_goes_on_delivering_another_file_is_refused(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    with serving(data, "corrupt-always") as server:
        client = Client(tmp_path, entry, server.url)
        answer = client.find()
        assert sum(request.startswith("GET") for request in server.requests) == 2
    assert answer["error"] == "WrongWeightsError"
    found = hashlib.sha256(damaged(data)).hexdigest()
    for part in ("model.safetensors", HUB_ID, REVISION, entry.sha256, found):
        assert part in answer["message"]


def test_what_the_hub_announces_wrongly_is_not_even_downloaded(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    with serving(data, "other-etag") as server:
        answer = Client(tmp_path, entry, server.url).find()
        assert not any(request.startswith("GET") for request in server.requests)
    assert answer["error"] == "WrongWeightsError"
    assert all(part in answer["message"] for part in (entry.sha256, hashlib.sha256(data + b"?").hexdigest()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("503-on-get", "status 503"),
        ("refuse", "could not be fetched"),
    ],
)
def test_nothing_anywhere_is_one_sentence_within_ten_seconds(
    tmp_path: Path, entry: WeightEntry, data: bytes, mode: Any, says: str
) -> None:
    with serving(data, mode) as server:
        client = Client(tmp_path, entry, refusing_url() if mode == "refuse" else server.url)
        answer = client.find()
    assert answer["error"] == "WeightsError"
    for part in (
        says,
        NAME,
        "CONAM_ZOO_MIRROR is not set",
        "not run from a checkout",
        "has no copy",
        "go online",
    ):
        assert part in answer["message"]
    assert answer["seconds"] < 10, answer
    assert "Traceback" not in answer["log"]


def test_unpublished_weights_never_ask_the_hub(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    with serving(data) as server:
        client = Client(tmp_path, replace(entry, revision=None), server.url)
        assert "not published on the Hub yet" in client.find()["message"]
        client.entry, client.namespace = entry, None
        assert "not published on the Hub yet" in client.find()["message"]
        assert server.requests == []


def test_a_hub_that_is_not_even_found_in_time_is_given_up(
    tmp_path: Path, entry: WeightEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name look-up knows no timeout; the deadline is shortened here to save time."""
    import huggingface_hub

    done = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: done.wait(30))
    monkeypatch.setattr(client, "CONTACT_DEADLINE_S", 0.2)
    monkeypatch.setattr(hub, "find_checkout", lambda: None)
    start = time.monotonic()
    with pytest.raises(WeightsError, match="no answer within") as refused:
        find_verified(entry, cache_dir=tmp_path, namespace=NAMESPACE)
    done.set()
    assert time.monotonic() - start < 10
    assert_one_sentence(str(refused.value))


def test_a_cache_that_cannot_be_one_is_one_sentence(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    with serving(data) as server:
        answer = Client(tmp_path, entry, server.url, cache_dir=str(put(tmp_path / "a_file", b""))).find()
    assert answer["error"] == "WeightsError"
    assert str(tmp_path / "a_file") in answer["message"]


@pytest.mark.slow
def test_processes_that_start_together_all_get_the_right_file(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    """Even where the first download is a corrupt one."""
    with serving(data, "corrupt-once") as server:
        client = Client(tmp_path, entry, server.url)
        answers = client.find_together(4)
        downloads = sum(request.startswith("GET") for request in server.requests)
    assert [answer.get("sums") for answer in answers] == [SUMS] * 4, answers
    assert sorted(answer["source"] for answer in answers) == ["cache", "cache", "cache", "hub"]
    assert downloads == 2


def test_a_cache_without_locks_still_works(tmp_path: Path, entry: WeightEntry, data: bytes) -> None:
    with serving(data) as server:
        client = Client(tmp_path, entry, server.url)
        put(tmp_path / "home" / "hub" / ".locks" / "conam_zoo", b"")  # in the way of our lock alone
        assert client.find()["source"] == "hub"


def test_importing_is_light(tmp_path: Path, entry: WeightEntry) -> None:
    client = Client(tmp_path, entry, refusing_url())
    heavy = {"torch", "safetensors", "huggingface_hub"}
    program = f"import sys, conam_zoo.weights; print(*{heavy} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(client.folder / "installed")},
        cwd=client.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == ""

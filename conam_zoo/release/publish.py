"""Publishing weights on the Hugging Face Hub: upload, read back, tag, and only then write it down.

Everything goes through huggingface_hub's own client. A second run finds everything in place and changes nothing; a run
that fails leaves the manifest as it was, says what is up already, and can simply be repeated. The ONNX files beside the
weights are made and measured when they are published, and kept on the Hub alone.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from conam_zoo.release.exchange import packing
from conam_zoo.weights.client import ask_hub, download
from conam_zoo.weights.credentials import check_endpoint, redact, tells_secrets, token_to_send
from conam_zoo.weights.errors import HubError, WeightsError, WrongWeightsError, in_brief
from conam_zoo.weights.manifest import (
    FILE_PATTERN,
    HUB_NAME_PATTERN,
    ONNX_FILES,
    OnnxFile,
    WeightEntry,
    dump_manifest,
    load_manifest,
)
from conam_zoo.weights.verify import Described, is_index, parse_parts, read_parts

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CONFIG, CARD = "config.json", "README.md"
EXTRAS = ("log.csv", "curves.png", "confidence.png")  # uploaded where they lie beside the weights

ONNX_FOLDER = "onnx/"
TOLERANCE_PERCENT = 0.05  # that float32 in another order of additions may change of an ONNX file's top-1
Onnx = Literal["published", "none"] | Callable[[WeightEntry, Path], Mapping[str, tuple[OnnxFile, bytes]]]


@dataclass(frozen=True)
class Publication:
    """What a repository holds, or would hold."""

    name: str
    hub_id: str
    tag: str
    files: Mapping[str, int]  # name -> size in bytes
    revision: str | None  # None after a dry run
    changed: bool  # whether something was uploaded


@dataclass(frozen=True)
class _Upload:
    """An entry with all that is to be in its repository, checked before anything is sent."""

    entry: WeightEntry
    onnx: Mapping[str, OnnxFile] | None  # the files of that kind beside it; those not in `contents` are there already
    hub_id: str
    contents: Mapping[str, bytes]
    tensors: tuple[Described, ...]  # the safetensors files, whose ETag on the Hub is their SHA-256

    def publication(self, tag: str, revision: str | None, changed: bool) -> Publication:
        sizes = {name: len(content) for name, content in self.contents.items()}
        sizes |= {path: file.size_bytes for path, file in (self.onnx or {}).items()}
        return Publication(self.entry.name, self.hub_id, tag, sizes, revision, changed)


def publish(
    names: Sequence[str],
    *,
    namespace: str,
    card: Callable[[WeightEntry], str],
    tag: str,
    manifest_path: Path,
    onnx: Onnx = "published",
    private: bool = False,
    dry_run: bool = False,
) -> list[Publication]:
    """Publish entries of a manifest from the ``weights/`` folder beside it.

    For each entry: create the repository if need be, upload weights, config.json, card, ONNX files and what else lies
    beside them in one commit, read everything back and compare it, tag the commit. Commits, ONNX files and namespace
    are written to the manifest at the end, in one step; if anything fails (``WeightsError``), it stays as it was.

    ``namespace`` is the Hub account, and has to be the manifest's if that has one; ``tag`` names the release. ``onnx``
    makes the ONNX files of an entry from its folder; with ``"published"`` the repository keeps those that the manifest
    knows, which all entries need to have, and with ``"none"`` it has none. ONNX files that the manifest does not know
    are removed, and weights beside those that are sent. ``dry_run`` checks all files and sends nothing.
    """
    manifest = load_manifest(manifest_path)
    if re.fullmatch(HUB_NAME_PATTERN, namespace) is None:
        raise WeightsError(f"The namespace {namespace!r} is not the name of a Hub account: give the account alone.")
    if manifest.hub_namespace not in (None, namespace):
        raise WeightsError(
            f"The manifest says that the weights are published by {manifest.hub_namespace}, not by {namespace}: "
            "publish there, or change its hub_namespace first."
        )
    token = token_to_send()
    if token is None and not dry_run:
        raise WeightsError(
            f"Publishing to {namespace} takes a token that may write there: run 'hf auth login', or set HF_TOKEN, and "
            "leave HF_HUB_DISABLE_IMPLICIT_TOKEN unset."
        )
    entries = [manifest.entry(name) for name in dict.fromkeys(names)]
    if onnx == "published" and (without := [entry.name for entry in entries if entry.onnx is None]):
        raise WeightsError(
            f"The ONNX files of {', '.join(without)} have to be made and measured first: say where the images are with "
            "--data, or leave these files out with --no-onnx."
        )
    uploads = [_prepare(entry, namespace, card, onnx, manifest_path) for entry in entries]
    if dry_run:
        return [upload.publication(tag, None, changed=False) for upload in uploads]

    from huggingface_hub import HfApi

    up: list[str] = []
    with _step("looking at HF_ENDPOINT", uploads[0], up):
        check_endpoint()
    done = [_publish_one(HfApi(library_name="conam_zoo", token=token), upload, tag, private, up) for upload in uploads]
    pinned = {
        upload.entry.name: replace(upload.entry, onnx=upload.onnx, revision=publication.revision)
        for upload, publication in zip(uploads, done, strict=True)
    }
    with _step("writing the manifest", uploads[-1], up), packing(manifest_path.parent):
        latest = load_manifest(manifest_path)
        if any(latest.entries.get(upload.entry.name) != upload.entry for upload in uploads):
            raise WeightsError("its entries were changed meanwhile")
        written = replace(latest, entries={**latest.entries, **pinned}, hub_namespace=namespace)
        if written != latest:
            dump_manifest(written, manifest_path)
    return done


def _prepare(
    entry: WeightEntry,
    namespace: str,
    card: Callable[[WeightEntry], str],
    onnx: Onnx,
    manifest_path: Path,
) -> _Upload:
    """All files of an entry: those in its folder, held against the manifest, its card, and its ONNX files."""
    folder = manifest_path.parent / "weights" / entry.name
    parts = read_parts(folder / entry.file, entry)
    parse_parts(parts)  # nobody gets weights that cannot be read
    contents = {part.described.file: part.data for part in parts}
    try:
        contents[CONFIG] = (folder / CONFIG).read_bytes()
        contents |= {name: (folder / name).read_bytes() for name in EXTRAS if (folder / name).is_file()}
        config = json.loads(contents[CONFIG])
        stated = (config.get("sha256"), config.get("architecture"), config.get("num_classes"))
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder} cannot be published ({in_brief(error)}): pack the weights again.") from error
    if stated != (entry.sha256, entry.arch, entry.num_classes):
        raise WrongWeightsError(
            f"{folder / CONFIG} describes another file than the manifest does, it has SHA-256, architecture and "
            f"classes {stated}: pack the weights again."
        )
    made = {} if isinstance(onnx, str) else onnx(entry, folder)
    files = {path: file for path, (file, _) in made.items()} or (entry.onnx if onnx == "published" else None)
    contents |= {path: content for path, (_, content) in made.items()}
    text = card(replace(entry, onnx=files))
    for picture in re.findall(r"!\[[^]]*\]\(([\w.-]+)\)", text):
        if picture not in contents:
            raise WeightsError(f"{folder} has no {picture}, which its model card shows: pack the weights again.")
    tensors = tuple(part.described for part in parts if not is_index(part.described.file))
    return _Upload(entry, files, entry.hub_id(namespace), contents | {CARD: text.encode()}, tensors)


def _publish_one(api: "HfApi", upload: _Upload, tag: str, private: bool, up: list[str]) -> Publication:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard

    entry, hub_id = upload.entry, upload.hub_id
    with _step("the check of its model card", upload, up):
        ModelCard(upload.contents[CARD].decode()).validate()
    with _step("creating its repository", upload, up):
        api.create_repo(hub_id, private=private or None, exist_ok=True)
        info = api.model_info(hub_id)
        if private and not info.private:
            raise WeightsError("it exists and is public, so make it private on the Hub or leave --private out")
        there = [file.rfilename for file in info.siblings or []]
        there = [name for name in there if name.startswith(ONNX_FOLDER) or re.fullmatch(FILE_PATTERN, name)]
    up.append(f"the repository {hub_id}")
    with _step(f"looking for the tag {tag}", upload, up):
        tagged = _is_tagged(api, upload, tag)
    with _step("uploading its files", upload, up):
        commit = api.create_commit(
            hub_id,
            [
                *(CommitOperationAdd(name, content) for name, content in upload.contents.items()),
                *(CommitOperationDelete(n) for n in there if n not in upload.contents and n not in (upload.onnx or {})),
            ],
            commit_message=f"{entry.name}, conam_zoo {tag}",
            parent_commit=info.sha,
        )
    up.append(f"its files at commit {commit.oid}")
    with _step("reading them back", upload, up):
        _read_back(upload, commit.oid)
    if not tagged:
        with _step(f"setting the tag {tag}", upload, up):
            api.create_tag(hub_id, tag=tag, revision=commit.oid)
        up.append(f"its tag {tag}")
    return upload.publication(tag, commit.oid, changed=commit.oid != info.sha)


def _is_tagged(api: "HfApi", upload: _Upload, tag: str) -> bool:
    """Whether the release has its tag already; refuses one that marks other weights."""
    if tag not in {ref.name for ref in api.list_repo_refs(upload.hub_id).tags}:
        return False
    for described in upload.tensors:
        found = ask_hub(upload.hub_id, described.file, tag).digest
        if found != described.sha256:
            raise WeightsError(f"it marks other weights, SHA-256 {found}, so raise the version of conam_zoo first")
    return True


def _read_back(upload: _Upload, revision: str) -> None:
    """Download every file of a commit afresh and compare it with what was sent; ask about those that were there."""
    with tempfile.TemporaryDirectory(prefix="conam-publish-") as scratch:
        for name, content in upload.contents.items():
            path = download(ask_hub(upload.hub_id, name, revision), scratch, limit_bytes=len(content))
            got, sent = (hashlib.sha256(data).hexdigest() for data in (path.read_bytes(), content))
            if got != sent:
                raise WrongWeightsError(f"the Hub has another {name}, expected SHA-256 {sent}, found {got}")
    for name in (upload.onnx or {}).keys() - upload.contents.keys():
        found, known = ask_hub(upload.hub_id, name, revision).digest, (upload.onnx or {})[name].sha256
        if found != known:
            raise WrongWeightsError(
                f"the Hub has another {name}, expected SHA-256 {known}, found {found}, so make it again with --data"
            )


@contextmanager
def _step(doing: str, upload: _Upload, up: list[str]) -> Iterator[None]:
    """Turn what goes wrong in a step into the sentence that says what is up already."""
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:  # the client, its HTTP library and its transport have no common base
        reason = redact(str(error) if isinstance(error, WeightsError | HubError) else in_brief(error))
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            reason = f"the Hub answered with status {status}"
            if status in (401, 403):
                reason += f", so the token in use may not write to {upload.hub_id}"
        state = f"already up are {', '.join(up)}" if up else "nothing is up yet"
        raise WeightsError(
            f"Publishing {upload.entry.name} stopped at {doing} ({reason.rstrip('.')}), {state}, and the manifest is "
            "as it was: fix that and run the command again."
        ) from (None if tells_secrets(error) else error)


# --- ONNX files -----------------------------------------------------------------------------------------------


def write_onnx(entry: WeightEntry, weights: Path, data: str | Path, folder: Path) -> Iterator[Path]:
    """Export weights to ``ONNX_FILES`` below a folder, one after the other; see ``make_onnx``."""
    from conam_zoo.deploy.export import calibration_images, export
    from conam_zoo.models.registry import open_model

    model = open_model(f"local-dir:{weights}")
    facts = {"name": entry.name, "sha256": entry.sha256, "top1_percent": entry.metrics.top1_percent}
    images = calibration_images(model, data, entry.dataset)
    for path, calibration in zip(ONNX_FILES, (None, images), strict=True):
        yield export(model, folder / path, calibration=calibration, facts=facts).path


def make_onnx(entry: WeightEntry, weights: Path, data: str | Path) -> dict[str, tuple[OnnxFile, bytes]]:
    """Export the weights of a folder to ``ONNX_FILES``, and measure each file on the whole test split.

    ``data`` is their data set, or a folder of data sets by name: training images calibrate int8, test images measure.
    For each file there is what the manifest is to say of it, and its content. A ``UserError`` says if the images are
    not those of the entry's figures, or a file does not compute what the net does.
    """
    from conam_zoo.datasets import DATASETS
    from conam_zoo.deploy.runtime import open_classifier
    from conam_zoo.errors import UserError
    from conam_zoo.training.evaluate import evaluate

    stated, images = entry.metrics.top1_percent, DATASETS[entry.dataset].test_images
    made: dict[str, tuple[OnnxFile, bytes]] = {}
    with tempfile.TemporaryDirectory(prefix="conam-onnx-") as scratch:
        for path, file in zip(ONNX_FILES, write_onnx(entry, weights, data, Path(scratch)), strict=True):
            done = evaluate(open_classifier(str(file)), data, entry.dataset, part="test")
            top1 = done.scores.top1_percent
            if len(done.split) != images or (not made and abs(top1 - stated) > TOLERANCE_PERCENT):
                raise UserError(
                    f"The float32 ONNX file of {entry.name} has {top1:.2f} % of {len(done.split):,} test images right, "
                    f"but the manifest says {stated:.2f} % of {images:,}: give the whole {entry.dataset} as data."
                )
            content = file.read_bytes()
            made[path] = OnnxFile(hashlib.sha256(content).hexdigest(), len(content), round(top1, 4)), content
    return made

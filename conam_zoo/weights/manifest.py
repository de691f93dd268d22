"""The weights manifest: every fact about every published weight file, read strictly and typed.

``weights_manifest.json`` lies at the top level of the repository and is packaged into the wheel beside this
package. Reading it needs the standard library alone; the tests hold its checks against a JSON Schema of this layout.
"""

import functools
import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NoReturn

from conam_zoo.checks import (
    Check,
    CheckError,
    as_object,
    either,
    integer,
    line,
    matching,
    number,
    one_of,
    optional,
    record,
    refuse,
    row,
    table_of,
    that,
    tuple_of,
)
from conam_zoo.weights.errors import ManifestError

JsonScalar = str | int | float | bool | None

MANIFEST_NAME = "weights_manifest.json"
SCHEMA_VERSION = 1

NAME_PATTERN = r"[a-z0-9_]+\.[a-z0-9_]+"
RECIPE_PATTERN = r"[a-z0-9_]+(\.[a-z0-9_]+)*"
FILE_PATTERN = r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors(\.index\.json)?"
SHA256_PATTERN = r"[0-9a-f]{64}"
REVISION_PATTERN = r"[0-9a-f]{40}"
HUB_NAME_PATTERN = r"(?!.*(--|\.\.|\.git$))[A-Za-z0-9_]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
CODE_REPOSITORY_PATTERN = r"[A-Za-z0-9][A-Za-z0-9-]*/[A-Za-z0-9._-]+"

DTYPES = ("float16", "float32")
ONNX_FILES = ("onnx/model.onnx", "onnx/model_int8.onnx")  # on the Hub alone, where transformers.js looks
EVEN = 0.02  # a site of less liveness gives all patches the same confidence, for any practical purpose
_LARGEST_BYTES = 16 << 20  # of a manifest


@dataclass(frozen=True)
class Metrics:
    """Scores on the test split; ``nll`` is in nats per image, ``ece`` a fraction (15 equal-width bins)."""

    top1_percent: float
    top5_percent: float
    nll: float
    ece: float


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file beside the weights on the Hub; ``top1_percent`` is measured on the test split, with this file."""

    sha256: str
    size_bytes: int
    top1_percent: float


@dataclass(frozen=True)
class WeightEntry:
    """Published weights: one safetensors file, or the index of several."""

    name: str  # the entry's key, "<arch>.<tag>"
    repository: str
    revision: str | None  # the Hub commit that holds the file; None: not published yet
    file: str
    sha256: str
    size_bytes: int  # of ``file``
    dtype: str
    params: int
    macs: int  # multiply-accumulates of one image of ``input_size``
    model_args: Mapping[str, JsonScalar | list[JsonScalar]] = field(hash=False)
    dataset: str
    num_classes: int
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    metrics: Metrics
    recipe: str
    teacher: str | None  # the net it was distilled from, by name; None: from none
    seed: int
    epochs: int
    hardware: str
    train_minutes: float
    library_versions: Mapping[str, str] = field(hash=False)
    licence: str
    total_bytes: int | None = None  # of an index and the files that it names; None: there is one file
    # Measured when it was packed; None for entries of older manifests.
    liveness: Mapping[str, float] | None = field(default=None, hash=False)  # by site; see layers/confidence.py
    correct_of_1000: int | None = None  # right answers on 1,000 test images, spread over the split
    nll_of_1000: float | None = None
    onnx: Mapping[str, OnnxFile] | None = field(default=None, hash=False)  # by ``ONNX_FILES``; None: not published

    @property
    def arch(self) -> str:
        """The model's registered name: ``resnet20_conam`` of ``resnet20_conam.cifar10``."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """The part after the dot: ``cifar10`` of ``resnet20_conam.cifar10``."""
        return self.name.partition(".")[2]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all files of the weights."""
        return self.total_bytes or self.size_bytes

    @property
    def even_sites(self) -> list[str]:
        """The sites whose ConAM gives all patches about the same confidence, as far as it was measured."""
        return [site for site, alive in (self.liveness or {}).items() if alive < EVEN]

    def hub_id(self, namespace: str) -> str:
        """The id of its Hub repository."""
        return f"{namespace}/{self.repository}"


OPTIONAL = {f.name for f in fields(WeightEntry) if f.default is None}  # older manifests have none of them


@dataclass(frozen=True)
class Manifest:
    """A whole manifest."""

    entries: Mapping[str, WeightEntry] = field(hash=False)
    hub_namespace: str | None = None  # the publisher's Hub account; None: not set yet
    code_repository: str | None = None  # "owner/name", as torch.hub wants it; None: not set yet
    path: Path | None = field(default=None, compare=False)  # the file that it was read from

    def entry(self, name: str) -> WeightEntry:
        """The entry called ``name``; a ``ManifestError`` lists those there are."""
        if name not in self.entries:
            known = ", ".join(sorted(self.entries)) or "none"
            raise ManifestError(f"The manifest has no weights {name!r}; choose one of those it has: {known}.")
        return self.entries[name]


def find_checkout() -> Path | None:
    """The top folder of the checkout this package runs from; None when it is installed from a wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / MANIFEST_NAME).is_file() else None


def find_manifest() -> Path:
    """Where the manifest lies: in the checkout if there is one, or the package; ``ManifestError`` if in neither."""
    package = Path(__file__).resolve().parents[1]
    folder = find_checkout() or package
    if not (folder / MANIFEST_NAME).is_file():
        raise ManifestError(f"{MANIFEST_NAME} lies neither in {package.parent} nor in {package}; reinstall conam_zoo.")
    return folder / MANIFEST_NAME


def load_manifest(path: Path | None = None) -> Manifest:
    """Read and check a manifest; without ``path`` the default one, which is read once per process."""
    return _load_default() if path is None else _load(path)


@functools.cache
def _load_default() -> Manifest:
    return _load(find_manifest())


def _load(path: Path) -> Manifest:
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > _LARGEST_BYTES):
            raise OSError(f"it is no file, or has more than {_LARGEST_BYTES:,} bytes")
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"The manifest {path} cannot be read: {error}.") from error
    try:
        manifest = parse_manifest(json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=no_constant))
    except ManifestError as error:
        raise ManifestError(f"The manifest {path} is not valid: {error}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or nested or numbered beyond all reason
        raise ManifestError(f"The manifest {path} is not JSON: {error}; restore the published one.") from error
    return Manifest(manifest.entries, manifest.hub_namespace, manifest.code_repository, path)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = max(names, key=names.count)
        raise ManifestError(f"the key {twice!r} stands twice in one object; keep one of them.")
    return found


def no_constant(name: str) -> NoReturn:
    """Refuse ``NaN`` and ``Infinity``, which Python reads and JSON does not have."""
    raise ManifestError(f"{name} is not a JSON number; write a finite one.")


def dump_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest, unless it would not be accepted when read (``ManifestError``).

    Keys are sorted and the form is fixed: reading a file written here and writing it again changes no byte.
    """
    document = _as_document(manifest)
    parse_manifest(document)
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text.encode("utf-8"))
    _load_default.cache_clear()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either wholly the old one or wholly the new one, never in between."""
    # The same folder, as a rename is atomic only within a file system; not tempfile, whose files are private.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _as_document(manifest: Manifest) -> dict[str, object]:
    entries: dict[str, object] = {}
    for name, entry in manifest.entries.items():
        if entry.name != name:
            raise ManifestError(f"The entry {name!r} is called {entry.name!r} inside; give both the same name.")
        # Through JSON, so that tuples become the lists that reading will see.
        facts = json.loads(json.dumps(asdict(entry)))
        del facts["name"]
        entries[name] = {key: value for key, value in facts.items() if value is not None or key not in OPTIONAL}
    return {
        "schema_version": SCHEMA_VERSION,
        "hub_namespace": manifest.hub_namespace,
        "code_repository": manifest.code_repository,
        "entries": entries,
    }


# --- the layout of a manifest ----------------------------------------------------------------------------------


_SCALAR = either(
    line,
    that(
        lambda value: value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)),
        "a string, a finite number, true, false, null, or a list of these",
    ),
)
_ARGUMENT = that(lambda v: isinstance(v, str) and v.isidentifier() and v.isascii(), "the name of an argument")
_SHA256 = matching(SHA256_PATTERN, "64 lower-case hexadecimal digits")
_PERCENT = number(0.0, 100.0)
_METRICS = {"top1_percent": _PERCENT, "top5_percent": _PERCENT, "nll": number(0.0, 1e6), "ece": number(0.0, 1.0)}
_ONNX_FILE = record(OnnxFile, {"sha256": _SHA256, "size_bytes": integer(1), "top1_percent": _PERCENT})


def _argument(value: object, at: str) -> JsonScalar | list[JsonScalar]:
    return [_SCALAR(item, at) for item in value] if isinstance(value, list) else _SCALAR(value, at)


_ENTRY: dict[str, Check] = {
    "repository": matching(HUB_NAME_PATTERN, "a Hub repository name without namespace"),
    "revision": optional(matching(REVISION_PATTERN, "null or 40 lower-case hexadecimal digits")),
    "file": matching(FILE_PATTERN, "a bare file name without '..' ending in .safetensors or .safetensors.index.json"),
    "sha256": _SHA256,
    "size_bytes": integer(1),
    "dtype": one_of(*DTYPES),
    "params": integer(1),
    "macs": integer(1),
    "model_args": table_of(_argument, _ARGUMENT),
    "dataset": line,
    "num_classes": integer(1),
    "classes": tuple_of(line),
    "input_size": row(*[integer(1)] * 3),
    "mean": row(*[number(0.0, 1.0)] * 3),
    "std": row(*[number(1e-6, 1.0)] * 3),
    "metrics": record(Metrics, _METRICS),
    "recipe": matching(RECIPE_PATTERN, "the name of a recipe"),
    "teacher": optional(line),
    "seed": integer(0),
    "epochs": integer(1),
    "hardware": line,
    "train_minutes": number(0.0, 1e9),
    "library_versions": table_of(line),
    "licence": line,
    "total_bytes": optional(integer(1)),
    "liveness": optional(table_of(number(0.0, 1e6))),
    "correct_of_1000": optional(integer(0, 1000)),
    "nll_of_1000": optional(number(0.0, 1e6)),
    "onnx": optional(record(dict, dict.fromkeys(ONNX_FILES, _ONNX_FILE))),
}


_NAME = matching(NAME_PATTERN, "an '<arch>.<tag>' of a-z, 0-9 and _")
_VERSION_RULE = f"{SCHEMA_VERSION}: install the conam_zoo that the manifest belongs to"
_MANIFEST = record(
    dict,
    {
        "schema_version": integer(SCHEMA_VERSION, SCHEMA_VERSION, _VERSION_RULE),
        "hub_namespace": optional(matching(HUB_NAME_PATTERN, "null or a Hugging Face account name")),
        "code_repository": optional(matching(CODE_REPOSITORY_PATTERN, "null or 'owner/name'")),
        "entries": as_object,
    },
)


def parse_manifest(document: object) -> Manifest:
    """Check a parsed JSON document; a ``ManifestError`` names the field, the value found and what it must be."""
    try:
        top = _MANIFEST(document, "")
        entries = {_NAME(name, "a key of entries"): _read_entry(name, facts) for name, facts in top["entries"].items()}
    except CheckError as error:
        raise ManifestError(f"{error}.") from error
    return Manifest(entries, top["hub_namespace"], top["code_repository"])


def _read_entry(name: str, document: object) -> WeightEntry:
    at = f"entries[{name!r}]"
    facts = dict.fromkeys(OPTIONAL) | as_object(document, at)
    entry: WeightEntry = record(functools.partial(WeightEntry, name), _ENTRY)(facts, at)
    metrics = entry.metrics
    if metrics.top5_percent < metrics.top1_percent:
        refuse(f"{at}.metrics.top5_percent", metrics.top5_percent, f"at least top1_percent = {metrics.top1_percent}")
    if entry.input_size[0] != 3:  # mean and std have three numbers
        refuse(f"{at}.input_size", list(entry.input_size), "[3, height, width]")
    if len(entry.classes) != entry.num_classes:
        raise CheckError(f"{at}.classes has {len(entry.classes)} names, but num_classes is {entry.num_classes}")
    return entry

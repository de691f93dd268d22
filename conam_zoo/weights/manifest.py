"""The weights manifest: every fact about every published weight file, read strictly and typed.

``weights_manifest.json`` lies at the top level of the repository and is packaged into the wheel beside this
package. The checks are written by hand so that reading a manifest needs the standard library alone; the tests hold them
against a JSON Schema of the same layout.
"""

import functools
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from conam_zoo.weights import json_checks as check
from conam_zoo.weights.json_checks import JsonScalar, ManifestError

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
_LARGEST_BYTES = 16 << 20  # of a manifest


@dataclass(frozen=True)
class Metrics:
    """What the published file scores on the test split of its data set.

    ``nll`` is in nats per image, ``ece`` a fraction (15 equal-width bins).
    """

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
    """Published weights: one safetensors file, or the index of several.

    ``name`` is the entry's key, ``"<arch>.<tag>"``; ``sha256`` and ``size_bytes`` are those of ``file``.
    """

    name: str
    repository: str
    revision: str | None  # the Hub commit that holds the file; None: not published yet
    file: str
    sha256: str
    size_bytes: int
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
    # Measured when it was packed; None for entries of older manifests.
    liveness: Mapping[str, float] | None = field(default=None, hash=False)  # by site; see layers/confidence.py
    correct_of_first_1000: int | None = None  # right answers on the first 1,000 test images
    nll_of_first_1000: float | None = None
    onnx: Mapping[str, OnnxFile] | None = field(default=None, hash=False)  # by ``ONNX_FILES``; None: not published

    @property
    def arch(self) -> str:
        """The model's registered name, as ``resnet20_conam`` in ``resnet20_conam.cifar10``."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """The part after the dot, as ``cifar10`` in ``resnet20_conam.cifar10``."""
        return self.name.partition(".")[2]

    def hub_id(self, namespace: str) -> str:
        """The id of the Hub repository that holds the file, below the publisher's ``namespace``."""
        return f"{namespace}/{self.repository}"


OPTIONAL = {f.name for f in fields(WeightEntry) if f.default is None}  # older manifests have none of them


@dataclass(frozen=True)
class Manifest:
    """A whole manifest.

    ``hub_namespace`` is the one place where the publisher's Hub account is set, ``code_repository``
    (``"owner/name"``, as torch.hub wants it) the one for the source code; None: not set yet. ``path`` is the file
    it was read from, if any, and takes no part in comparisons.
    """

    entries: Mapping[str, WeightEntry] = field(hash=False)
    hub_namespace: str | None = None
    code_repository: str | None = None
    path: Path | None = field(default=None, compare=False)

    def entry(self, name: str) -> WeightEntry:
        """The entry called ``name``.

        Raises:
            ManifestError: There is none; the message lists those there are.
        """
        if name not in self.entries:
            known = ", ".join(sorted(self.entries)) or "none"
            raise ManifestError(f"The manifest has no weights {name!r}; choose one of those it has: {known}.")
        return self.entries[name]


def find_checkout() -> Path | None:
    """The top folder of the checkout this package runs from; None when it is installed from a wheel."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / MANIFEST_NAME).is_file() else None


def find_manifest() -> Path:
    """Where the manifest lies: the checkout's if there is one, else the one packaged in the wheel.

    Raises:
        ManifestError: It lies in neither place.
    """
    checkout = find_checkout()
    if checkout is not None:
        return checkout / MANIFEST_NAME
    packaged = Path(__file__).resolve().parents[1] / MANIFEST_NAME
    if packaged.is_file():
        return packaged
    raise ManifestError(
        f"{MANIFEST_NAME} lies neither in {packaged.parent.parent} nor in {packaged.parent}; reinstall conam_zoo."
    )


def load_manifest(path: Path | None = None) -> Manifest:
    """Read and check a manifest.

    Args:
        path: The file to read; without it the default one, which is read once per process.

    Raises:
        ManifestError: The file is absent, unreadable, or not a valid manifest.
    """
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
        manifest = parse_manifest(
            json.loads(text, object_pairs_hook=check.without_duplicates, parse_constant=check.no_constant)
        )
    except ManifestError as error:
        raise ManifestError(f"The manifest {path} is not valid: {error}") from error
    except (ValueError, RecursionError) as error:  # not JSON, or nested or numbered beyond all reason
        raise ManifestError(f"The manifest {path} is not JSON: {error}; restore the published one.") from error
    return Manifest(manifest.entries, manifest.hub_namespace, manifest.code_repository, path)


def dump_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest so that it is either wholly the old file or wholly the new one, never in between.

    Keys are sorted and the form is fixed: reading a file written here and writing it again changes no byte.

    Raises:
        ManifestError: ``manifest`` would not be accepted when read; nothing is written.
    """
    document = _as_document(manifest)
    parse_manifest(document)
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    # The same folder, since a rename is atomic only within one file system; not tempfile, whose files are
    # readable by their owner alone.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("xb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _load_default.cache_clear()


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


def parse_manifest(document: object) -> Manifest:
    """Check a parsed JSON document and turn it into a ``Manifest``.

    Raises:
        ManifestError: Names the field, the value found and what it must be.
    """
    top = check.as_object(document, "the manifest")
    check.exact_keys(top, {"schema_version", "hub_namespace", "code_repository", "entries"}, "the manifest")
    version = check.integer(top["schema_version"], "schema_version", 0)
    if version != SCHEMA_VERSION:
        raise ManifestError(
            f"schema_version is {version}, but this conam_zoo reads {SCHEMA_VERSION}; "
            "install the conam_zoo that the manifest belongs to."
        )
    entries = {}
    for name, facts in check.as_object(top["entries"], "entries").items():
        check.matching(name, "a key of entries", NAME_PATTERN, "an '<arch>.<tag>' of a-z, 0-9 and _")
        entries[name] = _read_entry(name, facts)
    return Manifest(
        entries=entries,
        hub_namespace=check.optional(
            top["hub_namespace"], "hub_namespace", HUB_NAME_PATTERN, "null or a Hugging Face account name"
        ),
        code_repository=check.optional(
            top["code_repository"], "code_repository", CODE_REPOSITORY_PATTERN, "null or 'owner/name'"
        ),
    )


def _read_entry(name: str, document: object) -> WeightEntry:
    at = f"entries[{name!r}]"
    facts = check.as_object(document, at)
    facts = dict.fromkeys(OPTIONAL) | facts
    check.exact_keys(facts, {f.name for f in fields(WeightEntry)} - {"name"}, at)
    entry = WeightEntry(
        name=name,
        repository=check.matching(
            facts["repository"],
            f"{at}.repository",
            HUB_NAME_PATTERN,
            "a Hub repository name without namespace",
        ),
        revision=check.optional(
            facts["revision"], f"{at}.revision", REVISION_PATTERN, "null or 40 lower-case hexadecimal digits"
        ),
        file=check.matching(
            facts["file"],
            f"{at}.file",
            FILE_PATTERN,
            "a bare file name without '..' ending in .safetensors or .safetensors.index.json",
        ),
        sha256=_sha256(facts["sha256"], f"{at}.sha256"),
        size_bytes=check.integer(facts["size_bytes"], f"{at}.size_bytes", 1),
        dtype=check.one_of(facts["dtype"], f"{at}.dtype", DTYPES),
        params=check.integer(facts["params"], f"{at}.params", 1),
        macs=check.integer(facts["macs"], f"{at}.macs", 1),
        model_args=_read_model_args(facts["model_args"], f"{at}.model_args"),
        dataset=check.text(facts["dataset"], f"{at}.dataset"),
        num_classes=check.integer(facts["num_classes"], f"{at}.num_classes", 1),
        classes=tuple(check.text(item, f"{at}.classes") for item in check.as_list(facts["classes"], f"{at}.classes")),
        input_size=_read_input_size(facts["input_size"], f"{at}.input_size"),
        mean=check.three_numbers(facts["mean"], f"{at}.mean", 0.0, 1.0),
        std=check.three_numbers(facts["std"], f"{at}.std", 1e-6, 1.0),
        metrics=_read_metrics(facts["metrics"], f"{at}.metrics"),
        recipe=check.matching(facts["recipe"], f"{at}.recipe", RECIPE_PATTERN, "the name of a recipe"),
        teacher=None if facts["teacher"] is None else check.text(facts["teacher"], f"{at}.teacher"),
        seed=check.integer(facts["seed"], f"{at}.seed", 0),
        epochs=check.integer(facts["epochs"], f"{at}.epochs", 1),
        hardware=check.text(facts["hardware"], f"{at}.hardware"),
        train_minutes=check.number(facts["train_minutes"], f"{at}.train_minutes", 0.0, 1e9),
        library_versions={
            check.text(library, f"a key of {at}.library_versions"): check.text(
                version, f"{at}.library_versions[{library!r}]"
            )
            for library, version in check.as_object(facts["library_versions"], f"{at}.library_versions").items()
        },
        licence=check.text(facts["licence"], f"{at}.licence"),
        liveness=_read_liveness(facts["liveness"], f"{at}.liveness"),
        correct_of_first_1000=_read_correct(facts["correct_of_first_1000"], f"{at}.correct_of_first_1000"),
        nll_of_first_1000=_read_nll(facts["nll_of_first_1000"], f"{at}.nll_of_first_1000"),
        onnx=_read_onnx(facts["onnx"], f"{at}.onnx"),
    )
    if len(entry.classes) != entry.num_classes:
        raise ManifestError(
            f"{at}.classes has {len(entry.classes)} names, but num_classes is {entry.num_classes}; "
            "give one name per class."
        )
    return entry


def _read_liveness(document: object, at: str) -> dict[str, float] | None:
    if document is None:
        return None
    sites = check.as_object(document, at)
    return {
        check.text(site, f"a key of {at}"): check.number(value, f"{at}[{site!r}]", 0.0, 1e6)
        for site, value in sites.items()
    }


def _read_correct(value: object, at: str) -> int | None:
    if value is not None and check.integer(value, at, 0) > 1000:
        check.refuse(at, value, "at most 1000")
    return None if value is None else check.integer(value, at, 0)


def _read_nll(value: object, at: str) -> float | None:
    return None if value is None else check.number(value, at, 0.0, 1e6)


def _read_onnx(document: object, at: str) -> dict[str, OnnxFile] | None:
    if document is None:
        return None
    files = check.as_object(document, at)
    check.exact_keys(files, ONNX_FILES, at)
    return {path: _read_onnx_file(facts, f"{at}[{path!r}]") for path, facts in files.items()}


def _read_onnx_file(document: object, at: str) -> OnnxFile:
    facts = check.as_object(document, at)
    check.exact_keys(facts, {f.name for f in fields(OnnxFile)}, at)
    return OnnxFile(
        sha256=_sha256(facts["sha256"], f"{at}.sha256"),
        size_bytes=check.integer(facts["size_bytes"], f"{at}.size_bytes", 1),
        top1_percent=check.number(facts["top1_percent"], f"{at}.top1_percent", 0.0, 100.0),
    )


def _sha256(value: object, at: str) -> str:
    return check.matching(value, at, SHA256_PATTERN, "64 lower-case hexadecimal digits")


def _read_metrics(document: object, at: str) -> Metrics:
    facts = check.as_object(document, at)
    check.exact_keys(facts, {f.name for f in fields(Metrics)}, at)
    metrics = Metrics(
        top1_percent=check.number(facts["top1_percent"], f"{at}.top1_percent", 0.0, 100.0),
        top5_percent=check.number(facts["top5_percent"], f"{at}.top5_percent", 0.0, 100.0),
        nll=check.number(facts["nll"], f"{at}.nll", 0.0, 1e6),
        ece=check.number(facts["ece"], f"{at}.ece", 0.0, 1.0),
    )
    if metrics.top5_percent < metrics.top1_percent:
        check.refuse(f"{at}.top5_percent", metrics.top5_percent, f"at least top1_percent = {metrics.top1_percent}")
    return metrics


def _read_model_args(document: object, at: str) -> dict[str, JsonScalar | list[JsonScalar]]:
    arguments: dict[str, JsonScalar | list[JsonScalar]] = {}
    for name, value in check.as_object(document, at).items():
        where = f"{at}[{name!r}]"
        if not name.isidentifier() or not name.isascii():
            check.refuse(f"a key of {at}", name, "the name of a constructor argument")
        if isinstance(value, list):
            arguments[name] = [check.scalar(item, where) for item in value]
        else:
            arguments[name] = check.scalar(value, where)
    return arguments


def _read_input_size(value: object, at: str) -> tuple[int, int, int]:
    items = check.as_list(value, at, length=3)
    channels, height, width = (check.integer(item, at, 1) for item in items)
    if channels != 3:  # mean and std have three numbers
        check.refuse(at, items, "[3, height, width]")
    return channels, height, width

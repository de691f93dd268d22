"""The manifest: what is accepted, what is refused, and that the reader and the JSON Schema agree."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conam_zoo.weights import (
    ManifestError,
    WeightEntry,
    dump_manifest,
    find_manifest,
    load_manifest,
    manifest,
    parse_manifest,
)

NAME = "resnet20_conam.cifar10"
SCHEMA = json.loads((Path(__file__).parent / "oracles" / "manifest_schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def example() -> dict[str, Any]:
    """A valid manifest document with one entry."""
    return {
        "schema_version": 1,
        "hub_namespace": None,
        "code_repository": None,
        "entries": {
            NAME: {
                "repository": NAME,
                "revision": None,
                "file": "model.safetensors",
                "sha256": "0123456789abcdef" * 4,
                "size_bytes": 1234567,
                "dtype": "float16",
                "params": 272474,
                "macs": 41000000,
                "model_args": {},
                "dataset": "cifar10",
                "num_classes": 3,
                "classes": ["airplane", "voiture rouillée", "bird"],
                "input_size": [3, 32, 32],
                "mean": [0.4914, 0.4822, 0.4465],
                "std": [0.247, 0.2435, 0.2616],
                "metrics": {"top1_percent": 92.5, "top5_percent": 99.75, "nll": 0.31, "ece": 0.021},
                "recipe": NAME,
                "teacher": None,
                "seed": 0,
                "epochs": 200,
                "hardware": "1x some accelerator",
                "train_minutes": 12.5,
                "library_versions": {"torch": "2.15.0", "timm": "1.0.31"},
                "licence": "Apache-2.0",
            }
        },
    }


def entry_with(**changes: object) -> dict[str, Any]:
    document = example()
    document["entries"][NAME].update(changes)
    return document


def metrics_with(**changes: object) -> dict[str, Any]:
    document = example()
    document["entries"][NAME]["metrics"].update(changes)
    return document


def onnx_with(file: str = "onnx/model_int8.onnx", **changes: object) -> dict[str, Any]:
    facts = {"sha256": "ab" * 32, "size_bytes": 1000, "top1_percent": 92.25}
    return entry_with(onnx={"onnx/model.onnx": facts, file: facts | changes})


def renamed(name: str) -> dict[str, Any]:
    document = example()
    document["entries"][name] = document["entries"].pop(NAME)
    return document


def without(*path: str) -> dict[str, Any]:
    document = example()
    target = document
    for key in path[:-1]:
        target = target[key]
    del target[path[-1]]
    return document


def accepted_by_reader(document: object) -> bool:
    try:
        parse_manifest(document)
    except ManifestError:
        return False
    return True


VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "as it is": example,
    "no entries": lambda: {**example(), "entries": {}},
    "published": lambda: {
        **entry_with(revision="0a" * 20),
        "hub_namespace": "some-lab",
        "code_repository": "a-b/c.d",
    },
    "model_args": lambda: entry_with(model_args={"depth": 20, "ratio": 0.5, "act": "relu", "sizes": [1, None, True]}),
    "whole numbers for fractions": lambda: entry_with(train_minutes=12, mean=[0, 0, 0], std=[1, 1, 1]),
    "perfect": lambda: metrics_with(top1_percent=100, top5_percent=100, nll=0, ece=0),
    "float32": lambda: entry_with(dtype="float32"),
    "measured": lambda: entry_with(liveness={"layer1.0.attn": 0.25, "b": 0}, correct_of_1000=1000),
    "measured on nothing": lambda: entry_with(liveness=None, correct_of_1000=None),
    "no ConAM": lambda: entry_with(liveness={}, correct_of_1000=0),
    "ONNX files": onnx_with,
    "no ONNX files": lambda: entry_with(onnx=None),
    "other file": lambda: entry_with(file="model-00001.v2.safetensors"),
}

INVALID: dict[str, Callable[[], object]] = {
    "a list": list,
    "liveness as text": lambda: entry_with(liveness="even"),
    "liveness below zero": lambda: entry_with(liveness={"layer1.0.attn": -0.1}),
    "liveness without a site": lambda: entry_with(liveness={"": 0.1}),
    "more right than shown": lambda: entry_with(correct_of_1000=1001),
    "a fraction right": lambda: entry_with(correct_of_1000=925.5),
    "a negative NLL": lambda: entry_with(nll_of_1000=-0.1),
    "ONNX without int8": lambda: entry_with(
        onnx={"onnx/model.onnx": onnx_with()["entries"][NAME]["onnx"].popitem()[1]}
    ),
    "ONNX with a third file": lambda: onnx_with("onnx/model_uint8.onnx"),
    "ONNX elsewhere": lambda: onnx_with("../model_int8.onnx"),
    "ONNX not measured": lambda: onnx_with(top1_percent=None),
    "ONNX with another hash": lambda: onnx_with(sha256="ab" * 20),
    "ONNX of no bytes": lambda: onnx_with(size_bytes=0),
    "ONNX with more": lambda: onnx_with(nll=0.3),
    "ONNX a list": lambda: entry_with(onnx=[]),
    "null": lambda: None,
    "future schema": lambda: {**example(), "schema_version": 2},
    "schema as text": lambda: {**example(), "schema_version": "1"},
    "unknown top key": lambda: {**example(), "note": ""},
    "missing top key": lambda: without("hub_namespace"),
    "entries a list": lambda: {**example(), "entries": []},
    "namespace empty": lambda: {**example(), "hub_namespace": ""},
    "namespace with slash": lambda: {**example(), "hub_namespace": "a/b"},
    "namespace with --": lambda: {**example(), "hub_namespace": "a--b"},
    "namespace starts with -": lambda: {**example(), "hub_namespace": "-a"},
    "namespace dots": lambda: {**example(), "hub_namespace": ".."},
    "namespace number": lambda: {**example(), "hub_namespace": 1},
    "namespace too long": lambda: {**example(), "hub_namespace": "a" * 97},
    "code repository URL": lambda: {**example(), "code_repository": "https://example.org/a/b"},
    "name without tag": lambda: renamed("resnet20_conam"),
    "name upper case": lambda: renamed("ResNet20.cifar10"),
    "name with path": lambda: renamed("../resnet20.cifar10"),
    "name with two dots": lambda: renamed("resnet20.cifar10.v2"),
    "entry null": lambda: {**example(), "entries": {NAME: None}},
    "entry lacks sha256": lambda: without("entries", NAME, "sha256"),
    "entry has more": lambda: entry_with(url="https://example.org"),
    "repository with namespace": lambda: entry_with(repository="lab/resnet20_conam.cifar10"),
    "repository .git": lambda: entry_with(repository="resnet20_conam.git"),
    "revision a branch": lambda: entry_with(revision="main"),
    "revision upper case": lambda: entry_with(revision="0A" * 20),
    "revision short": lambda: entry_with(revision="0a" * 19),
    "file with folder": lambda: entry_with(file="weights/model.safetensors"),
    "file with backslash": lambda: entry_with(file="weights\\model.safetensors"),
    "file upwards": lambda: entry_with(file="..safetensors"),
    "file upwards inside": lambda: entry_with(file="a..b.safetensors"),
    "file hidden": lambda: entry_with(file=".safetensors"),
    "file a pickle": lambda: entry_with(file="pytorch_model.bin"),
    "sha256 upper case": lambda: entry_with(sha256="A" * 64),
    "sha256 short": lambda: entry_with(sha256="a" * 63),
    "sha256 null": lambda: entry_with(sha256=None),
    "size zero": lambda: entry_with(size_bytes=0),
    "size fraction": lambda: entry_with(size_bytes=1.5),
    "size true": lambda: entry_with(size_bytes=True),
    "size beyond JSON": lambda: entry_with(size_bytes=10**30),
    "dtype int8": lambda: entry_with(dtype="int8"),
    "dtype list": lambda: entry_with(dtype=[]),
    "params negative": lambda: entry_with(params=-1),
    "macs text": lambda: entry_with(macs="41M"),
    "model_args list": lambda: entry_with(model_args=[]),
    "model_args nested": lambda: entry_with(model_args={"a": {"b": 1}}),
    "model_args no identifier": lambda: entry_with(model_args={"a-b": 1}),
    "dataset empty": lambda: entry_with(dataset=""),
    "dataset two lines": lambda: entry_with(dataset="cifar\n10"),
    "classes empty": lambda: entry_with(classes=[], num_classes=0),
    "class blank": lambda: entry_with(classes=["airplane", " ", "bird"]),
    "class number": lambda: entry_with(classes=["airplane", 1, "bird"]),
    "input_size grey": lambda: entry_with(input_size=[1, 32, 32]),
    "input_size two": lambda: entry_with(input_size=[32, 32]),
    "input_size zero": lambda: entry_with(input_size=[3, 0, 32]),
    "mean in 0..255": lambda: entry_with(mean=[125.3, 123.0, 113.9]),
    "mean of four": lambda: entry_with(mean=[0.5, 0.5, 0.5, 0.5]),
    "mean false": lambda: entry_with(mean=[False, 0.5, 0.5]),
    "std zero": lambda: entry_with(std=[0, 0.2, 0.2]),
    "metrics lacks": lambda: without("entries", NAME, "metrics", "ece"),
    "metrics has more": lambda: metrics_with(top3_percent=99.0),
    "percent above 100": lambda: metrics_with(top5_percent=100.1),
    "percent negative": lambda: metrics_with(top1_percent=-0.1),
    "ece in percent": lambda: metrics_with(ece=2.1),
    "nll infinite": lambda: metrics_with(nll=float("inf")),
    "recipe path": lambda: entry_with(recipe="recipes/resnet20.toml"),
    "seed negative": lambda: entry_with(seed=-1),
    "seed null": lambda: entry_with(seed=None),
    "epochs zero": lambda: entry_with(epochs=0),
    "hardware null": lambda: entry_with(hardware=None),
    "minutes negative": lambda: entry_with(train_minutes=-1.0),
    "versions list": lambda: entry_with(library_versions=["torch"]),
    "versions number": lambda: entry_with(library_versions={"torch": 2.15}),
    "licence null": lambda: entry_with(licence=None),
}

# What a JSON Schema cannot say, or says otherwise: the reader alone refuses these.
BEYOND_THE_SCHEMA: dict[str, Callable[[], dict[str, Any]]] = {
    "too few classes": lambda: entry_with(num_classes=4),
    "top-5 below top-1": lambda: metrics_with(top5_percent=50.0),
    "integer with a decimal point": lambda: entry_with(epochs=200.0),
}


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("case", VALID)
def test_valid_ones_are_accepted_by_both(case: str) -> None:
    parse_manifest(VALID[case]())
    VALIDATOR.validate(VALID[case]())


@pytest.mark.parametrize("case", INVALID)
def test_invalid_ones_are_refused_by_both_in_one_sentence(case: str) -> None:
    with pytest.raises(ManifestError) as refused:
        parse_manifest(INVALID[case]())
    sentence = str(refused.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < 600
    assert not VALIDATOR.is_valid(INVALID[case]())


@pytest.mark.parametrize("case", BEYOND_THE_SCHEMA)
def test_the_reader_is_the_stricter_of_the_two(case: str) -> None:
    assert VALIDATOR.is_valid(BEYOND_THE_SCHEMA[case]())
    assert not accepted_by_reader(BEYOND_THE_SCHEMA[case]())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(sorted(example()["entries"][NAME])), value=JSON_VALUES)
def test_whatever_the_reader_accepts_the_schema_accepts(key: str, value: object) -> None:
    document = entry_with(**{key: value})
    if accepted_by_reader(document):
        VALIDATOR.validate(document)


def test_reader_and_schema_share_their_patterns_and_fields() -> None:
    entry = SCHEMA["$defs"]["entry"]
    assert set(entry["properties"]) == set(WeightEntry.__dataclass_fields__) - {"name"}
    assert set(entry["required"]) == set(entry["properties"]) - {
        "total_bytes",
        "liveness",
        "correct_of_1000",
        "nll_of_1000",
        "onnx",
    }
    written = {
        "NAME_PATTERN": SCHEMA["properties"]["entries"]["propertyNames"]["pattern"],
        "RECIPE_PATTERN": entry["properties"]["recipe"]["pattern"],
        "FILE_PATTERN": entry["properties"]["file"]["pattern"],
        "SHA256_PATTERN": entry["properties"]["sha256"]["pattern"],
        "REVISION_PATTERN": entry["properties"]["revision"]["pattern"],
        "HUB_NAME_PATTERN": entry["properties"]["repository"]["pattern"],
        "CODE_REPOSITORY_PATTERN": SCHEMA["properties"]["code_repository"]["pattern"],
    }
    assert written == {name: f"^{getattr(manifest, name)}$" for name in written}
    assert SCHEMA["properties"]["hub_namespace"]["pattern"] == written["HUB_NAME_PATTERN"]


def test_an_entry_knows_its_names() -> None:
    entry = parse_manifest(example()).entry(NAME)
    assert (entry.name, entry.arch, entry.tag) == (NAME, "resnet20_conam", "cifar10")
    assert entry.hub_id("some-lab") == "some-lab/resnet20_conam.cifar10"
    assert isinstance(entry.train_minutes, float)
    assert entry.input_size == (3, 32, 32)
    assert isinstance(hash(entry), int)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ManifestError, match=r"no weights 'resnet20'.*resnet20_conam\.cifar10\.$"):
        parse_manifest(example()).entry("resnet20")


@settings(max_examples=50, deadline=None)
@given(
    nll=st.floats(0, 1e6),
    minutes=st.floats(0, 1e9),
    classes=st.lists(st.text(min_size=1, max_size=5).filter(lambda t: t.isprintable() and t.strip()), min_size=1),
    model_args=st.dictionaries(st.sampled_from(["a", "b_c", "d1"]), st.integers() | st.floats(-9, 9) | st.booleans()),
)
def test_what_was_written_reads_and_writes_the_same(
    tmp_path_factory: pytest.TempPathFactory, nll: float, minutes: float, classes: list[str], model_args: Any
) -> None:
    document = entry_with(train_minutes=minutes, classes=classes, num_classes=len(classes), model_args=model_args)
    document["entries"][NAME]["metrics"]["nll"] = nll
    written = parse_manifest(document)
    first, second = (tmp_path_factory.getbasetemp() / name for name in ("first.json", "second.json"))
    dump_manifest(written, first)
    assert load_manifest(first) == written
    dump_manifest(load_manifest(first), second)
    assert first.read_bytes() == second.read_bytes()
    VALIDATOR.validate(json.loads(first.read_text(encoding="utf-8")))


def test_the_order_of_entries_does_not_show(tmp_path: Path) -> None:
    document = example()
    document["entries"]["a.b"] = copy.deepcopy(document["entries"][NAME])
    one = parse_manifest(document)
    other = replace(one, entries=dict(sorted(one.entries.items())))
    assert list(one.entries) != list(other.entries)
    dump_manifest(one, tmp_path / "one.json")
    dump_manifest(other, tmp_path / "other.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()


def test_what_older_manifests_lack_is_written_only_where_it_is_known(tmp_path: Path) -> None:
    path = tmp_path / "weights_manifest.json"
    dump_manifest(parse_manifest(example()), path)
    assert json.loads(path.read_text(encoding="utf-8")) == example()
    dump_manifest(parse_manifest(onnx_with()), path)
    assert json.loads(path.read_text(encoding="utf-8")) == onnx_with()
    assert load_manifest(path).entry(NAME).onnx["onnx/model_int8.onnx"].top1_percent == 92.25


def test_a_bad_manifest_is_not_written_over_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "weights_manifest.json"
    good = parse_manifest(example())
    dump_manifest(good, path)
    before = path.read_bytes()
    bad_entry = replace(good.entry(NAME), sha256="?")
    misnamed = replace(good.entry(NAME), name="other.name")
    for bad in (bad_entry, misnamed):
        with pytest.raises(ManifestError):
            dump_manifest(replace(good, entries={NAME: bad}), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights_manifest.json"
    good = parse_manifest(example())
    dump_manifest(good, path)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        dump_manifest(replace(good, hub_namespace="some-lab"), path)
    assert load_manifest(path) == good
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"schema_version": ' + "1" * 5000 + "}", "is not JSON"),
        ("\ufeff{}", "is not JSON"),
        ('{"schema_version": NaN}', "NaN"),
        ('{"schema_version": 1, "schema_version": 1}', "stands twice"),
        ("{}", "lacks 'code_repository', 'entries'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "weights_manifest.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError) as refused:
        load_manifest(path)
    assert str(path) in str(refused.value)
    assert says in str(refused.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(tmp_path / "weights_manifest.json")


@pytest.mark.parametrize("kind", ["pipe", "device", "too large"])
def test_a_manifest_that_would_hang_or_fill_the_memory_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights_manifest.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10**12)
    with pytest.raises(ManifestError, match="cannot be read: it is no file, or has more than"):
        load_manifest(path)


def test_the_checkout_wins_over_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "conam_zoo"
    (package / "weights").mkdir(parents=True)
    monkeypatch.setattr(manifest, "__file__", str(package / "weights" / "manifest.py"))
    with pytest.raises(ManifestError, match="reinstall"):
        find_manifest()
    dump_manifest(parse_manifest(example()), package / "weights_manifest.json")
    assert find_manifest() == package / "weights_manifest.json"
    assert manifest.find_checkout() is None
    dump_manifest(parse_manifest(example()), tmp_path / "weights_manifest.json")
    assert find_manifest() == tmp_path / "weights_manifest.json"
    assert manifest.find_checkout() == tmp_path


def test_the_default_manifest_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights_manifest.json"
    monkeypatch.setattr(manifest, "find_manifest", lambda: path)
    first = parse_manifest(example())
    dump_manifest(first, path)
    try:
        first = load_manifest()
        assert first.path == path
        assert load_manifest() is first
        dump_manifest(replace(first, hub_namespace="some-lab"), path)  # a write of ours is seen
        assert load_manifest().hub_namespace == "some-lab"
    finally:
        dump_manifest(first, path)  # so that the default is read again

"""Tables that are written from the manifest, and the figures of others that stand beside ours."""

import csv
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.models.registry import model_names
from conam_zoo.release.documents import best_peer, fill_table, like_for_like, result_table
from conam_zoo.weights import load_manifest
from experiments.tables import generated_tables, results_csv

NAME = "resnet20_conam.cifar10"


def test_every_published_figure_is_of_a_net_of_ours_and_says_where_it_is_from(checkout: Path) -> None:
    document = tomllib.loads((checkout / "conam_zoo" / "release" / "peers.toml").read_text(encoding="utf-8"))
    sources = document.pop("sources")
    assert all(url.startswith("https://") for url in sources.values())
    assert document
    for backbone, sets in document.items():
        assert f"{backbone}_conam" in model_names()
        assert set(sets) <= set(DATASETS)
        for figures in sets.values():
            for figure in figures:
                assert set(figure) <= {"top1_percent", "epoch", "source", "usual", "with"}
                assert 50 < figure["top1_percent"] < 100
                assert figure["epoch"] in ("last", "best", "not stated")
                assert figure["source"] in sources


def test_ours_stands_beside_a_last_epoch_and_the_best_known() -> None:
    usual, best = like_for_like("resnet20_conam", "cifar100"), best_peer("resnet20_conam", "cifar100")
    assert usual is not None
    assert best is not None
    assert (usual.top1_percent, usual.epoch, usual.source) == (68.48, "last", "pytorch-cifar-models")
    assert (best.top1_percent, best.epoch) == (72.33, "best")
    assert usual.to_markdown().startswith("68.48 % (last epoch, [pytorch-cifar-models](https://")
    assert "with distillation" in best.to_markdown()
    assert like_for_like("densenetbc190_40_conam", "cifar100") is None
    assert best_peer("densenetbc190_40_conam", "cifar100") is None


@pytest.mark.parametrize(("top1", "shown"), [(92.56, "| 92.56 % |"), (92.57, "| **92.57 %** |")])
def test_a_result_is_bold_where_it_is_ahead_of_the_usual_recipe(top1: float, shown: str) -> None:
    manifest = load_manifest()
    entry = manifest.entry(NAME)
    better = replace(entry, metrics=replace(entry.metrics, top1_percent=top1))
    table = result_table(replace(manifest, entries={NAME: better}))
    (line,) = [line for line in table.splitlines() if NAME in line]
    assert shown in line
    assert "92.56 % (last epoch" in line
    assert "94.03 % (epoch not stated" in line


def test_a_table_stands_between_its_markers(tmp_path: Path) -> None:
    text = "before\n<!-- results: written by `conam tables` -->\nold\n<!-- end of results -->\nafter\n"
    filled = fill_table(text, "results", "| new |", tmp_path)
    assert filled.count("| new |") == 1
    assert "old" not in filled
    assert fill_table(filled, "results", "| new |", tmp_path) == filled
    with pytest.raises(UserError, match="no place for its table results"):
        fill_table("nothing", "results", "| new |", tmp_path)


def test_the_csv_holds_what_is_measured_and_leaves_the_rest_empty() -> None:
    manifest = load_manifest()
    rows = list(csv.DictReader(results_csv(manifest, {NAME: 1234.56}).splitlines()))
    assert [row["name"] for row in rows] == sorted(manifest.entries)
    for row in rows:
        entry = manifest.entry(row["name"])
        assert (row["dataset"], row["sha256"]) == (entry.dataset, entry.sha256)
        assert float(row["top1_percent"]) == entry.metrics.top1_percent
        assert float(row["ece"]) == entry.metrics.ece
        assert [int(row[key]) for key in ("params", "macs", "size_bytes", "epochs")] == [
            entry.params,
            entry.macs,
            entry.weights_bytes,
            entry.epochs,
        ]
        assert (row["teacher"], row["revision"]) == (entry.teacher or "", entry.revision or "")
        assert row["images_per_second"] == ("1235" if entry.name == NAME else "")


def test_the_csv_takes_its_speed_from_the_record(checkout: Path, tmp_path: Path) -> None:
    shutil.copy(checkout / "weights_manifest.json", tmp_path)
    for folder, pattern in (("docs", "*.md"), ("experiments", "LOG.md"), ("experiments/results", "*.json")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file in (checkout / folder).glob(pattern):
            shutil.copy(file, tmp_path / folder)
    record = tmp_path / "experiments" / "results" / "onnx_speed.json"
    facts = json.loads(record.read_text())
    for row in facts["rows"]:
        measured = (row["group"]["weights"], row["group"]["batch"], row["name"]) == (NAME, 64, "eager fp32")
        row["facts"]["images_per_second"] = 128.2 if measured else 5.0
    record.write_text(json.dumps(facts))
    (line,) = [
        line for line in generated_tables(tmp_path)[tmp_path / "docs" / "results.csv"].splitlines() if ",128," in line
    ]
    assert line.startswith(f"{NAME},")
    record.unlink()
    rows = csv.DictReader(generated_tables(tmp_path)[tmp_path / "docs" / "results.csv"].splitlines())
    assert {row["images_per_second"] for row in rows} == {""}

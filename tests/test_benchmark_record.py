"""Timing in turns, the arithmetic of the rows, and the tables made of them."""

import json
from pathlib import Path

import pytest
import torch

from conam_zoo.errors import UserError
from conam_zoo.release.documents import fill_table
from experiments.speed.measure import time_in_turns
from experiments.speed.record import (
    BenchmarkRecord,
    Skipped,
    benchmark_tables,
    make_record,
    read_record,
    record_tables,
    summarise,
)
from experiments.tables import WRITTEN_BY

CPU = torch.device("cpu")


def test_calls_take_turns_after_their_warm_up() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    times = time_in_turns(calls, repeats=3, device=CPU, warmup=2)
    assert "".join(called[:6]) == "aabbcc"
    rounds = ["".join(called[start : start + 3]) for start in (6, 9, 12)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in times.values() for value in values)


def test_no_call_always_follows_the_same_neighbour() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abcd"}
    time_in_turns(calls, repeats=8, device=CPU, warmup=0)
    before = {name: {called[i - 1] for i in range(1, len(called)) if called[i] == name} for name in "abcd"}
    assert all(len(names - {name}) == 3 for name, names in before.items())


def test_a_measurement_settles_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    called: list[int] = []
    times = time_in_turns({"a": lambda: called.append(next(clock))}, repeats=2, device=CPU, warmup=0, settle=1)
    assert len(called) == 4
    assert times == {"a": [2, 2]}  # begin, one call, end: the call before them is not timed


def test_short_calls_are_repeated_until_they_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))  # every look at the clock is one second later
    called: list[int] = []
    times = time_in_turns({"a": lambda: called.append(0)}, repeats=2, device=CPU, warmup=1, min_seconds=5.0)
    assert len(called) == 1 + 1 + 2 * 5  # warm-up, one to learn its duration, two measurements of five
    assert times == {"a": [0.2, 0.2]}


def test_ratios_are_those_of_the_same_round() -> None:
    rows = summarise(
        {"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 2.0, 20.0]},
        group={"batch": 8},
        reference="ours",
        unit="ms",
        facts={"theirs": {"workers": 2}},
    )
    ours, theirs = rows
    assert (ours.median, ours.min, ours.max, ours.n) == (2.0, 1.0, 4.0, 3)
    assert (ours.ratio, ours.ratio_min, ours.ratio_max) == (1.0, 1.0, 1.0)
    assert (theirs.median, theirs.ratio, theirs.ratio_min, theirs.ratio_max) == (3.0, 3.0, 1.0, 5.0)
    assert theirs.ratio_to == "ours"
    assert (theirs.group, theirs.facts, ours.facts) == ({"batch": 8}, {"workers": 2}, {})


def test_rows_need_their_reference_and_whole_rounds() -> None:
    with pytest.raises(ValueError, match="reference 'x' was not measured"):
        summarise({"a": [1.0]}, group={}, reference="x", unit="ms")
    with pytest.raises(ValueError, match="longer"):
        summarise({"a": [1.0], "b": [1.0, 2.0]}, group={}, reference="b", unit="ms")


def _train_record() -> BenchmarkRecord:
    rows = summarise(
        {"conam_zoo": [10.0, 12.0, 11.0], "timm": [20.0, 18.0, 22.0]},
        group={"model": "resnet20_conam", "batch": 8},
        reference="conam_zoo",
        unit="ms",
        facts={"conam_zoo": {"images_per_second": 1234.5}, "timm": {"images_per_second": 1 / 3}},
    )
    skipped = [Skipped({"batch": 8}, "onnx", "not installed")]
    return make_record("train", rows, settings={"steps": 2}, command="python -m experiments train", skipped=skipped)


def _cost_record() -> BenchmarkRecord:
    rows = []
    for layout, times in (("channels_last", [1.0, 3.0]), ("nchw", [2.0, 8.0])):
        group = {"part": "module", "map": "2 x 16 x 32 x 32", "layout": layout}
        measured = {"conam": [times[0]], "se": [times[1]]}
        rows += summarise(measured, group=group, reference="conam", unit="ms")
    return make_record("cost", rows, settings={}, command="python -m experiments cost")


def test_a_record_survives_its_file_and_holds_no_date(tmp_path: Path) -> None:
    record = _train_record()
    path = tmp_path / "train.json"
    path.write_text(json.dumps(record.to_dict()))
    read = read_record(path)
    assert read.to_dict() == record.to_dict()
    assert read.rows[1].facts["images_per_second"] == 0.33333
    assert read.threads == torch.get_num_threads()
    assert read.library_versions["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    assert not {"date", "time", "timestamp"} & set(json.loads(path.read_text()))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"what": "train"}', '{"rows": [{"name": 1}], "skipped": []}'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"train\.json is not the record of a benchmark"):
        read_record(path)


def test_the_long_table_has_one_line_for_each_row() -> None:
    ((sentence, cells),) = record_tables(_train_record())
    assert "relative to conam_zoo" in sentence
    assert cells == [
        ["model", "batch", "", "median (min to max)", "ratio", "images per second"],
        ["resnet20_conam", "8", "conam_zoo", "11 ms (10 to 12)", "1.00", "1,234"],
        ["resnet20_conam", "8", "timm", "20 ms (18 to 22)", "2.00", "0.333"],
    ]


def test_the_cost_has_one_line_for_each_group_and_a_column_for_each_attention() -> None:
    ((_, cells),) = record_tables(_cost_record())
    assert cells == [
        ["map", "layout", "conam", "se"],
        ["2 x 16 x 32 x 32", "channels_last", "1 ms", "3.000"],
        ["2 x 16 x 32 x 32", "nchw", "2 ms", "4.000"],
    ]


def test_the_documentation_gets_every_record_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(_train_record().to_dict()))
    (tmp_path / "cost_module.json").write_text(json.dumps(_cost_record().to_dict()))
    (tmp_path / "attention.json").write_text("{}")  # not one of ours
    tables = benchmark_tables(tmp_path)
    assert list(tables) == ["train", "step", "inference", "cost", "densenet"]
    assert tables["inference"] == "Not measured yet."
    assert "| resnet20_conam | 8 | timm | 20 ms (18 to 22) | 2.00 | 0.333 |" in tables["train"]
    assert "| --- | --- | --- | --: | --: | --: |" in tables["train"]
    assert "Not measured: onnx (not installed)." in tables["train"]
    assert "| 2 x 16 x 32 x 32 | nchw | 2 ms | 4.000 |" in tables["cost"]
    assert "`python -m experiments cost` on" in tables["cost"]
    (tmp_path / "inference.json").write_text(json.dumps(_cost_record().to_dict()))
    with pytest.raises(UserError, match="is a record of 'experiments cost'"):
        benchmark_tables(tmp_path)


def test_the_markers_are_filled_again_and_again(checkout: Path) -> None:
    path = checkout / "docs" / "benchmarks.md"
    text = path.read_text(encoding="utf-8")
    tables = {"benchmark train": "| once |", "benchmark inference": "| second |", "benchmark densenet": "| third |"}
    filled = text
    for name, table in tables.items():
        filled = fill_table(filled, name, table, path, WRITTEN_BY)
    assert all(table in filled for table in tables.values())
    assert fill_table(filled, "benchmark train", "| once |", path, WRITTEN_BY) == filled
    assert "| once |" not in fill_table(filled, "benchmark train", "| other |", path, WRITTEN_BY)
    with pytest.raises(UserError, match="no place for its table benchmark train"):
        fill_table("nothing", "benchmark train", "| once |", path, WRITTEN_BY)

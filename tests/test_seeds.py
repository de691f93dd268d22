"""Several seeds of one recipe: collected from run folders, and averaged."""

import json
from pathlib import Path

import pytest
from conftest import CHECKOUT

from conam_zoo.errors import UserError
from conam_zoo.training.recipe import load_recipe
from experiments.accuracy.seeds import add_run, add_seed, read_seeds, seed_table

NAME = "resnet20_conam.cifar10"


def test_seeds_are_gathered_and_averaged(tmp_path: Path) -> None:
    path = tmp_path / "results" / "seeds.json"
    assert read_seeds(path) == {}
    run = {
        "scores": {"top1_percent": 92.0, "nll": 0.3, "ece": 0.02},
        "evaluated_on": "test images",
        "train_minutes": 10.04,
        "hardware": "1 x device",
        "library_versions": {"torch": "2"},
        "code_commit": None,
    }
    recipe = load_recipe(NAME).to_dict()
    for seed, top1 in ((10, 92.6), (2, 92.0), (2, 92.2)):
        add_seed(
            path, NAME, {**run, "recipe": {**recipe, "seed": seed}, "scores": {**run["scores"], "top1_percent": top1}}
        )
    results = read_seeds(path)
    assert list(results[NAME]) == ["2", "10"]
    assert f"| `{NAME}` | 2 | 92.40 ± 0.28 % | 92.20 (2), 92.60 (10) | 1 x device |" in seed_table(results)
    for changed in (
        {"recipe": {**recipe, "seed": 3, "epochs": 9}},
        {"teacher": {"sha256": "0"}},
        {"precision": "fp32"},
        {"teacher_bank": {"epochs": 8}},
    ):
        with pytest.raises(UserError, match=f"other seeds of {NAME} that were trained otherwise"):
            add_seed(path, NAME, {**run, "recipe": {**recipe, "seed": 3}, **changed})
    assert read_seeds(path) == results
    add_seed(path, NAME, {**run, "recipe": {k: v for k, v in recipe.items() if k != "image_size"} | {"seed": 3}})
    results = read_seeds(path)
    assert list(results[NAME]) == ["2", "3", "10"]  # a setting that a run does not name has its default
    del results[NAME]["3"]["trained_by"]
    path.write_text(json.dumps({"recipes": results}))
    with pytest.raises(UserError, match=f"does not say how seed 3 of {NAME} was trained"):
        add_seed(path, NAME, {**run, "recipe": {**recipe, "seed": 4}})
    path.write_text("[]")
    with pytest.raises(UserError, match="restore it"):
        read_seeds(path)


def test_a_run_is_filed_under_its_recipe(tmp_path: Path, experiments, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**changes: object) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        facts = {
            "recipe": load_recipe(NAME, ["seed=3"]).to_dict() | changes,
            "scores": {"top1_percent": 91.5, "nll": 0.3, "ece": 0.02},
            "evaluated_on": "test images",
            "train_minutes": 10.0,
            "hardware": "1 x device",
            "library_versions": {},
            "code_commit": None,
        }
        (folder / "run.json").write_text(json.dumps(facts))
        return folder

    path = tmp_path / "seeds.json"
    add_run(path, run())
    assert read_seeds(path)[NAME]["3"]["top1_percent"] == 91.5
    with pytest.raises(UserError, match="not trained by a packaged recipe"):
        add_run(path, run(lr=0.123))
    with pytest.raises(UserError, match="not a finished run folder"):
        add_run(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, _ = experiments("seeds", run())
    assert (code, "| `resnet20_conam.cifar10` | 1 | 91.50 % |" in out) == (0, True)
    assert list(read_seeds(tmp_path / "experiments" / "results" / "seeds.json")) == [NAME]


def test_what_is_filed_under_a_recipe_was_trained_for_its_epochs() -> None:
    filed = read_seeds(CHECKOUT / "experiments" / "results" / "seeds.json")
    assert len(filed) >= 6
    for name, seeds in filed.items():
        assert {run["epochs"] for run in seeds.values()} == {load_recipe(name).epochs}, name

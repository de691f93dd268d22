"""Grids of trainings: which cells there are, that none is trained twice, and what the tables say of them."""

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import CHECKOUT
from PIL import Image

import experiments.accuracy.grid as grid_module
from conam_zoo.errors import UserError
from conam_zoo.layers import registry
from conam_zoo.training.checkpoint import has_checkpoint
from conam_zoo.training.engine import NonFiniteLossError
from conam_zoo.training.recipe import load_recipe
from conam_zoo.training.train import train
from experiments.accuracy.ablation_axes import AXES, settings_of
from experiments.accuracy.compare import (
    ablation_cells,
    ablation_panels,
    ablation_table,
    attention_cells,
    attention_panels,
    attention_table,
    comparison_tables,
)
from experiments.accuracy.compare_plot import draw_panel
from experiments.accuracy.grid import ATTENTION, Cell, Grid, grid_recipe, read_grid, run_grid
from experiments.accuracy.statistics import compare, t_quantile
from experiments.speed.baselines import attention_layers
from experiments.speed.record import BenchmarkRecord, Row

Conam = Callable[..., tuple[int, str, str]]
TINY = ["epochs=1", "warmup_epochs=0", "batch_size=32", "precision=fp32"]


def finished(cell: Cell, top1: float) -> dict[str, Any]:
    """A cell as the file holds it, with a score that nobody measured."""
    recipe = cell.recipe
    return {
        "name": cell.name,
        "model": recipe.model,
        "dataset": recipe.dataset,
        "variant": cell.variant,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "params": 272_474,
        "macs": 40_813_184,
        "recipe": recipe.to_dict(),
        "evaluated_on": "test images",
        "top1_percent": top1,
        "top5_percent": 99.0,
        "nll": (100 - top1) / 20,
        "ece": 0.05,
        "minutes": 1.0,
        "hardware": "1 x abacus",
        "library_versions": {},
        "code_commit": None,
    }


def a_grid(scores: dict[str, list[float]]) -> Grid:
    cells = attention_cells(["resnet20"], ["cifar10"], list(scores), [0, 1, 2], grid_recipe("short"))
    kept = [cell for cell in cells if cell.recipe.seed < len(scores[cell.variant])]
    return Grid("compare", "conam", [finished(cell, scores[cell.variant][cell.recipe.seed]) for cell in kept])


# Cells


def test_cells_are_whole_comparisons_seed_by_seed() -> None:
    cells = attention_cells(["resnet20", "resnet56_conam"], ["cifar100"], ["none", "se"], [0, 3], grid_recipe("short"))
    assert [cell.name for cell in cells] == [
        f"{model}_conam.cifar100.{layer}.seed{seed}"
        for model in ("resnet20", "resnet56")
        for seed in (0, 3)
        for layer in ("none", "se")
    ]
    assert cells[1].recipe == replace(
        grid_recipe("short"), model="resnet20_conam", dataset="cifar100", model_args={"attn_layer": "se"}
    )


def test_recipes() -> None:
    assert grid_recipe("short").epochs == 15
    assert grid_recipe("full", ["lr=0.3"]) == replace(grid_recipe("short"), epochs=200, lr=0.3, warmup_epochs=5.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("model", ["resnet20_conam", "resnet56_conam", "wide_resnet16_4_conam"])
def test_every_setting_of_an_axis_is_a_net_of_its_own(model: str, name: str) -> None:
    _, settings = AXES[name]
    nets = {s.label: str(timm.create_model(model, device="meta", **s.arguments(model))) for s in settings}
    sites = {s.label: s.arguments(model).get("attn_site") for s in settings}
    assert len(settings) >= 2
    assert len({(text, sites[label]) for label, text in nets.items()}) == len(settings)
    assert len({setting.variant for setting in settings}) == len(settings)
    assert "conam" in {setting.variant for setting in settings}


def test_patches_per_side_are_what_they_are_called() -> None:
    for setting in AXES["patches"][1]:
        model = timm.create_model("resnet20_conam", **setting.arguments("resnet20_conam")).eval()
        seen: list[tuple[int, ...]] = []
        for block in (model.layer1[0], model.layer2[0], model.layer3[0]):
            block.attn.register_forward_pre_hook(
                lambda module, inputs, seen=seen: seen.append(tuple(module.confidence(inputs[0]).shape[1:]))
            )
        model(torch.zeros(1, 3, 32, 32))
        assert seen == [(int(setting.label),) * 2] * 3
    with pytest.raises(UserError, match="densenet40_12_conam has maps too small for 16 patches per side"):
        ablation_cells(["densenet40_12"], ["cifar10"], ["patches"], [0], grid_recipe("short"))


def test_smaller_images_keep_the_number_of_patches() -> None:
    recipe = grid_recipe("short", ["image_size=16"])
    sides = {
        cell.variant: cell.recipe.model_args["patch_sizes"]
        for cell in ablation_cells(["resnet20"], ["cifar10"], ["patches", "gate"], [0], recipe)
    }
    assert sides["conam"] == sides["sigmoid"] == sides["none"] == [4, 4, 2]
    assert sides["patches1"] == [16, 16, 8]
    assert sides["patches16"] == [1, 1, 1]  # the last site has 8 x 8 pixels
    (cell,) = attention_cells(["resnet20"], ["cifar10"], ["se"], [0], recipe)
    assert cell.recipe.model_args == {"attn_layer": "se", "patch_sizes": [4, 4, 2]}
    table = ablation_table(asdict(Grid("ablation", "", [finished(cell, 90.0)])))
    assert table.startswith("**Short training, 15 epochs** on images averaged down to 16 x 16 pixels with")


def test_some_settings_of_an_axis_can_be_trained_alone() -> None:
    chosen = settings_of(["form", "gate"], ["tanh", "sigmoid"])
    assert list(chosen) == ["none", "conam", "tanh", "sigmoid"]
    with pytest.raises(UserError, match="no setting 'tanh' on these axes: choose from none, conam, sigmoid"):
        settings_of(["gate"], ["tanh"])


def test_the_paper_s_form_is_trained_once_for_all_axes() -> None:
    variants = settings_of(list(AXES))
    assert list(variants)[:2] == ["none", "conam"]
    paper = {"attn_layer": "conam_variant", "attn_args": {}}
    assert sum(arguments("resnet20_conam") == paper for arguments in variants.values()) == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: attention_cells(["vgg"], ["cifar10"], ["none"], [0], grid_recipe("short")), "There is no model 'vgg"),
        (lambda: attention_cells(["resnet20"], ["mnist"], ["none"], [0], grid_recipe("short")), "no tag 'mnist'"),
        (lambda: attention_cells(["resnet20"], ["cifar10"], ["bam"], [0], grid_recipe("short")), "no layer 'bam'"),
        (lambda: ablation_cells(["resnet20"], ["cifar10"], ["depth"], [0], grid_recipe("short")), "no axis 'depth'"),
        (lambda: grid_recipe("long"), "There is no recipe 'long' for a grid: choose short or full."),
        (lambda: grid_recipe("short", ["seed=4"]), "The setting seed is not one of the whole grid"),
        (
            lambda: ablation_cells(["densenet40_12"], ["cifar10"], ["site"], [0], grid_recipe("short")),
            "densenet40_12_conam cannot be built as after_last_norm (",
        ),
        (lambda: grid_recipe("short", ["holdout=40"]), "write --holdout instead of --set holdout"),
        (lambda: grid_recipe("short", ["epohcs=4"]), "has no setting 'epohcs'"),
        (lambda: grid_recipe("short", ["epochs"]), "The setting 'epochs' has no '='"),
    ],
)
def test_unknown_names_are_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert sentence in str(caught.value)


def test_a_registered_attention_can_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FACTORIES, "gate", lambda channels, patch_size, **_: torch.nn.Identity())
    assert attention_layers()[-1] == "gate"
    (cell,) = attention_cells(["resnet20"], ["cifar10"], ["gate"], [0], grid_recipe("short"))
    assert cell.recipe.model_args == {"attn_layer": "gate"}
    table = attention_table(asdict(Grid("compare", "", [finished(cell, 90.0)])))
    assert "| gate | 1 | 90.00 | - |" in table


# Training


@pytest.mark.slow
def test_no_cell_is_trained_twice(small_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "compare"
    events: list[tuple[str, str]] = []

    def run(layers: list[str], settings: list[str] = TINY, command: str = "the command") -> Grid:
        cells = attention_cells(["resnet20"], ["cifar10"], layers, [0], grid_recipe("short", settings))
        events.clear()
        return run_grid(
            "compare", cells, small_data, output, parallel=2, command=command, on_event=lambda *e: events.append(e)
        )

    first = run(["none", "simam"])
    names = [f"resnet20_conam.cifar10.{layer}.seed0" for layer in ("none", "simam")]
    assert [cell["name"] for cell in first.cells] == names
    assert sorted(events) == sorted((name, word) for name in names for word in ("started", "done"))
    file = output.with_name("compare.json")
    assert read_grid(file) == first
    for cell in first.cells:
        run_json = json.loads((output / cell["name"] / "run.json").read_text())
        assert cell["top1_percent"] == run_json["scores"]["top1_percent"]
        assert cell["recipe"] == run_json["recipe"]
        assert (cell["epochs"], cell["evaluated_on"], cell["params"]) == (1, "test images", 272_474)
        assert not list((output / cell["name"]).glob("checkpoint*"))

    # The file has them, even without the run folders.
    for folder in output.iterdir():
        if folder.is_dir():
            folder.rename(tmp_path / folder.name)
    again = run(["none", "simam"])
    assert again == first
    assert events == [(name, "is there") for name in names]
    assert run(["none"], command="the next command").command == read_grid(file).command == "the next command"
    assert run(["none", "simam"]) == read_grid(file) == first

    # The run folders have them, even without the file.
    for name in names:
        (tmp_path / name).rename(output / name)
    file.unlink()
    assert run(["none", "simam"]) == first
    assert sorted(events) == [(name, "is there") for name in sorted(names)]

    # Another recipe is not mixed in, neither for these cells nor for others.
    for layers in (["none"], ["se"]):
        with pytest.raises(UserError, match=r"by another recipe \(lr differ\): choose another output"):
            run(layers, [*TINY, "lr=0.05"])
    file.unlink()
    with pytest.raises(UserError, match="was trained by another recipe: remove it"):
        run(["none"], [*TINY, "lr=0.05"])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings in this process: the queue's own processes take long to start, and one test has them."""

    def run_queue(jobs, data, *, parallel, compile, on_event, on_done):
        results = {}
        for job in jobs:
            resume = has_checkpoint(job.folder)
            on_event(job, "resumed" if resume else "started")
            try:
                train(load_recipe(job.recipe_name), data, job.folder, resume=resume)
            except NonFiniteLossError as error:
                results[job.name] = f"failed: {error}"
            else:
                on_done(job)
                results[job.name] = "done"
            on_event(job, results[job.name])
        return results

    monkeypatch.setattr(grid_module, "run_queue", run_queue)


@pytest.mark.slow
def test_the_process_of_a_cell_knows_the_forms_of_the_ablation(
    small_data: Path, tmp_path: Path, warm_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run_queue(jobs, data, **_):
        commands.extend(job.command(data) for job in jobs)
        return {}

    monkeypatch.setattr(grid_module, "run_queue", run_queue)
    monkeypatch.setattr("sys.executable", warm_python)
    cells = ablation_cells(["resnet20"], ["cifar10"], ["gate"], [0], grid_recipe("short", TINY), only=["sigmoid"])
    run_grid("ablation", cells, small_data, tmp_path / "out")
    *_, command = commands  # after the paper's form
    result = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, cwd=CHECKOUT, check=False)
    assert result.returncode == 0, result.stderr
    assert "conam_variant" in (tmp_path / "out" / f"{cells[-1].name}.toml").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_failed_cell_is_reported_and_tried_again(small_data: Path, tmp_path: Path) -> None:
    cells = attention_cells(["resnet20"], ["cifar10"], ["none"], [0], grid_recipe("short", [*TINY, "lr=1e30"]))
    events: list[str] = []
    for _ in range(2):
        events.clear()
        grid = run_grid("compare", cells, small_data, tmp_path / "a", on_event=lambda _, event: events.append(event))
        (cell,) = grid.cells
        assert "The loss is" in cell["failed"]
        assert "top1_percent" not in cell
        assert events[0] == "started"
        assert events[1].startswith("failed: ")
    assert "1 failed" in attention_table(asdict(grid))


def test_cells_whose_attention_was_decayed_are_not_mixed_with_others(tmp_path: Path) -> None:
    cells = attention_cells(["resnet20"], ["cifar10"], ["none"], [0], grid_recipe("short", TINY))
    (tmp_path / "a.json").write_text(Grid("compare", "", [finished(cells[0], 90.0)]).to_json())
    with pytest.raises(UserError, match="attention was decayed or initialised otherwise: choose another output"):
        run_grid("compare", cells, tmp_path, tmp_path / "a")


def test_all_forms_of_the_ablation_are_initialised_alike() -> None:
    for name, arguments in settings_of(tuple(AXES)).items():
        given = arguments("resnet20_conam")
        if given.get("attn_layer") not in ("none", "se", "eca"):
            assert given["attn_layer"] == "conam_variant", name


@pytest.mark.parametrize("text", ["no json", "{}", '{"what": "compare", "command": "", "cells": [{"name": "x"}]}'])
def test_a_file_that_is_no_grid_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(UserError, match="is not a grid of trainings"):
        read_grid(tmp_path / "compare.json")


# What they say


def test_t_quantiles_are_those_of_the_distribution() -> None:
    for degrees in (1, 2, 4, 9, 30):
        edge = t_quantile(degrees)
        t = torch.linspace(-edge, edge, 400_001, dtype=torch.float64)
        inside = torch.trapezoid(torch.distributions.StudentT(float(degrees)).log_prob(t).exp(), t)
        assert inside.item() == pytest.approx(0.95, abs=2e-4)
    assert t_quantile(1000) == t_quantile(30)


def test_differences_are_paired_by_seed() -> None:
    grid = a_grid({"none": [90.0, 92.0, 94.0], "conam": [91.0, 93.5, 95.0], "se": [93.0]})
    plain, conam, se = compare(grid.cells, "none", attention_layers())
    assert (plain.mean, plain.deviation, plain.difference) == (92.0, 2.0, None)
    assert conam.difference == pytest.approx((1.0 + 1.5 + 1.0) / 3)
    deviation = math.sqrt(2 * (1 / 6) ** 2 + (1 / 3) ** 2) / math.sqrt(2)
    # SE's one seed says nothing about chance, so what is left is the paired t-test of the other two.
    assert conam.half_width == pytest.approx(4.303 * deviation / math.sqrt(3))
    assert (se.mean, se.deviation, se.difference, se.pairs) == (93.0, None, 3.0, 1)
    assert se.half_width == pytest.approx(4.303 * deviation)


def test_chance_is_estimated_from_all_variants() -> None:
    # Without the effects of variants and seeds: 0, 0; 1, -1; -1, 1. Six cells, four effects: two degrees of freedom.
    grid = a_grid({"none": [90.0, 92.0], "conam": [92.0, 92.0], "se": [91.0, 95.0]})
    _, conam, se = compare(grid.cells, "none", attention_layers())
    deviation = math.sqrt((1 + 1 + 1 + 1) / 2)
    assert (conam.difference, se.difference) == (1.0, 2.0)
    assert conam.half_width == pytest.approx(4.303 * deviation * math.sqrt(2 / 2))
    assert se.half_width == pytest.approx(conam.half_width)


def test_one_seed_says_nothing_about_chance() -> None:
    rows = compare(a_grid({"none": [90.0], "conam": [91.0], "se": [92.0]}).cells, "none", attention_layers())
    assert [row.half_width for row in rows] == [None, None, None]
    assert [row.difference for row in rows] == [None, 1.0, 2.0]


def test_the_attention_table() -> None:
    grid = a_grid({"none": [90.0, 92.0, 94.0], "conam": [91.0, 93.5, 95.0], "se": [93.0]})
    table = attention_table(asdict(grid))
    assert table.startswith("**Short training, 15 epochs**")
    assert "1 x abacus" in table
    lines = table.splitlines()
    assert "| plain | 3 | 92.00 ± 2.00 | - | 0.400 ± 0.100 | - | 272,474 | 40.81 M | - | - |" in lines
    scores = "3 | 93.17 ± 2.02 | +1.17 ± 0.72 | 0.342 ± 0.101 | -0.058 ± 0.036"
    assert f"| ConAM | {scores} | 272,474 | 40.81 M | - | - |" in lines
    assert "| SE | 1 | 93.00 | +3.00 ± 1.24 | 0.350 | -0.150 ± 0.062 | 272,474 | 40.81 M | - | - |" in lines


def test_the_attention_table_takes_times_from_the_cost_record() -> None:
    def row(name: str, ratio: float, **group: str) -> Row:
        wanted = {
            "part": "net",
            "model": "resnet20_conam",
            "images": "64 x 32 x 32",
            "layout": "channels_last",
            "precision": "bf16",
            "pass": "training step",
        }
        return Row({**wanted, **group}, name, "ms", 3, 1.0, 1.0, 1.0, ratio, ratio, ratio, "none")

    rows = [row("conam", 9.0, precision="fp32"), row("conam", 1.02), row("conam", 1.01, **{"pass": "inference"})]
    record = BenchmarkRecord("cost", "", "1 x abacus", 1, {}, None, {}, rows)
    table = attention_table(asdict(a_grid({"none": [90.0], "conam": [91.0]})), [record])
    assert "| ConAM | 1 | 91.00 | +1.00 | 0.450 | -0.050 | 272,474 | 40.81 M | 1.02 | 1.01 |" in table.splitlines()


def test_the_ablation_table_and_panels() -> None:
    cells = ablation_cells(["resnet20"], ["cifar10"], ["shortcut", "gate"], [0, 1], grid_recipe("full"))
    scores = {"none": 90.0, "conam": 91.0, "no_shortcut": 80.0, "sigmoid": 91.5}
    grid = Grid("ablation", "", [finished(cell, scores[cell.variant] + cell.recipe.seed) for cell in cells])
    lines = ablation_table(asdict(grid)).splitlines()
    assert lines[0].startswith("200 epochs")
    assert "| | plain net | 2 | 90.50 ± 0.71 | -1.00 ± 0.00 | 0.475 ± 0.035 | +0.050 ± 0.000 | 272,474 |" in lines
    assert "| Shortcut | x (1 + eta) | 2 | 91.50 ± 0.71 | - | 0.425 ± 0.035 | - | 272,474 |" in lines
    assert "|  | x eta | 2 | 80.50 ± 0.71 | -11.00 ± 0.00 | 0.975 ± 0.035 | +0.550 ± 0.000 | 272,474 |" in lines
    assert [panel.title.partition("\n")[0] for panel in ablation_panels(grid)] == ["Shortcut", "Confidence"]
    assert {label: row.values for label, row in ablation_panels(grid)[1].rows.items()} == {
        "softmax": [91.0, 92.0],
        "sigmoid": [91.5, 92.5],
        "plain net": [90.0, 91.0],
    }


def test_the_plot_shows_the_difference_over_the_seeds_that_both_have() -> None:
    from matplotlib.figure import Figure

    (panel,) = attention_panels(a_grid({"none": [90.0, 92.0, 97.0], "se": [91.0, 93.0]}))
    axes = Figure().subplots()
    draw_panel(axes, panel)
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert means == pytest.approx([93.0, 94.0])  # one point above the plain net with either seed


def test_the_ablation_states_the_arguments_of_its_forms() -> None:
    cells = ablation_cells(["resnet20"], ["cifar10"], ["form"], [0], grid_recipe("short"))
    table = ablation_table(asdict(Grid("ablation", "", [finished(cell, 90.0) for cell in cells])))
    assert (
        '- P eta, mean one: `{"attn_layer": "conam_variant", "attn_args": {"scaling": "mean_one", "shortcut": false}}`'
        in table.splitlines()
    )
    assert '- for comparison: SE, every block: `{"attn_layer": "se", "attn_placement": "block"}`' in table.splitlines()
    without = ablation_cells(["resnet20"], ["cifar10"], ["relu"], [0], grid_recipe("short"))
    table = ablation_table(asdict(Grid("ablation", "", [finished(cell, 90.0) for cell in without])))
    assert "Arguments of the forms" not in table


def test_the_document_s_tables(tmp_path: Path) -> None:
    assert comparison_tables(tmp_path) == {"compare": "Not measured yet.", "ablation": "Not measured yet."}
    (tmp_path / "compare.json").write_text(a_grid({"none": [90.0]}).to_json())
    assert "| plain | 1 | 90.00 |" in comparison_tables(tmp_path)["compare"]
    (tmp_path / "ablation.json").write_text(a_grid({"none": [90.0]}).to_json())
    with pytest.raises(UserError, match=r"ablation.json is a grid of 'experiments compare': rename it"):
        comparison_tables(tmp_path)


# The commands


def test_dry_runs_list_the_cells(experiments: Conam, tmp_path: Path) -> None:
    code, out, _ = experiments("compare", "--data", tmp_path, "--seed", 0, "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        *(f"resnet20_conam.cifar10.{layer}.seed0" for layer in attention_layers()),
        f"{len(attention_layers())} cells of 15 epochs",
    ]
    code, out, _ = experiments("ablation", "--data", tmp_path, "--axis", "relu", "--seed", 2, "--dry-run")
    assert code == 0
    assert "resnet20_conam.cifar10.one_relu.seed2" in out.splitlines()


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_command_writes_a_file_a_plot_and_a_table(experiments: Conam, small_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "ablation"
    cells = ablation_cells(["resnet20"], ["cifar10"], ["shortcut"], [0], grid_recipe("short", TINY, holdout=40))
    facts = {"evaluated_on": "held-out training images", "attention": ATTENTION}
    known = [finished(cell, 50.0) | facts for cell in cells]
    output.with_name("ablation.json").write_text(Grid("ablation", "", known[:2]).to_json())  # one cell is left to train
    arguments = ["--data", small_data, "--axis", "shortcut", "--seed", 0, "--holdout", 40, "--output", output]
    code, out, _ = experiments("ablation", *arguments, *(word for s in TINY for word in ("--set", s)))
    assert code == 0
    assert f"{cells[2].name}: started" in out
    assert out.count("is there") == 2
    assert "x eta" in out
    grid = read_grid(output.with_name("ablation.json"))
    assert {cell["evaluated_on"] for cell in grid.cells} == {"held-out training images"}
    assert grid.command.startswith("python -m experiments ablation")
    assert json.loads((output / cells[2].name / "run.json").read_text())["recipe"]["model_args"] == {
        "attn_layer": "conam_variant",
        "attn_args": {"shortcut": False},
    }
    with Image.open(output.with_name("ablation.png")) as image:
        assert min(image.size) > 100


def test_bad_input_gives_one_sentence(experiments: Conam, tmp_path: Path) -> None:
    code, _, err = experiments("compare", "--data", tmp_path, "--layer", "bam", "--output", tmp_path / "a")
    assert code == 2
    assert err.startswith(
        "conam: There is no layer 'bam' to compare: choose from none, conam, se, eca, cbam, gc, coord, simam"
    )
    assert "conam_variant" not in err
    assert list(tmp_path.iterdir()) == []

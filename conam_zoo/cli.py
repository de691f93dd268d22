"""The ``conam`` command: arguments in, calls out."""

import json
import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conam_zoo.errors import UserError

app = typer.Typer(
    name="conam",
    help="Small image classifiers with ConAM, the confidence attention module, registered in timm.",
    epilog="Start with 'conam list', then 'conam predict resnet20_conam.cifar10 PICTURE.jpg'.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "A name such as resnet20_conam.cifar10, local-dir:FOLDER for a model of your own, or hf-hub:OWNER/NAME."
DATA_HELP = (
    "A folder with train/CLASS/* and test/CLASS/* pictures, or with the arrays {train,test}_{images,labels}.npy and "
    "classes.txt; or the word cifar10 or cifar100, to have torchvision download it."
)
Json = Annotated[
    Path | None, typer.Option("--json", help="Also write the result as JSON to this file; - prints only JSON.")
]


@app.command(
    "list",
    epilog="Examples: conam list 'wide_*' · conam list '*.cifar100' --pretrained · conam list --json -",
)
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern, such as 'resnet*' or '*.cifar100'.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only what has weights.")] = False,
    json_file: Json = None,
) -> None:
    """List the models, and the weights there are for them."""
    from fnmatch import fnmatch

    from conam_zoo.datasets import DATASETS
    from conam_zoo.models.lookup import count_params_and_macs, model_names
    from conam_zoo.weights import load_manifest

    entries = load_manifest().entries
    rows: list[dict[str, Any]] = []
    for name in model_names():
        weights = [f"{name}.{tag}" for tag in DATASETS if f"{name}.{tag}" in entries]
        hits = [full for full in (name, *(f"{name}.{tag}" for tag in DATASETS)) if fnmatch(full, pattern)]
        if not hits or (pretrained and not any(full in hits or name in hits for full in weights)):
            continue
        params, macs = count_params_and_macs(name)
        top1 = {full: entries[full].metrics.top1_percent for full in weights}
        rows.append({"model": name, "params": params, "macs": macs, "top1_percent": top1})
    if _json_only(rows, json_file):
        return
    if not rows:
        raise UserError(f"No model{' with weights' if pretrained else ''} matches {pattern!r}: 'conam list' shows all.")
    table = Table(box=None)
    for title in ("model", "parameters", "MACs", "weights (top-1)"):
        table.add_column(title, justify="right" if title in ("parameters", "MACs") else "left")
    for row in rows:
        tops = ", ".join(f"{name.partition('.')[2]} {value:.2f} %" for name, value in row["top1_percent"].items())
        table.add_row(row["model"], f"{row['params'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.0f} M", tops or "-")
    _console().print(table)


@app.command(epilog="Example: conam info resnet56_conam")
def info(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    json_file: Json = None,
) -> None:
    """Show what a model is: size, input, where its attention stands, and its weights."""
    from timm.models import split_model_name_tag

    from conam_zoo.attention import ConAM
    from conam_zoo.models.lookup import count_params_and_macs, open_model
    from conam_zoo.weights import load_manifest

    net = open_model(model, pretrained=False, **({} if ":" in model else {"device": "meta"}))
    cfg = net.pretrained_cfg
    params, macs = count_params_and_macs(cfg["architecture"]) if ":" not in model else (_parameters(net), None)
    name, tag = split_model_name_tag(model) if ":" not in model else (model, "")
    entries = load_manifest().entries
    facts: dict[str, Any] = {
        "model": model,
        "parameters": params,
        "macs": macs,
        "input_size": list(cfg["input_size"]),
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "classes": cfg["num_classes"],
        "attention": f"{net.attn_layer}, {net.attn_placement}",
        "sites": {
            n: f"{m.channels} channels, patch side {m.patch_size}"
            for n, m in net.named_modules()
            if isinstance(m, ConAM)
        },
        "features": [f"{f['module']}: {f['num_chs']} channels, 1/{f['reduction']}" for f in net.feature_info],
    }
    weights = [e for n, e in sorted(entries.items()) if n == f"{name}.{tag}" or (not tag and e.arch == name)]
    facts["weights"] = {entry.name: _weight_facts(entry) for entry in weights}
    if _json_only(facts, json_file):
        return
    table = Table(box=None, show_header=False)
    for key, value in facts.items():
        if isinstance(value, dict):
            for inner, text in value.items() or {"none": ""}.items():
                shown = ", ".join(f"{k} {v}" for k, v in text.items()) if isinstance(text, dict) else text
                table.add_row(key, f"{inner}  {shown}")
                key = ""
        elif isinstance(value, list) and value and isinstance(value[0], str):
            table.add_row(key, "\n".join(value))
        else:
            table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    _console().print(table)


@app.command(epilog="Example: conam verify resnet20_conam.cifar10")
def verify(
    model: Annotated[
        str | None, typer.Argument(help="A name such as resnet20_conam.cifar10; all weights if left out.")
    ] = None,
    mirror: Annotated[
        Path | None, typer.Option(help="Check this mirror, which then has to be complete, not $CONAM_ZOO_MIRROR.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Check every local copy of the weights against the manifest; exit code 1 if one is wrong or none is good."""
    from conam_zoo.models.lookup import check_model_name
    from conam_zoo.weights import check_copies, load_manifest

    manifest = load_manifest()
    if model is not None:
        check_model_name(model)
    chosen = [e for n, e in sorted(manifest.entries.items()) if model is None or n == model or e.arch == model]
    if not chosen:
        subject = f"for {model}" if model else "in the manifest"
        raise UserError(f"There are no weights {subject}: 'conam list --pretrained' shows those that there are.")
    rows: list[dict[str, Any]] = [
        {
            "weights": entry.name,
            "place": copy.place,
            "status": copy.status,
            "path": copy.path and str(copy.path),
            "detail": copy.detail,
        }
        for entry in chosen
        for copy in check_copies(entry, namespace=manifest.hub_namespace, mirror=mirror)
    ]
    good = {r["weights"] for r in rows if r["status"] == "good" and (mirror is None or r["place"] == "mirror")}
    failed = any(row["status"] == "wrong" for row in rows) or good != {entry.name for entry in chosen}
    if not _json_only(rows, json_file):
        table = Table(box=None)
        for title in ("weights", "place", "status", "detail"):
            table.add_column(title, overflow="fold")
        for row in rows:
            colour = {"good": "green", "wrong": "red", "missing": "dim"}[row["status"]]
            table.add_row(row["weights"], row["place"], f"[{colour}]{row['status']}[/]", escape(row["detail"]))
        _console().print(table)
    if failed:
        raise typer.Exit(1)


@app.command(epilog="Example: conam mirror /media/stick/weights 'resnet*'; there: conam verify --mirror DIR")
def mirror(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to fill; made if need be.")],
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern, such as 'resnet*' or '*.cifar100'.")] = "*",
) -> None:
    """Fill a directory with verified weights, for machines without network: set CONAM_ZOO_MIRROR to it there."""
    from fnmatch import fnmatch

    from conam_zoo.weights import load_manifest
    from conam_zoo.weights.mirror import fill_mirror

    manifest = load_manifest()
    chosen = [entry for name, entry in sorted(manifest.entries.items()) if fnmatch(name, pattern)]
    if not chosen:
        raise UserError(f"No weights match {pattern!r}: 'conam list --pretrained' shows those that there are.")
    for entry in chosen:
        path, written = fill_mirror(entry, directory, namespace=manifest.hub_namespace)
        _console().print(f"{'written' if written else 'is there'}: {path}", highlight=False)


@app.command(epilog="Example: conam predict resnet20_conam.cifar10 cat.jpg dog.png --output sheet.png")
def predict(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    images: Annotated[list[Path], typer.Argument(help="Pictures of any size, mode and format that Pillow reads.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Write a PNG that shows each picture, its top-5 bars and ConAM's confidence maps."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Classify pictures: the five most probable classes of each."""
    from conam_zoo.analysis.predict import percent
    from conam_zoo.analysis.predict import predict as run
    from conam_zoo.models.lookup import open_model

    predictions = run(open_model(model), images)
    if output is not None:
        from conam_zoo.analysis.sheet import draw_sheet

        draw_sheet(predictions, output, title=model)
    rows = [
        {"image": str(p.path), "top": [{"class": name, "probability": value} for name, value in p.top]}
        for p in predictions
    ]
    if _json_only(rows, json_file):
        return
    table = Table(box=None)
    for title in ("image", "class", "probability", "then"):
        table.add_column(title, justify="right" if title == "probability" else "left", overflow="fold")
    for prediction in predictions:
        (name, value), *others = prediction.top
        then = ", ".join(f"{other} {percent(share)}" for other, share in others)
        table.add_row(prediction.path.name, f"[bold]{name}[/]", f"[bold]{percent(value)}[/]", then)
    _console().print(table)
    if output is not None:
        _console().print(f"written: {output}", highlight=False)


@app.command(epilog="Example: conam train resnet20_conam.cifar10 --data cifar10 --output runs/first --set epochs=1")
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe of the package, such as resnet20_conam.cifar10, or a .toml file.")
    ],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    output: Annotated[Path, typer.Option(help="The run folder: checkpoint, log, curves, and final/ with the weights.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting of the recipe. Repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last whole epoch in the run folder.")
    ] = False,
) -> None:
    """Train a recipe, then evaluate once on the test split.

    The test split is not opened before the end.
    """
    from conam_zoo.training.recipe import load_recipe
    from conam_zoo.training.train import train as run

    run(load_recipe(recipe, settings), data, output, resume=resume, command=shlex.join(["conam", *sys.argv[1:]]))


@app.command(epilog="Example: conam evaluate resnet20_conam.cifar10 --data cifar10 --json scores.json")
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    json_file: Json = None,
) -> None:
    """Measure a model on the test split of its data set, in float32, without test-time augmentation."""
    import torch

    from conam_zoo.datasets import DATASETS
    from conam_zoo.models.lookup import open_model
    from conam_zoo.training.evaluate import evaluate as run
    from conam_zoo.weights import load_manifest

    net = open_model(model).to("cuda" if torch.cuda.is_available() else "cpu")
    cfg = net.pretrained_cfg
    name = f"{cfg['architecture']}.{cfg.get('tag')}"
    known = [facts.name for facts in DATASETS.values() if facts.classes == tuple(cfg.get("label_names") or ())]
    scores, split = run(net, data, known[0] if known else None)
    result = {"model": model, "images": len(split), **asdict(scores)}
    if _json_only(result, json_file):
        return
    entry = load_manifest().entries.get(name) if ":" not in model else None
    table = Table(box=None)
    for title in ("", "measured", *(("manifest",) if entry else ())):
        table.add_column(title, justify="right" if title else "left")
    for key, form in (("top1_percent", ".2f"), ("top5_percent", ".2f"), ("nll", ".4f"), ("ece", ".4f")):
        stated = [format(getattr(entry.metrics, key), form)] if entry else []
        table.add_row(key, format(result[key], form), *stated)
    _console().print(f"{model} on {len(split):,} images of {split.source}", highlight=False)
    _console().print(table)


@app.command(
    rich_help_panel="For those who publish",
    epilog="Example: conam pack runs/resnet20_conam.cifar10 --data cifar10",
)
def pack(
    run: Annotated[Path, typer.Argument(help="A finished run folder, trained on all training images.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
) -> None:
    """Turn a run into weights/NAME.TAG of the checkout and an entry of the manifest."""
    from conam_zoo.analysis.card_picture import draw_card_picture
    from conam_zoo.training.pack import pack as run_pack
    from conam_zoo.weights import find_checkout

    entry = run_pack(run, data)
    checkout = find_checkout() or Path()
    draw_card_picture(checkout / "weights" / entry.name, checkout / "examples" / "photos")
    _console().print(f"{entry.name}: {entry.metrics.top1_percent:.2f} %, {entry.size_bytes:,} bytes as {entry.dtype}")
    tables()


@app.command(
    rich_help_panel="For those who publish",
    epilog="Example: conam publish resnet20_conam.cifar10 --namespace ACCOUNT --dry-run",
)
def publish(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Weights of the manifest, such as X.cifar10.")],
    namespace: Annotated[str, typer.Option(help="The Hugging Face account to publish under.")],
    private: Annotated[bool, typer.Option("--private", help="Create repositories that only the account sees.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all files, show what would be sent.")] = False,
) -> None:
    """Upload weights to the Hugging Face Hub, read them back, and pin their commits in the manifest."""
    import tomllib

    from conam_zoo.training.card import model_card
    from conam_zoo.weights import find_checkout, load_manifest
    from conam_zoo.weights.publish import publish as run_publish

    checkout = find_checkout()
    if checkout is None:
        raise UserError("Weights are published from a checkout of conam_zoo: run from one.")
    manifest_path = checkout / "weights_manifest.json"
    manifest = load_manifest(manifest_path)
    cards = {name: model_card(manifest.entry(name), manifest, namespace) for name in names}
    tag = "v" + tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for done in run_publish(
        names,
        namespace=namespace,
        cards=cards,
        tag=tag,
        manifest_path=manifest_path,
        private=private,
        dry_run=dry_run,
    ):
        state = f"{'published' if done.changed else 'is there'} at {done.revision}" if done.revision else "to be sent"
        files = ", ".join(f"{name} ({size:,} bytes)" for name, size in done.files.items())
        _console().print(f"{done.name}: {state}, {done.hub_id}, tag {done.tag}, {files}", highlight=False)
    if not dry_run:
        tables()


@app.command(rich_help_panel="For those who publish")
def tables() -> None:
    """Rewrite the README's result table and the model cards from the manifest."""
    from conam_zoo.training.tables import rewrite_tables

    changed = rewrite_tables()
    _console().print("\n".join(f"written: {path}" for path in changed) or "All tables are up to date.", highlight=False)


def _console() -> Console:
    return Console(soft_wrap=not sys.stdout.isatty())


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _weight_facts(entry: Any) -> dict[str, Any]:
    return {
        "top1_percent": entry.metrics.top1_percent,
        "dataset": entry.dataset,
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "licence": entry.licence,
        "revision": entry.revision,
    }


def _json_only(result: Any, json_file: Path | None) -> bool:
    """Write the result as JSON if that was asked for; True if nothing else is to be printed."""
    if json_file is None:
        return False
    text = json.dumps(result, indent=2) + "\n"
    if str(json_file) == "-":
        sys.stdout.write(text)
        return True
    from conam_zoo.files import write_text

    write_text(json_file, text)
    return False


def main() -> None:
    """Run the command; bad input ends in one sentence and exit code 2."""
    from conam_zoo.training.engine import NonFiniteLossError
    from conam_zoo.weights import ManifestError, WeightsError

    logging.basicConfig(level=logging.WARNING, format="conam: %(message)s")
    try:
        app(prog_name="conam")
    except (UserError, WeightsError, ManifestError, NonFiniteLossError) as error:
        sys.stderr.write(f"conam: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("conam: interrupted\n")
        sys.exit(130)

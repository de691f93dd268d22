"""Commands on the zoo itself: list, info, verify, mirror."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from timm.models import split_model_name_tag

from conam_zoo import weights
from conam_zoo.cli._shared import Json, Model, app, console, json_only, model_files
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.escape import for_rich
from conam_zoo.files import expand_path, refuse_overwriting
from conam_zoo.layers.confidence import has_confidence
from conam_zoo.models.registry import (
    check_model_name,
    count_params_and_macs,
    model_names,
    open_model,
    size_of,
    weights_sha256,
)
from conam_zoo.weights.folder import read_config, read_folder, weights_file
from conam_zoo.weights.manifest import EVEN
from conam_zoo.weights.resolve import fill_mirror
from conam_zoo.weights.verify import bytes_of


@app.command(
    "list",
    epilog="Examples: conam list 'wide_*' · conam list '*.cifar100' --pretrained · conam list --json -",
)
def list_command(
    pattern: Annotated[str, typer.Argument(help="Beginning of a name, or a pattern such as '*.cifar100'.")] = "*",
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only what has weights.")] = False,
    json_file: Json = None,
) -> None:
    """List the models, and the weights there are for them."""
    entries = weights.load_manifest().entries
    if not set(pattern) & set("*?["):
        pattern += "*"
    rows: list[dict[str, Any]] = []
    for name in model_names():
        tagged = [f"{name}.{tag}" for tag in DATASETS]
        hits = [full for full in (name, *tagged) if fnmatch(full, pattern)]
        top1 = {full: entries[full].metrics.top1_percent for full in tagged if full in entries}
        if not hits or (pretrained and not any(full in hits or name in hits for full in top1)):
            continue
        params, macs = size_of(name)
        rows.append({"model": name, "parameters": params, "macs": macs, "top1_percent": top1})
    if json_only(rows, json_file):
        return
    if not rows:
        raise UserError(f"No model{' with weights' if pretrained else ''} matches {pattern!r}: 'conam list' shows all.")
    table = Table(box=None)
    for title in ("model", "parameters", "MACs", "weights (top-1)"):
        number = title in ("parameters", "MACs")
        table.add_column(title, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        tops = ", ".join(f"{name.partition('.')[2]} {value:.2f} %" for name, value in row["top1_percent"].items())
        table.add_row(row["model"], f"{row['parameters'] / 1e6:.2f} M", f"{row['macs'] / 1e6:.0f} M", tops or "-")
    console().print(table)


@app.command(epilog="Example: conam info resnet56_conam")
def info(model: Model, json_file: Json = None) -> None:
    """Show what a model is: size, input, where its attention stands, and its weights."""
    folder = expand_path(model.removeprefix("local-dir:")) if model.startswith("local-dir:") else None
    refuse_overwriting([json_file], model_files(model))
    if ":" in model:
        net = open_model(model, pretrained=False)
        name, tag = model, ""
        params, macs = sum(p.numel() for p in net.parameters()), None
    else:
        net = open_model(model, pretrained=False, device="meta")
        name, tag = split_model_name_tag(model)
        params, macs = count_params_and_macs(model)
    cfg = net.pretrained_cfg
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
            if has_confidence(m) and hasattr(m, "patch_size")
        },
        "features": [f"{f['module']}: {f['num_chs']} channels, 1/{f['reduction']}" for f in net.feature_info],
    }
    facts["weights"] = {
        n: _weight_facts(e)
        for n, e in sorted(weights.load_manifest().entries.items())
        if n == f"{name}.{tag}" or (not tag and e.arch == name)
    }
    if folder is not None:
        facts["weights"] = {model: _folder_facts(folder)}
    elif model.startswith("hf-hub:"):
        facts["weights"] = {model: {"sha256": weights_sha256(model)}}
    if json_only(facts, json_file):
        return
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if isinstance(value, dict):
            for inner, text in value.items() or {"none": ""}.items():
                shown = ", ".join(f"{k} {_inner(v)}" for k, v in text.items()) if isinstance(text, dict) else text
                table.add_row(key, f"{inner}  {shown}")
                key = ""
        elif isinstance(value, list) and value and isinstance(value[0], str):
            table.add_row(key, "\n".join(value))
        else:
            table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    console().print(table)


@app.command(epilog="Example: conam verify resnet20_conam.cifar10")
def verify(
    model: Annotated[
        str | None, typer.Argument(help="A name such as resnet20_conam.cifar10; all weights if left out.")
    ] = None,
    mirror: Annotated[Path | None, typer.Option(help="Check what is in this mirror, not in $CONAM_ZOO_MIRROR.")] = None,
    json_file: Json = None,
) -> None:
    """Check every local copy of the weights against the manifest; exit code 1 if one is wrong or has no good copy.

    A mirror need hold only some of them, unless a model is named.
    """
    manifest = weights.load_manifest()
    mirror = mirror and expand_path(mirror)
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
            "even_sites": entry.even_sites,
        }
        for entry in chosen
        for copy in weights.check_copies(entry, namespace=manifest.hub_namespace, mirror=mirror)
    ]
    good = {r["weights"] for r in rows if r["status"] == "good" and (mirror is None or r["place"] == "mirror")}
    enough = bool(good) if mirror is not None and model is None else good == {entry.name for entry in chosen}
    failed = any(row["status"] == "wrong" for row in rows) or not enough
    if not json_only(rows, json_file):
        table = Table(box=None)
        for title in ("weights", "place", "status", "detail"):
            table.add_column(title, overflow="fold")
        for row in rows:
            colour = {"good": "green", "wrong": "red", "missing": "dim"}[row["status"]]
            table.add_row(row["weights"], row["place"], for_rich(row["status"], colour), row["detail"])
        console().print(table)
        for entry in chosen:
            if even := entry.even_sites:
                console().print(f"{entry.name}: ConAM gives all patches the same confidence at {', '.join(even)}")
    if failed:
        raise typer.Exit(1)


@app.command(epilog="Example: conam mirror /media/stick/weights 'resnet*'; there: conam verify --mirror DIR")
def mirror(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to fill; made if need be.")],
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern, such as 'resnet*' or '*.cifar100'.")] = "*",
) -> None:
    """Fill a directory with verified weights, for machines without network: set CONAM_ZOO_MIRROR to it there."""
    manifest = weights.load_manifest()
    chosen = [entry for name, entry in sorted(manifest.entries.items()) if fnmatch(name, pattern)]
    if not chosen:
        raise UserError(f"No weights match {pattern!r}: 'conam list --pretrained' shows those that there are.")
    for entry in chosen:
        path, written = fill_mirror(entry, expand_path(directory), namespace=manifest.hub_namespace)
        console().print(f"{'written' if written else 'is there'}: {path}")


def _inner(value: Any) -> str:
    """A fact of a weight in one line; of its liveness, the sites that are even are called so."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{site} {alive:.4f}{' (even)' if alive < EVEN else ''}" for site, alive in value.items())


def _folder_facts(folder: Path) -> dict[str, Any]:
    """What a model folder says of its weights, which are read and checked for it."""
    config = read_config(folder / "config.json")
    dtypes = {str(tensor.dtype) for tensor in read_folder(folder).values() if tensor.is_floating_point()}
    file = folder / weights_file(config, folder)
    return {
        "file": file.name,
        "sha256": config.get("sha256"),
        "size_bytes": bytes_of(file),
        "dtype": ", ".join(sorted(dtypes)).replace("torch.", ""),
    }


def _weight_facts(entry: weights.WeightEntry) -> dict[str, Any]:
    stated = {key: getattr(entry, key) for key in ("dataset", "sha256", "licence", "revision")}
    stated["size_bytes"] = entry.weights_bytes
    alive = dict(entry.liveness) if entry.liveness is not None else "not measured"
    return {"top1_percent": entry.metrics.top1_percent, **stated, "liveness": alive}

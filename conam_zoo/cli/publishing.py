"""Commands for those who publish: pack, publish, tables."""

from pathlib import Path
from typing import Annotated

import typer

from conam_zoo.cli._shared import Data, app, console
from conam_zoo.errors import UserError


@app.command(
    rich_help_panel="For those who publish",
    epilog="Example: conam pack runs/resnet20_conam.cifar10 --data cifar10",
)
def pack(
    run: Annotated[Path, typer.Argument(help="A finished run folder, trained on all training images.")],
    data: Data,
    allow_even_sites: Annotated[
        bool, typer.Option("--allow-even-sites", help="Pack even if a ConAM's confidences are equal for all patches.")
    ] = False,
) -> None:
    """Turn a run into weights/NAME.TAG of the checkout and an entry of the manifest."""
    from conam_zoo.release.documents import our_checkout
    from conam_zoo.release.pack import pack as run_pack
    from conam_zoo.visualize.plots import draw_card_picture

    checkout = our_checkout()
    entry = run_pack(run, data, allow_even_sites=allow_even_sites)
    draw_card_picture(checkout / "weights" / entry.name, checkout / "examples" / "photos")
    console().print(f"{entry.name}: {entry.metrics.top1_percent:.2f} %, {entry.weights_bytes:,} bytes as {entry.dtype}")
    tables()


@app.command(
    rich_help_panel="For those who publish",
    epilog="Example: conam publish resnet20_conam.cifar10 --namespace ACCOUNT --data ~/data --dry-run",
)
def publish(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Weights of the manifest, such as X.cifar10.")],
    namespace: Annotated[str, typer.Option(help="The Hugging Face account to publish under.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Make ONNX files, float32 and int8, calibrated and measured on this data set, or on those of this "
            "folder by name. Without it, those that are published already stay."
        ),
    ] = None,
    no_onnx: Annotated[bool, typer.Option("--no-onnx", help="Publish without ONNX files.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Create repositories that only the account sees.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all files, show what would be sent.")] = False,
) -> None:
    """Upload weights to the Hugging Face Hub, read them back, and pin their commits in the manifest."""
    import tomllib
    from functools import partial

    from conam_zoo.deploy.runtime import need_onnx
    from conam_zoo.release.documents import model_card, our_checkout
    from conam_zoo.release.publish import make_onnx
    from conam_zoo.release.publish import publish as run_publish
    from conam_zoo.weights import load_manifest

    checkout = our_checkout()
    if data is not None and no_onnx:
        raise UserError("--data is for the ONNX files that --no-onnx leaves out: give one of the two.")
    if data is not None:
        need_onnx(", or leave these files out with --no-onnx")
    manifest_path = checkout / "weights_manifest.json"
    manifest = load_manifest(manifest_path)
    if manifest.code_repository is None and not dry_run:
        raise UserError(
            f"The model cards would not say where the code is: set code_repository in {manifest_path} first."
        )
    tag = "v" + tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for done in run_publish(
        names,
        namespace=namespace,
        card=partial(model_card, manifest=manifest, namespace=namespace),
        onnx=partial(make_onnx, data=data) if data is not None else "none" if no_onnx else "published",
        tag=tag,
        manifest_path=manifest_path,
        private=private,
        dry_run=dry_run,
    ):
        state = f"{'published' if done.changed else 'is there'} at {done.revision}" if done.revision else "to be sent"
        files = ", ".join(f"{name} ({size:,} bytes)" for name, size in done.files.items())
        console().print(f"{done.name}: {state}, {done.hub_id}, tag {done.tag}, {files}")
    if not dry_run:
        tables()


@app.command(rich_help_panel="For those who publish")
def tables() -> None:
    """Rewrite the README's result table and the model cards from the manifest."""
    from conam_zoo.release.documents import rewrite_tables

    changed = rewrite_tables()
    console().print("\n".join(f"written: {path}" for path in changed) or "All tables are up to date.")

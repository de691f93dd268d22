"""Documents that are written from the manifest: model cards, tables of results, the recipes' heads."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.escape import for_markdown
from conam_zoo.files import write_text
from conam_zoo.training.recipe import list_recipes, load_recipe
from conam_zoo.weights import Manifest, WeightEntry, find_checkout, load_manifest
from conam_zoo.weights.manifest import EVEN


@dataclass(frozen=True)
class Peer:
    """What others publish for a backbone, as ``peers.toml`` explains; ``with_`` is ``""`` for the plain net."""

    top1_percent: float
    epoch: str  # "last", "best" (chosen on the test images) or "not stated"
    source: str
    url: str
    usual: bool = False
    with_: str = ""

    def to_markdown(self) -> str:
        """The figure with its kind and a link to its source."""
        kind = "epoch not stated" if self.epoch == "not stated" else f"{self.epoch} epoch"
        having = f", with {self.with_}" if self.with_ else ""
        return f"{self.top1_percent:.2f} % ({kind}, [{self.source}]({self.url}){having})"


@cache
def _peers(arch: str, dataset: str) -> list[Peer]:
    document = tomllib.loads(files("conam_zoo.release").joinpath("peers.toml").read_text(encoding="utf-8"))
    return [
        Peer(
            **{"with_" if key == "with" else key: value for key, value in figure.items()},
            url=document["sources"][figure["source"]],
        )
        for figure in document.get(arch.removesuffix("_conam"), {}).get(dataset, [])
    ]


def best_peer(arch: str, dataset: str) -> Peer | None:
    """The highest figure known for the backbone of ``arch``, with any recipe or attention; None if none is known."""
    return max(_peers(arch, dataset), key=lambda peer: peer.top1_percent, default=None)


def like_for_like(arch: str, dataset: str) -> Peer | None:
    """The usual recipe's figure for the backbone of ``arch``: that of its last epoch where it is known, as ours is."""
    usual = [peer for peer in _peers(arch, dataset) if peer.usual]
    return min(usual, key=lambda peer: ("last", "not stated", "best").index(peer.epoch), default=None)


def model_card(entry: WeightEntry, manifest: Manifest, namespace: str | None = None) -> str:
    """The README.md of a Hub repository, in Markdown with the Hub's metadata block.

    It does not name the commit that it is part of: that is known only afterwards, and stands in the manifest.
    ``namespace`` is the account that the weights are about to be published by; None: write what is so now.
    """
    facts = DATASETS[entry.dataset]
    if namespace is None and entry.revision is not None:
        namespace = manifest.hub_namespace
    data = ModelCardData(
        license=entry.licence.lower(),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "conam"],
        datasets=[entry.dataset],
        metrics=["accuracy"],
        model_name=entry.name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=entry.dataset,
                dataset_name=facts.title,
                dataset_split="test",
                metric_type="accuracy",
                metric_name="Top-1 accuracy in percent",
                metric_value=round(entry.metrics.top1_percent, 2),
            )
        ],
    )
    peers = [
        ("usual recipe elsewhere", like_for_like(entry.arch, entry.dataset)),
        ("best known elsewhere", best_peer(entry.arch, entry.dataset)),
    ]
    versions = ", ".join(f"{library} {version}" for library, version in sorted(entry.library_versions.items()))
    card = ModelCard.from_template(
        data,
        template_str=files("conam_zoo.release").joinpath("card_template.md").read_text(encoding="utf-8"),
        entry=entry,
        facts=facts,
        recipe=load_recipe(entry.recipe) if entry.recipe in list_recipes() else None,
        hub_id=entry.hub_id(namespace) if namespace else None,
        code=manifest.code_repository or "OWNER/REPOSITORY",
        published_code=manifest.code_repository is not None,
        peers=[(label, peer.to_markdown()) for label, peer in peers if peer is not None],
        hardware=for_markdown(entry.hardware),
        versions=for_markdown(versions),
        even_below=f"{EVEN:.0%}",
    )
    return str(card).rstrip() + "\n"


def generated_files(checkout: Path) -> dict[Path, str]:
    """What each file that is written from a checkout's manifest has to hold."""
    manifest = load_manifest(checkout / "weights_manifest.json")
    readme = checkout / "README.md"
    text = readme.read_text(encoding="utf-8")
    written = {readme: fill_table(text, "results", result_table(manifest), readme)}
    for name, entry in manifest.entries.items():
        written[checkout / "weights" / name / "README.md"] = model_card(entry, manifest)
    for path in sorted((checkout / "conam_zoo" / "training" / "recipes").glob("*.toml")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        body = "".join(line for line in lines if not line.startswith("#"))
        written[path] = recipe_head(path.stem, manifest) + body
    return written


def result_table(manifest: Manifest) -> str:
    """The README's table of all weights, in Markdown; a top-1 above that of the usual recipe elsewhere is bold."""
    rows = [
        "| weights | top-1 | usual recipe elsewhere | best known elsewhere | NLL | ECE | parameters | MACs "
        "| epochs, hardware | sites with uniform confidences |",
        "| --- | --: | --- | --- | --: | --: | --: | --: | --- | --- |",
    ]
    for name, entry in sorted(manifest.entries.items()):
        metrics = entry.metrics
        usual, best = like_for_like(entry.arch, entry.dataset), best_peer(entry.arch, entry.dataset)
        even = ", ".join(f"`{site}`" for site in entry.even_sites) or "none"
        even = "not measured" if entry.liveness is None else even
        top1 = f"{metrics.top1_percent:.2f} %"
        if usual is not None and metrics.top1_percent > usual.top1_percent:
            top1 = f"**{top1}**"
        rows.append(
            f"| `{name}` | {top1} | {usual.to_markdown() if usual else 'none known'} "
            f"| {best.to_markdown() if best else 'none known'} | {metrics.nll:.3f} | {metrics.ece:.3f} "
            f"| {entry.params / 1e6:.2f} M | {entry.macs / 1e6:.0f} M "
            f"| {entry.epochs}{', with a teacher' if entry.teacher else ''}, {entry.hardware} "
            f"| {even} |"
        )
    return "\n".join(rows) + "\n"


def recipe_head(name: str, manifest: Manifest) -> str:
    """The comment that a recipe opens with: command, hardware, time and result of the shipped weights."""
    entry = next((entry for entry in manifest.entries.values() if entry.recipe == name), None)
    hardware, time, result = "-", "not run yet", "not run yet"
    if entry is not None:
        hardware = entry.hardware
        time = f"{entry.train_minutes:.0f} minutes for {entry.epochs} epochs"
        result = f"{entry.metrics.top1_percent:.2f} % top-1 on the test images, last epoch, seed {entry.seed}"
    dataset = name.split(".")[1]
    other_seed = f" --set seed={entry.seed}" if entry is not None and entry.seed != load_recipe(name).seed else ""
    return (
        f"# Command   conam train {name} --data {dataset} --output runs/{name}{other_seed}\n"
        f"# Hardware  {hardware}\n# Time      {time}\n# Result    {result}\n"
    )


def fill_table(text: str, name: str, table: str, path: Path, command: str = "conam tables") -> str:
    """A Markdown text with a table between the markers of that name and of the command that writes it.

    ``path`` is what the ``UserError`` about a missing marker calls the document.
    """
    begin, end = f"<!-- {name}: written by `{command}` -->\n", f"<!-- end of {name} -->\n"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UserError(f"{path} has no place for its table {name}: put the lines {begin}{end} back.")
    return f"{before}{begin}\n{table.strip()}\n\n{end}{after}"


def rewrite(texts: dict[Path, str]) -> list[Path]:
    """Write the files whose text is another; returns their paths."""
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        write_text(path, texts[path])
    return changed


def rewrite_tables() -> list[Path]:
    """Rewrite the generated files that are out of date; returns their paths."""
    return rewrite(generated_files(our_checkout()))


def our_checkout() -> Path:
    """The checkout this package runs from; ``UserError`` if it is installed."""
    checkout = find_checkout()
    if checkout is None:
        raise UserError("Weights, their manifest and tables belong to a checkout of conam_zoo: run from one.")
    return checkout

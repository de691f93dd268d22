"""How much a trained net uses its ConAM modules: its accuracy when their confidences are replaced.

Nothing is trained. Each change keeps the weights of the net and replaces the factors of one module, or of every one:

- ``even``: every patch has the confidence 1/P, which does not depend on the picture;
- ``exchanged``: the confidences of the image before it in a set sorted by class, so nearly always of another image of
  its own class: they keep what these share, such as a preference for the centre;
- ``across``: the same in an order in which neighbours are of different classes, as far as there are such;
- ``shuffled``: the image's own confidences, assigned to its patches in random order;
- ``removed``: the map passes unchanged.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conam_zoo.data import ImageSplit, normalize, read_split
from conam_zoo.deploy.export import dataset_of
from conam_zoo.errors import UserError
from conam_zoo.layers.conam import ConAM
from conam_zoo.layers.conam_equations import recalibrate
from conam_zoo.layers.confidence import confidence_maps
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import open_model, weights_sha256
from conam_zoo.training.engine import score
from conam_zoo.training.evaluate import logits_on
from conam_zoo.training.run_folder import describe_environment
from experiments.speed.record import command_today

# What replaces the confidences, with the heading of its column.
CHANGES = {
    "even": "even",
    "exchanged": "exchanged within a class",
    "across": "exchanged across classes",
    "shuffled": "shuffled",
    "removed": "removed",
}
EVERY_SITE = "every site"


def _replaced(confidence: Tensor, change: str, generator: torch.Generator) -> Tensor:
    """The confidences that replace a batch's own: (N, rows, columns) -> the same."""
    count = confidence[0].numel()
    if change == "even":
        return torch.full_like(confidence, 1 / count)
    if change in ("exchanged", "across"):  # the order of the images decides between the two
        return confidence.roll(1, dims=0)
    if change == "shuffled":
        order = torch.rand(len(confidence), count, generator=generator).argsort(1).to(confidence.device)
        return confidence.flatten(1).gather(1, order).view_as(confidence)
    return torch.zeros_like(confidence)  # removed


@contextmanager
def knocked_out(model: nn.Module, sites: Collection[str], change: str, seed: int = 0) -> Iterator[None]:
    """Replace the confidences of some ConAM modules of a net, given by name, inside the ``with`` block.

    ``change`` is one of ``CHANGES``. Exchanged confidences, within a class or across, are those of the image before in
    the batch; ``seed`` is for ``shuffled``.
    """
    generator = torch.Generator().manual_seed(seed)

    def hook(module: ConAM, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs
        return recalibrate(x, _replaced(module.confidence(x), change, generator), module.patch_size)

    handles = [model.get_submodule(site).register_forward_hook(hook) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_knockout(
    model: StagedClassifier, split: ImageSplit, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Accuracy of a net as it was trained, and with each change at each site and at every site.

    It gives ``images``, how many there are, ``unchanged`` (``top1_percent`` and ``nll``), and ``sites``: for each one
    ``site``, ``largest_percent`` (the mean over the images of the largest confidence; None for all sites together), and
    for each change ``top1_percent``, ``nll``, and how many right answers were ``lost`` and ``gained``. A net without
    ConAM is refused.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, ConAM)]
    if not names:
        raise UserError("The net has no ConAM whose confidences could be replaced: choose one with attn_layer='conam'.")

    def scores(split: ImageSplit) -> tuple[dict[str, float], Tensor]:
        logits, labels = logits_on(model, split).cpu(), split.labels.cpu()
        found = score(logits, labels)
        return {"top1_percent": found.top1_percent, "nll": found.nll}, logits.argmax(1) == labels

    split = split.select(split.labels.argsort(stable=True))
    across = _across_classes(split.labels)
    progress("as it was trained")
    unchanged, right = scores(split)
    largest = _largest_percent(model, split)
    rows = []
    for site in [EVERY_SITE, *names] if len(names) > 1 else names:
        row: dict[str, Any] = {"site": site, "largest_percent": largest.get(site)}
        for change in CHANGES:
            progress(f"{site}, {change}")
            order = across if change == "across" else torch.arange(len(split))
            with knocked_out(model, names if site == EVERY_SITE else [site], change):
                measured, now = scores(split.select(order))
            before = right[order]
            row[change] = {**measured, "lost": int((before & ~now).sum()), "gained": int((now & ~before).sum())}
        rows.append(row)
    return {"images": len(split), "unchanged": unchanged, "sites": rows}


def _across_classes(labels: Tensor) -> Tensor:
    """An order of sorted labels (N,) in which neighbours are of different classes, as far as there are such."""
    counts = labels.unique_consecutive(return_counts=True)[1]
    places = torch.cat([torch.arange(count) for count in counts.tolist()])  # of each image within its class
    return places.argsort(stable=True)


def _largest_percent(model: StagedClassifier, split: ImageSplit, batch_size: int = 500) -> dict[str, float]:
    """Mean over the images of the largest confidence at each site, in percent."""
    cfg = model.pretrained_cfg
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    for batch in split.images.split(batch_size):
        _, maps = confidence_maps(model.eval(), normalize(batch.to(device), cfg["mean"], cfg["std"]))
        for site, confidence in maps.items():
            sums[site] = sums.get(site, 0.0) + confidence.flatten(1).amax(1).double().sum().item()
    return {site: 100 * total / len(split) for site, total in sums.items()}


def benchmark_knockout(
    models: Sequence[str], data: str | Path, *, command: str = "", progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure several nets on the test splits of their data sets; nothing is chosen by the result.

    ``models`` are names of nets with weights, or ``local-dir:FOLDER``. The result is what ``results/knockout*.json``
    hold: ``what``, ``command``, the environment, and for each of ``models`` its ``model``, the ``sha256`` of its
    weights, and what ``measure_knockout`` gives.
    """
    measured = []
    for name in models:
        net = open_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
        known = dataset_of(net)
        split = read_split(data, "test", known, image_size=None if known else net.pretrained_cfg["input_size"][1])
        found = measure_knockout(net, split, lambda text, name=name: progress(f"{name}: {text}"))  # type: ignore[misc]
        measured.append({"model": name, "sha256": weights_sha256(name), **found})
    rounded = json.loads(json.dumps(measured), parse_float=lambda text: round(float(text), 4))
    return {"what": "knockout", "command": command, **describe_environment(), "models": rounded}


def knockout_table(document: dict[str, Any], replaced: Collection[str] = ()) -> str:
    """The measurements as a Markdown table, with the sentence that says where they were made.

    Nets that are ``replaced`` since are marked.
    """
    where = f"`{command_today(document['command'])}` on {document['hardware']}."
    rows = [row for model in document["models"] for row in model["sites"]]
    changes = [change for change in CHANGES if any(change in row for row in rows)]
    counted = any("lost" in row[change] for row in rows for change in changes if change in row)
    lines = [
        f"{where} Top-1 in percent on the test images, and in brackets the difference to the net as it was trained"
        + (", with the 95 % interval that follows from the images whose answer changed." if counted else "."),
        "",
        "| model | as trained | replaced at | largest confidence | "
        + " | ".join(CHANGES[change] for change in changes)
        + " |",
        "| --- | --: | --- | --: | " + " | ".join(["--:"] * len(changes)) + " |",
    ]
    for model in document["models"]:
        base = model["unchanged"]["top1_percent"]
        for index, row in enumerate(model["sites"]):
            name = f"`{model['model']}`{', earlier weights' if model['model'] in replaced else ''}"
            first = f"{name} | {base:.2f}" if index == 0 else " | "
            largest = "-" if row["largest_percent"] is None else f"{row['largest_percent']:.1f} %"
            cells = [_cell(row[change], base, model["images"]) if change in row else "-" for change in changes]
            site = row["site"] if row["site"] == EVERY_SITE else f"`{row['site'].removesuffix('.attn')}`"
            lines.append(f"| {first} | {site} | {largest} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any], base: float, images: int) -> str:
    difference = f"{found['top1_percent'] - base:+.2f}"
    if "lost" in found:  # a paired comparison: only images whose answer became right or wrong tell the nets apart
        lost, gained = found["lost"], found["gained"]
        deviation = math.sqrt(lost + gained - (lost - gained) ** 2 / images)
        difference += f" ± {100 * 1.96 * deviation / images:.2f}"
    return f"{found['top1_percent']:.2f} ({difference})"

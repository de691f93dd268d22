"""A net as one file for other runtimes: ONNX (``.onnx``) or ``torch.export`` (``.pt2``), checked before it is in place.

The graph ends in logits, never in a softmax. Sources: https://docs.pytorch.org/docs/stable/onnx_export.html and
https://docs.pytorch.org/docs/stable/export.html
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conam_zoo.deploy.quantize import quantize
from conam_zoo.deploy.runtime import FORMAT, need_onnx, open_session
from conam_zoo.errors import UserError
from conam_zoo.files import write_atomically
from conam_zoo.layers.conam import ConAM
from conam_zoo.models import StagedClassifier

__all__ = ["EXPORT_OPSET", "Exported", "export"]

EXPORT_OPSET = 18
CHECKED_BATCHES = (1, 7)
TOLERANCE = 1e-3  # of the largest logit in size: float32, in another order of additions


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote.

    Attributes:
        path: The file.
        size_bytes: Its size.
        inputs: Name, shape and type of the input, in words.
        outputs: Names of the outputs.
        largest_difference: Between its outputs and PyTorch's on batches of 1 and 7 images; of an int8 file, that of its
            logits to the float32 net's.
    """

    path: Path
    size_bytes: int
    inputs: str
    outputs: tuple[str, ...]
    largest_difference: float


class _Graph(nn.Module):
    """What is exported: normalisation if it is wanted, the net, and the confidences if they are wanted."""

    scale: Tensor
    offset: Tensor

    def __init__(self, net: StagedClassifier, pixels: bool, sites: Sequence[str]) -> None:
        super().__init__()
        self.net, self.pixels, self.sites = net, pixels, sites
        cfg = net.pretrained_cfg
        mean, std = (torch.tensor(cfg[key], dtype=torch.float64) for key in ("mean", "std"))
        self.register_buffer("scale", (1 / (255 * std)).float().view(-1, 1, 1))
        self.register_buffer("offset", (-mean / std).float().view(-1, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps: dict[str, Tensor] = {}

        def keep(site: str, module: ConAM, inputs: tuple[Tensor]) -> None:
            maps[site] = module.confidence(inputs[0])

        modules = dict(self.net.named_modules())
        hooks = [modules[site].register_forward_pre_hook(partial(keep, site)) for site in self.sites]
        try:
            x = image.permute(0, 3, 1, 2).float() * self.scale + self.offset if self.pixels else image
            logits = self.net(x)
        finally:
            for hook in hooks:
                hook.remove()
        return (logits, *(maps[site] for site in self.sites))


def export(
    model: StagedClassifier,
    output: str | Path,
    *,
    pixels: bool = False,
    confidence: bool = False,
    opset: int = EXPORT_OPSET,
    calibration: Tensor | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a net as ``.onnx`` or ``.pt2``, by the suffix of ``output``; the batch size stays free.

    The input is ``image``: (N, 3, H, W) float32, normalised; with ``pixels`` (N, H, W, 3) uint8, 0 to 255. The first
    output is ``logits``, (N, classes) float32; with ``confidence`` one more follows for each ConAM, in order of
    execution, ``confidence.SITE`` (N, rows, columns). An ONNX file says in its metadata what it is.

    Args:
        model: A model of this package; it is left as it is.
        output: The file. It appears only once it has been run and compared with ``model``.
        pixels: Take raw pixels, with the normalisation inside.
        confidence: Give the confidences as well.
        opset: ONNX operator set.
        calibration: Training images, uint8 (N, H, W, 3): quantise statically to int8, calibrated on them.
        facts: More metadata for an ONNX file, such as ``name``, ``sha256`` or ``top1_percent``.

    Raises:
        UserError: If the suffix is neither, a package is missing, or the file does not compute what the model does.
    """
    output = Path(output)
    kind = output.suffix.lower()
    if kind not in (".onnx", ".pt2"):
        raise UserError(f"The output is {str(output)!r}, but its suffix must be .onnx or .pt2.")
    if kind == ".pt2" and calibration is not None:
        raise UserError(f"{output} cannot be int8: only .onnx files are quantised.")
    if kind == ".onnx":
        need_onnx()
    net = copy.deepcopy(model).cpu().float().eval()
    sites = [name for name, module in net.named_modules() if isinstance(module, ConAM)] if confidence else []
    graph = _Graph(net, pixels, sites).eval()
    names = ("logits", *(f"confidence.{site}" for site in sites))
    differences: list[float] = []

    def write(temporary: Path) -> None:
        if kind == ".pt2":
            torch.export.save(_traced(graph), temporary)
            differences.append(_compare(graph, torch.export.load(temporary).module(), names, output))
            return
        _write_onnx(graph, temporary, names, opset, _metadata(model, pixels, calibration is not None, facts or {}))
        differences.append(_compare(graph, _runner(temporary), names, output))
        if calibration is not None:
            quantize(temporary, _input_of(graph, calibration))
            differences[:] = [_difference_int8(graph, _runner(temporary), calibration, output)]

    write_atomically(output, write)
    cfg = model.pretrained_cfg
    height, width = cfg["input_size"][1:]
    words = f"image, (N, {height}, {width}, 3) uint8" if pixels else f"image, (N, 3, {height}, {width}) float32"
    return Exported(output, output.stat().st_size, words, names, differences[0])


def _example(graph: _Graph, count: int) -> Tensor:
    """Random images as the graph takes them; the same each time."""
    channels, height, width = graph.net.pretrained_cfg["input_size"]
    drawn = torch.randint(0, 256, (count, height, width, channels), generator=torch.Generator().manual_seed(count))
    return _input_of(graph, drawn.to(torch.uint8))


def _input_of(graph: _Graph, images: Tensor) -> Tensor:
    """uint8 images (N, H, W, 3) as the graph takes them."""
    if graph.pixels:
        return images
    return images.permute(0, 3, 1, 2).float().contiguous() * graph.scale + graph.offset


def _traced(graph: _Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(graph, (_example(graph, 2),), dynamic_shapes={"image": {0: batch}})


def _write_onnx(graph: _Graph, path: Path, names: Sequence[str], opset: int, metadata: Mapping[str, str]) -> None:
    import onnx

    program = torch.onnx.export(
        _traced(graph),
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["image"],
        output_names=list(names),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, str(path))


def _metadata(model: StagedClassifier, pixels: bool, int8: bool, facts: Mapping[str, Any]) -> dict[str, str]:
    cfg = model.pretrained_cfg
    try:
        package = version("conam-zoo")
    except PackageNotFoundError:
        package = "unknown"
    stated = {
        "format": FORMAT,
        "conam_zoo_version": package,
        "architecture": cfg["architecture"],
        "tag": cfg.get("tag") or "",
        "classes": list(cfg.get("label_names") or ()),
        "num_classes": model.num_classes,
        "input_size": list(cfg["input_size"]),
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "layout": "NHWC uint8" if pixels else "NCHW float32",
        "interpolation": cfg["interpolation"],
        "crop_pct": cfg["crop_pct"],
        "precision": "int8" if int8 else "float32",
        "licence": cfg.get("license") or "",
        **facts,
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in stated.items()}


def _runner(path: Path) -> Any:
    session = open_session(path)
    return lambda images: tuple(torch.from_numpy(out) for out in session.run(None, {"image": images.numpy()}))


@torch.no_grad()
def _compare(graph: _Graph, run: Any, names: Sequence[str], output: Path) -> float:
    """Largest difference on a batch of each size, of all outputs.

    Raises:
        UserError: If it is too large.
    """
    largest = 0.0
    for count in CHECKED_BATCHES:
        images = _example(graph, count)
        for name, found, wanted in zip(names, run(images), graph(images), strict=True):
            if found.shape != wanted.shape:
                raise UserError(f"{output} is not written: its {name} has the shape {tuple(found.shape)}.")
            difference = (found - wanted).abs().max().item()
            if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
                raise UserError(
                    f"{output} is not written: its {name} differs from PyTorch's by {difference:.2g} on a batch of "
                    f"{count}. Try another --opset."
                )
            largest = max(largest, difference)
    return largest


@torch.no_grad()
def _difference_int8(graph: _Graph, run: Any, calibration: Tensor, output: Path) -> float:
    """Largest difference of the logits on calibration images, whose classes have to stay the same on nine in ten.

    Raises:
        UserError: If they do not.
    """
    largest = 0.0
    agreed = total = 0
    for count in CHECKED_BATCHES * 10:
        images = _input_of(graph, calibration[total : total + count])
        found, wanted = run(images)[0], graph(images)[0]
        largest = max(largest, (found - wanted).abs().max().item())
        agreed, total = agreed + int((found.argmax(1) == wanted.argmax(1)).sum()), total + len(images)
        if total >= len(calibration):
            break
    if agreed < 0.9 * total:
        raise UserError(
            f"{output} is not written: after quantisation it gives {agreed} of {total} training images the class that "
            "the float32 net gives them. Leave --int8 out."
        )
    return largest

"""A net as one file for other runtimes: ONNX (``.onnx``) or ``torch.export`` (``.pt2``), checked before it is in place.

The graph ends in logits, never in a softmax. In int8 files convolutions, the joins of branches and the classifier
compute in int8, weights with one scale for each channel; ConAM stays in float32, because its logits are unbounded.
Sources: https://docs.pytorch.org/docs/stable/onnx_export.html, https://docs.pytorch.org/docs/stable/export.html and
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conam_zoo.data import read_split
from conam_zoo.datasets import DATASETS
from conam_zoo.deploy.runtime import FORMAT, need_onnx, open_classifier, open_session
from conam_zoo.errors import UserError
from conam_zoo.files import expand_path, write_atomically
from conam_zoo.layers.confidence import has_confidence, recorded_confidences
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import check_takes_rgb, open_model, weights_sha256
from conam_zoo.training.evaluate import check_preparation, evaluate, evaluate_on, run_folder_of
from conam_zoo.weights import load_manifest

EXPORT_OPSET = 18
CHECKED_BATCHES = (1, 7)
TOLERANCE = 1e-3  # of the largest logit in size: float32, in another order of additions
CALIBRATION_IMAGES = 500
CALIBRATION_BATCH = 50
QUANTISED = ("Conv", "Gemm", "Add")


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote."""

    path: Path
    size_bytes: int
    inputs: str  # name, shape and type of the input, in words
    outputs: tuple[str, ...]  # their names
    largest_difference: float  # from PyTorch's outputs; of an int8 file, of its logits from the float32 net's


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
        x = image.permute(0, 3, 1, 2).float() * self.scale + self.offset if self.pixels else image
        with recorded_confidences(self.net, self.sites) as maps:
            logits = self.net(x)
        return (logits, *(maps[site] for site in self.sites))

    def inputs_of(self, images: Tensor) -> Tensor:
        """uint8 images (N, H, W, 3) as the graph takes them."""
        return images if self.pixels else images.permute(0, 3, 1, 2).float().contiguous() * self.scale + self.offset

    def example(self, count: int) -> Tensor:
        """Random images as the graph takes them; the same each time."""
        channels, height, width = self.net.pretrained_cfg["input_size"]
        generator = torch.Generator().manual_seed(count)
        return self.inputs_of(torch.randint(0, 256, (count, height, width, channels), generator=generator).byte())


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
    execution, ``confidence.SITE`` (N, rows, columns). An ONNX file says in its metadata what it is, with ``facts`` such
    as ``name``, ``sha256`` or, unless it is int8, ``top1_percent``. With ``calibration``, training images as uint8
    (N, H, W, 3), it is quantised to int8. The file appears only once it has been run and compared with ``model``.
    """
    output = expand_path(output)
    kind = _check_kind(output, opset, int8=calibration is not None)
    if model.in_chans != (stated := model.pretrained_cfg["input_size"][0]):
        raise UserError(f"The net takes {model.in_chans} channels, but its input_size states {stated}: correct that.")
    net = copy.deepcopy(model).cpu().float().eval()
    sites = [name for name, module in net.named_modules() if has_confidence(module)] if confidence else []
    if confidence and not sites:
        raise UserError(f"A net with attn_layer {net.attn_layer!r} has no confidences: export it without them.")
    graph = _Graph(net, pixels, sites).eval()
    names = ("logits", *(f"confidence.{site}" for site in sites))
    difference = 0.0

    def write(temporary: Path) -> None:
        nonlocal difference
        if kind == ".pt2":
            torch.export.save(_traced(graph), temporary)
            difference = _compare(graph, torch.export.load(temporary).module(), names, output)
            return
        torch.onnx.export(
            _traced(graph),
            (),
            temporary,
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=list(names),
            external_data=False,
            verbose=False,
        )
        _check_opset(temporary, opset, output)
        difference = _compare(graph, _runner(temporary), names, output)
        if calibration is not None:
            _quantize(temporary, graph.inputs_of(calibration))
        _write_metadata(temporary, _metadata(model, pixels, calibration is not None, facts or {}))
        if calibration is not None:
            difference = _difference_int8(graph, _runner(temporary), calibration, output)

    write_atomically(output, write)
    channels, height, width = model.pretrained_cfg["input_size"]
    shape = f"(N, {height}, {width}, {channels}) uint8" if pixels else f"(N, {channels}, {height}, {width}) float32"
    words = f"image, {shape}"
    return Exported(output, output.stat().st_size, words, names, difference)


def _check_kind(output: Path, opset: int, *, int8: bool) -> str:
    """The suffix of an output that can be written as it is wanted."""
    kind = output.suffix.lower()
    if kind not in (".onnx", ".pt2"):
        raise UserError(f"The output is {str(output)!r}, but its suffix must be .onnx or .pt2.")
    if kind == ".onnx":
        need_onnx()
        from onnx.defs import onnx_opset_version

        if opset > onnx_opset_version():
            raise UserError(
                f"The operator set is {opset}, but the installed onnx knows them up to {onnx_opset_version()}: choose "
                "one of these, or update onnx."
            )
    elif int8:
        raise UserError(f"{output} cannot be int8: only .onnx files are quantised.")
    elif opset != EXPORT_OPSET:
        raise UserError(f"{output} has no ONNX operator set: leave opset {opset} out.")
    return kind


def _check_opset(file: Path, opset: int, output: Path) -> None:
    """Refuse a file of another operator set: where PyTorch fails to convert it, it only logs that."""
    import onnx

    found = {each.domain: each.version for each in onnx.load(str(file)).opset_import}.get("")
    if found != opset:
        raise UserError(f"{output} is not written, because its conversion to operator set {opset} failed: try another.")


def _traced(graph: _Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(graph, (graph.example(2),), dynamic_shapes={"image": {0: batch}})


def _write_metadata(path: Path, metadata: dict[str, str]) -> None:
    import onnx

    proto = onnx.load(str(path))
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, str(path))


def _metadata(model: StagedClassifier, pixels: bool, int8: bool, facts: Mapping[str, Any]) -> dict[str, str]:
    cfg = model.pretrained_cfg
    try:
        package = version("conam-zoo")
    except PackageNotFoundError:
        package = "unknown"
    names = cfg.get("label_names") or ()  # with a new head they are those of the old one
    stated = {
        "format": FORMAT,
        "conam_zoo_version": package,
        "architecture": cfg["architecture"],
        "tag": cfg.get("tag") or "",
        "classes": list(names if len(names) == model.num_classes else ()),
        "num_classes": model.num_classes,
        "input_size": list(cfg["input_size"]),
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "layout": "NHWC uint8" if pixels else "NCHW float32",
        "interpolation": cfg["interpolation"],
        "crop_pct": cfg["crop_pct"],
        "crop_mode": cfg.get("crop_mode") or "center",
        "precision": "int8" if int8 else "float32",
        "licence": cfg.get("license") or "",
        **{key: value for key, value in facts.items() if not (int8 and key == "top1_percent")},
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in stated.items()}


def _runner(path: Path) -> Any:
    session = open_session(path)
    return lambda images: tuple(torch.from_numpy(out) for out in session.run(None, {"image": images.numpy()}))


@torch.no_grad()
def _compare(graph: _Graph, run: Any, names: Sequence[str], output: Path) -> float:
    """Largest difference of all outputs on a batch of each size; too large a one is refused."""
    largest = 0.0
    for count in CHECKED_BATCHES:
        images = graph.example(count)
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
    """Largest difference of the logits on calibration images, whose classes have to stay the same on nine in ten."""
    largest = 0.0
    agreed = total = 0
    for count in CHECKED_BATCHES * 10:
        images = graph.inputs_of(calibration[total : total + count])
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


def _quantize(path: Path, images: Tensor) -> None:
    """Replace a float32 ONNX file by its int8 form, calibrated on images as the file takes them."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.split(CALIBRATION_BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    with TemporaryDirectory() as scratch:
        fused = Path(scratch) / "fused.onnx"
        logging.disable(logging.WARNING)
        try:
            quant_pre_process(str(path), str(fused), skip_symbolic_shape=True)
            quantize_static(
                str(fused),
                str(path),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_sums_with_constants(onnx.load(str(fused)).graph),
            )
        finally:
            logging.disable(logging.NOTSET)


def _sums_with_constants(graph: Any) -> list[str]:
    """Names of the sums of a map and a constant; what is left are the joins of two branches.

    ConAM's perceptron adds its biases, and the scale of a patch is one plus its confidence: both stay in float32.
    """
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "Add" and constants.intersection(node.input)]


def export_named(
    name: str,
    output: Path,
    *,
    data: str | Path | None = None,
    int8: bool = False,
    pixels: bool = False,
    confidence: bool = False,
    opset: int = EXPORT_OPSET,
) -> Iterator[str]:
    """``export`` of a model by its name, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.

    With ``int8``, training images of ``data`` calibrate it, and its test images, or the images that the report of a
    fine-tuned net is on, give top-1 before and after. What it yields are lines for a person.
    """
    if int8 and data is None:
        raise UserError("--int8 is calibrated on training images: say where they are with --data.")
    if data is not None and not int8:
        raise UserError("--data is for the calibration of --int8: add --int8, or leave --data out.")
    _check_kind(expand_path(output), opset, int8=int8)
    model = open_model(name)
    dataset = dataset_of(model)
    calibration = calibration_images(model, data, dataset) if data is not None else None
    done = export(
        model,
        output,
        pixels=pixels,
        confidence=confidence,
        opset=opset,
        calibration=calibration,
        facts=_facts(name, model),
    )
    yield f"written: {done.path}, {done.size_bytes:,} bytes"
    yield f"input: {done.inputs}; outputs: {', '.join(done.outputs)}"
    if calibration is None or data is None:
        yield f"checked: at most {done.largest_difference:.1e} from PyTorch's outputs on batches of 1 and 7"
        return
    yield f"calibrated on {len(calibration):,} images; logits within {done.largest_difference:.2f} of the net's"
    try:
        before = evaluate(model, data, dataset, run=run_folder_of(name))
    except UserError as error:
        yield f"top-1 not measured: {error}"
        return
    after = evaluate_on(open_classifier(str(output)), before.split)
    which = "" if before.part == "all" else f"{before.part} "
    yield (
        f"top-1 on {len(before.split):,} {which}images: {before.scores.top1_percent:.2f} % before, "
        f"{after.top1_percent:.2f} % in int8"
    )
    yield from before.notes


def dataset_of(model: StagedClassifier) -> str | None:
    """The published data set whose classes a model has, or None."""
    names = tuple(model.pretrained_cfg.get("label_names") or ())
    return next((facts.name for facts in DATASETS.values() if facts.classes == names), None)


def calibration_images(model: StagedClassifier, data: str | Path, dataset: str | None) -> Tensor:
    """Training images, the same ones each time: uint8 (N, H, W, 3)."""
    check_takes_rgb(model)
    check_preparation(model)
    size = model.pretrained_cfg["input_size"][1]
    images = read_split(data, "train", dataset, image_size=size).images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    return images[chosen]


def _facts(name: str, model: StagedClassifier) -> dict[str, Any]:
    """Where the weights came from, for the file's metadata."""
    cfg = model.pretrained_cfg
    facts: dict[str, Any] = {"name": cfg["architecture"] if name.startswith("local-dir:") else name}
    if sha256 := weights_sha256(name):
        facts["sha256"] = sha256
    entry = load_manifest().entries.get(f"{cfg['architecture']}.{cfg.get('tag')}")
    if ":" in name or entry is None:
        return facts
    return facts | {"name": entry.name, "top1_percent": entry.metrics.top1_percent}

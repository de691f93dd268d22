"""Shipped weights as ONNX files: the top-1 of each file, and its speed compared with eager PyTorch.

The two are measured by commands of their own, since speed needs a machine that does nothing else.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from conam_zoo.files import write_text
from conam_zoo.models.registry import open_model
from conam_zoo.release.publish import make_onnx, write_onnx
from conam_zoo.training.evaluate import evaluate
from conam_zoo.training.run_folder import describe_environment
from conam_zoo.weights import ONNX_FILES, Manifest, load_manifest
from experiments.speed.inference import mode_call, session_call
from experiments.speed.measure import check_least, time_in_turns
from experiments.speed.record import BenchmarkRecord, Row, command_today, make_record, read_record, read_rows, time_rows

EAGER, FLOAT32, INT8 = "eager fp32", "onnx fp32", "onnx int8"
BATCH_SIZES = (1, 64)


def read_accuracy(path: Path) -> dict[str, dict[str, Any]]:
    """For each weights what ``add_accuracy`` measured; empty if there is no such file."""
    return read_rows(path, "weights") or {}


def add_accuracy(path: Path, name: str, data: Path, weights: Path = Path("weights")) -> dict[str, Any]:
    """Measure shipped weights and their ONNX files on the whole test split, and put that into a JSON file.

    What the file says of other weights stays. ``data`` is their data set, or a folder of data sets by name; ``weights``
    is the folder of all weights. What was measured is returned, top-1 in percent.
    """
    entry = load_manifest().entry(name)
    made = make_onnx(entry, weights / name, data)
    done = evaluate(open_model(f"local-dir:{weights / name}"), data, entry.dataset, part="test")
    float32, int8 = (made[file][0] for file in ONNX_FILES)
    environment = describe_environment()
    versions = environment["library_versions"] | {"onnxruntime": version("onnxruntime")}
    row = {
        "sha256": entry.sha256,
        "images": len(done.split),
        "top1_percent": {
            EAGER: round(done.scores.top1_percent, 4),
            FLOAT32: float32.top1_percent,
            INT8: int8.top1_percent,
        },
        "size_bytes": {"safetensors": entry.weights_bytes, FLOAT32: float32.size_bytes, INT8: int8.size_bytes},
        "hardware": environment["hardware"],  # int8 sums may saturate on processors without VNNI
        "library_versions": versions,
    }
    rows = read_accuracy(path) | {name: row}
    write_text(path, json.dumps({"weights": dict(sorted(rows.items()))}, indent=2) + "\n")
    return row


def benchmark_onnx(
    names: Sequence[str],
    data: Path,
    *,
    batch: Sequence[int] = BATCH_SIZES,
    threads: int = 2,
    repeats: int = 15,
    quick: bool = False,
    weights: Path = Path("weights"),
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> BenchmarkRecord:
    """Time shipped weights in eager PyTorch (channels_last) and as ONNX files, on the CPU, all in turns.

    ``data`` holds their data sets by name, to calibrate int8. ``threads`` are those of PyTorch and of ONNX Runtime.
    ``weights`` is the folder of all weights.
    """
    check_least(batch=(min(batch, default=0), 1), threads=(threads, 1), repeats=(repeats, 1))
    if quick:
        names, batch, repeats = names[:1], (2,), 2
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    rows: list[Row] = []
    for name in names:
        entry = load_manifest().entry(name)
        progress(f"{name}: exporting")
        net = open_model(f"local-dir:{weights / name}").to(memory_format=torch.channels_last)
        with tempfile.TemporaryDirectory() as folder:
            float32, int8 = write_onnx(entry, weights / name, data, Path(folder))
            for count in batch:
                progress(f"{name}, batch {count}")
                images = torch.randn(count, *entry.input_size, generator=torch.Generator().manual_seed(0))
                images = images.to(memory_format=torch.channels_last)
                calls = {
                    EAGER: mode_call(net, images, EAGER),
                    FLOAT32: session_call(float32, images),
                    INT8: session_call(int8, images),
                }
                settled = time_in_turns(
                    calls, repeats=repeats, device=device, settle=1, min_seconds=0.0 if quick else 0.05
                )
                facts = {way: {"images_per_second": count / median(times)} for way, times in settled.items()}
                group = {"weights": name, "batch": count}
                rows += time_rows(settled, group=group, reference=EAGER, facts=facts)
    settings = {"weights": list(names), "batch": list(batch), "repeats": repeats, "quick": quick}
    versions = {"onnxruntime": version("onnxruntime")}
    return make_record("onnx-speed", rows, settings=settings, command=command, versions=versions)


def onnx_table(manifest: Manifest, accuracy: Path, speed: Path) -> str:
    """Top-1 and speed of all shipped weights as ONNX files, in Markdown.

    ``accuracy`` is the file of ``add_accuracy`` and ``speed`` the record of ``benchmark_onnx``, each if it is there.
    What was measured of weights that the manifest does not have is left out, and so is the top-1 of other files of
    those that it has; speeds go by the name alone.
    """
    measured = {
        name: row
        for name, row in read_accuracy(accuracy).items()
        if name in manifest.entries and manifest.entry(name).sha256 == row["sha256"]
    }
    record = read_record(speed) if speed.is_file() else None
    timed = {(row.group["weights"], row.group["batch"], row.name): row for row in (record.rows if record else ())}
    titles = ["weights", "top-1, PyTorch", "ONNX", "ONNX int8"]
    rules = ["---", "--:", "--:", "--:"]
    if record:
        for count in BATCH_SIZES:
            titles += [f"batch {count}, ONNX", "ONNX int8"]
            rules += ["--:", "--:"]
    lines = [titles, rules]
    for name in sorted(manifest.entries):
        top1 = measured[name]["top1_percent"] if name in measured else {}
        cells = [f"{top1[way]:.2f} %" if way in top1 else "not measured" for way in (EAGER, FLOAT32, INT8)]
        if record:
            faster = (timed.get((name, count, way)) for count in BATCH_SIZES for way in (FLOAT32, INT8))
            cells += [f"{1 / row.ratio:.2f}" if row else "not measured" for row in faster]
        lines.append([f"`{name}`", *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{_conditions(measured.values(), record)}"


def _conditions(measured: Iterable[dict[str, Any]], record: BenchmarkRecord | None) -> str:
    images = " or ".join(sorted({f"{row['images']:,}" for row in measured})) or "no"
    text = f"Top-1 on {images} test images (`python -m experiments onnx-accuracy`)."
    if record is None:
        return f"{text} Speed is not measured yet."
    return (
        f"{text} Under *batch*: how many times faster than eager PyTorch in channels_last, in one run on "
        f"{record.hardware} (`{command_today(record.command)}`)."
    )

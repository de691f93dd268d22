"""Latency and throughput of the models: batch sizes, precisions, and three ways to run them."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from conam_zoo.models.registry import check_model_name
from conam_zoo.training.distributed import precision_on
from experiments.speed.cost_net import inference_call
from experiments.speed.measure import benchmark_device, check_choice, check_least, time_in_turns
from experiments.speed.record import BenchmarkRecord, Row, Skipped, make_record, time_rows

# How a model is run, and in what precision.
MODES = ("eager fp32", "compiled fp32", "onnx fp32", "eager bf16", "compiled bf16")
TWIN = "plain, "  # before the mode, where it is the plain twin that is run
BATCH_SIZES = (1, 64, 512)
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class ModeUnavailableError(RuntimeError):
    """A way to run a model that this machine does not have. Its message is the reason."""


def benchmark_inference(
    models: Sequence[str] = ("resnet20_conam",),
    *,
    batch: Sequence[int] = BATCH_SIZES,
    modes: Sequence[str] | None = None,
    repeats: int = 15,
    quick: bool = False,
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> BenchmarkRecord:
    """Time the inference of models and of their plain twins, with weights as initialised.

    For every model and batch size all modes of both nets are timed in turns, in channels_last but for ONNX, which is in
    NCHW. The ratio of a row refers to the model in eager fp32; the fact ``ratio_to_plain`` to the plain twin in the
    same mode. ``models`` are builders of this package, with or without tag. ``modes`` are some of ``MODES``, to which
    eager fp32 is added; if None: all, but those in bf16 only where the device has instructions for it, because they
    take several times as long elsewhere.
    """
    device = benchmark_device()
    slow: list[str] = []
    if modes is None:
        slow = [mode for mode in MODES if mode.endswith("bf16") and precision_on(device) == "fp32"]
        modes = [mode for mode in MODES if mode not in slow]
    check_choice("--mode", modes, MODES)
    check_least(batch=(min(batch, default=0), 1), repeats=(repeats, 1))
    for model in models:
        check_model_name(model)
    if quick:
        models, batch, repeats = models[:1], (2,), 2
        modes = [mode for mode in modes if not mode.startswith("compiled")]
    modes = [mode for mode in MODES if mode in modes or mode == MODES[0]]
    rows: list[Row] = []
    skipped = [
        Skipped({}, prefix + mode, f"no instructions for bf16 here: --mode '{mode}' measures it")
        for prefix in ("", TWIN)
        for mode in slow
    ]
    for model in models:
        for count in batch:
            done, left = _measure(model, count, modes, repeats, 0.0 if quick else 0.05, device, progress)
            rows += done
            skipped += left
    settings = {"models": list(models), "batch": list(batch), "modes": modes, "repeats": repeats, "quick": quick}
    return make_record(
        "inference",
        rows,
        settings=settings | {"device": device.type},
        command=command,
        skipped=skipped,
        versions={name: version(name) for name in ONNX_PACKAGES if is_installed(name)},
    )


def _measure(
    model: str,
    count: int,
    modes: Sequence[str],
    repeats: int,
    min_seconds: float,
    device: torch.device,
    progress: Callable[[str], None],
) -> tuple[list[Row], list[Skipped]]:
    """One model and its twin at one batch size, in all modes."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = images.to(device).to(memory_format=torch.channels_last)
    group = {"model": model, "batch": count}
    calls: dict[str, Callable[[], object]] = {}
    skipped = []
    seconds_to_prepare: dict[str, float] = {}
    torch.compiler.reset()  # a compiled net that is not used any more must not count against the limit of variants
    for prefix, attention in (("", {}), (TWIN, {"attn_layer": "none"})):
        torch.manual_seed(0)
        net = timm.create_model(model, **attention).to(device).to(memory_format=torch.channels_last).eval()
        for mode in modes:
            name = prefix + mode
            progress(f"{model}, batch {count}: preparing {name}")
            started = time.perf_counter()
            try:
                call = mode_call(net, images, mode)
                call()  # torch.compile compiles now
            except ModeUnavailableError as error:
                skipped.append(Skipped(group, name, str(error)))
                continue
            seconds_to_prepare[name] = time.perf_counter() - started
            calls[name] = call
    progress(f"{model}, batch {count}: timing {len(calls)} modes")
    times = time_in_turns(calls, repeats=repeats, device=device, settle=1, min_seconds=min_seconds)
    rows = []
    for row in time_rows(times, group=group, reference=MODES[0]):
        facts = {"images_per_second": 1000 * count / row.median}
        if "eager" not in row.name:
            facts["seconds_to_prepare"] = seconds_to_prepare[row.name]
        twin = TWIN + row.name
        if twin in times:
            pair = {name: times[name] for name in (twin, row.name)}
            facts["ratio_to_plain"] = time_rows(pair, group={}, reference=twin)[1].ratio
        rows.append(replace(row, facts=facts))
    return rows, skipped


def mode_call(net: nn.Module, images: Tensor, mode: str) -> Callable[[], object]:
    """What runs a net on a batch in one of ``MODES``; it returns the logits, (N, classes).

    A mode that this machine does not have is a ``ModeUnavailableError``. ONNX on a CUDA device returns what holds the
    logits, see ``session_call``.
    """
    way, precision = mode.split()
    if way == "onnx":
        return _onnx_call(net, images)
    if way == "compiled":
        net = _compiled(net)
    call = inference_call(net, images, precision)
    if way == "compiled":
        try:
            call()
        except (RuntimeError, OSError) as error:  # whatever the C++ or Triton compiler reports
            raise ModeUnavailableError(
                f"torch.compile fails: {(str(error).splitlines() or ['no reason'])[0]}"
            ) from error
    return call


def _compiled(net: nn.Module) -> nn.Module:
    compiled: nn.Module = torch.compile(net, dynamic=False)  # type: ignore[assignment]
    return compiled


def is_installed(package: str) -> bool:
    """Whether a package is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _onnx_call(net: nn.Module, images: Tensor) -> Callable[[], object]:
    """An ONNX Runtime session on the net, with as many threads as PyTorch has, on the device of the images."""
    if missing := [name for name in ONNX_PACKAGES if not is_installed(name)]:
        raise ModeUnavailableError(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(net, (images.contiguous(),), path, dynamo=True, external_data=False, verbose=False)
        return session_call(path, images)


def session_call(path: Path, images: Tensor) -> Callable[[], object]:
    """What runs an ONNX file on a batch, as ``mode_call`` does.

    On a CUDA device it returns the batch and the binding that holds the logits instead. A ``ModeUnavailableError`` says
    if the installed onnxruntime does not know the device.
    """
    import onnxruntime

    wanted = "CUDAExecutionProvider" if images.device.type == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise ModeUnavailableError(f"the installed onnxruntime has no {wanted}: install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to the others
    session = onnxruntime.InferenceSession(path, options, providers=[wanted])
    name = session.get_inputs()[0].name
    if images.device.type == "cuda":  # keep the batch on the device, as the other modes do
        binding = session.io_binding()
        held = images.contiguous()
        binding.bind_input(name, "cuda", 0, np.float32, tuple(held.shape), held.data_ptr())
        binding.bind_output(session.get_outputs()[0].name, "cuda")

        def bound() -> object:
            session.run_with_iobinding(binding)
            return held, binding

        return bound
    array = images.contiguous().numpy()
    return lambda: session.run(None, {name: array})[0]

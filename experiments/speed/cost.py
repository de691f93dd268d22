"""The cost of ConAM in time and memory, compared with the rearrange-based formulation and timm's attentions."""

from collections.abc import Callable, Sequence

from conam_zoo.models.registry import check_model_name
from conam_zoo.training.distributed import precision_on
from experiments.speed.baselines import LAYOUTS
from experiments.speed.cost_module import SITES, measure_modules
from experiments.speed.cost_net import NETS, measure_memory, measure_nets
from experiments.speed.measure import benchmark_device, check_choice, check_least
from experiments.speed.record import BenchmarkRecord, Row, make_record

PARTS = ("module", "net", "memory")
PRECISIONS = ("fp32", "bf16")


def benchmark_cost(
    *,
    parts: Sequence[str] = PARTS,
    models: Sequence[str] = NETS,
    image_sizes: Sequence[int] | None = None,
    layouts: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    batch_size: int | None = None,
    repeats: int = 9,
    compile: bool | None = None,
    quick: bool = False,
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> BenchmarkRecord:
    """Measure what ConAM costs, in time and in memory.

    Part ``"module"`` times the attentions alone, as ratios to ConAM; ``"net"`` times training steps and inferences of
    nets that hold them, and ``"memory"`` measures the memory of a training step, both as ratios to the plain twin.
    ``models`` are the nets of these two.

    An argument that is None has a default for each part: images of 32 and 224 pixels for the modules, but 224 for the
    nets only on a CUDA device, since these nets keep the size of the images in their first stage, which takes a CPU
    minutes; both layouts for the modules, channels_last for the rest; both precisions for the modules, for the rest
    what the device trains in, bf16 (autocast) if it has instructions for it; 128 images for the modules, 64 for the
    nets; the module under ``torch.compile`` on a CUDA device only. At 224 x 224 a batch is an eighth of ``batch_size``.
    Memory is measured at 32 x 32, and since it is counted, not timed, only once.
    """
    check_choice("--part", parts, PARTS)
    for option, values, choices in (
        ("--image-size", image_sizes, tuple(SITES)),
        ("--layout", layouts, tuple(LAYOUTS)),
        ("--precision", precisions, PRECISIONS),
    ):
        if values is not None:
            check_choice(option, values, choices)
    for model in models:
        check_model_name(model)
    check_least(batch_size=(batch_size, 1), repeats=(repeats, 1))
    device = benchmark_device()
    cuda = device.type == "cuda"
    compile = cuda if compile is None else compile
    if quick:
        models, batch_size, repeats = ("resnet20_conam",), 2, 2
        image_sizes, layouts, precisions = (32,), ("channels_last",), ("fp32",)
    rows: list[Row] = []
    if "module" in parts:
        rows += measure_modules(
            image_sizes=image_sizes or tuple(SITES),
            layouts=layouts or tuple(LAYOUTS),
            precisions=precisions or PRECISIONS,
            batch_size=batch_size or 128,
            repeats=repeats,
            min_seconds=0.0 if quick else 0.02,
            compile=compile,
            device=device,
            sites=1 if quick else None,
            progress=progress,
        )
    nets = {
        "models": models,
        "layouts": layouts or ("channels_last",),
        "precisions": precisions or (precision_on(device),),
    }
    if "net" in parts:
        sizes = image_sizes or ((32, 224) if cuda else (32,))
        rows += measure_nets(
            **nets, image_sizes=sizes, batch_size=batch_size or 64, repeats=repeats, device=device, progress=progress
        )
    if "memory" in parts:
        rows += measure_memory(**nets, batch_size=batch_size or 64, device=device, progress=progress)
    settings = {"parts": list(parts), "repeats": repeats, "device": device.type, "quick": quick}
    return make_record("cost", rows, settings=settings, command=command)

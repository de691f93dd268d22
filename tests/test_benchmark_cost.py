"""What the cost is measured of: the same module twice, and bytes that can be counted by hand."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conam_zoo import ConAM
from experiments.speed.baselines import ATTENTIONS, RearrangeConAM, make_attention, make_net
from experiments.speed.cost import benchmark_cost
from experiments.speed.cost_module import SITES, attention_calls
from experiments.speed.cost_net import kept_bytes
from experiments.speed.measure import TrafficCounter, allocated_bytes, fresh_processes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
KIB = 1024


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("channels", "side", "patch_size"), [(16, 32, 8), (8, 12, 3), (4, 6, 6)])
def test_the_rearrange_formulation_is_conam(channels: int, side: int, patch_size: int, layout) -> None:
    torch.manual_seed(0)
    conam, rearrange = ConAM(channels, patch_size).double(), RearrangeConAM(channels, patch_size).double()
    for parameter in conam.parameters():
        parameter.data.mul_(4)  # far from equal shares, where a mistake would hide
    rearrange.load_state_dict(conam.state_dict())
    x, gradient = (torch.randn(3, channels, side, side).double().to(memory_format=layout) for _ in range(2))
    x.requires_grad_()
    results = []
    for module in (conam, rearrange):
        calls = attention_calls(module, x, gradient, "fp32")
        results.append([*calls["forward"](), *calls["forward + backward"]()])
    assert len(results[0]) == 1 + 1 + 4  # the map, its gradient, those of two weights and two biases
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    if side > patch_size:
        assert conam.confidence(x).amax() > 2 * conam.confidence(x).amin()


def test_a_net_with_the_rearrange_formulation_gives_the_same_logits() -> None:
    nets = {}
    for name in ("conam", "rearrange", "none"):
        torch.manual_seed(0)
        nets[name] = make_net("resnet20_conam", name).eval()
    kinds = {name: [type(m) for m in net.modules()] for name, net in nets.items()}
    assert kinds["rearrange"].count(RearrangeConAM) == kinds["conam"].count(ConAM) == 3
    assert kinds["rearrange"].count(ConAM) == kinds["none"].count(ConAM) == 0
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(nets["rearrange"](images), nets["conam"](images), atol=1e-5, rtol=1e-5)


def test_patch_sides_grow_with_the_images() -> None:
    sides = [
        m.patch_size for m in make_net("resnet20_conam", "conam", image_size=224).modules() if isinstance(m, ConAM)
    ]
    small = [m.patch_size for m in make_net("resnet20_conam", "conam").modules() if isinstance(m, ConAM)]
    assert sides == [7 * side for side in small]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_keeps_shape_and_type_and_gives_all_gradients(name: str) -> None:
    for channels, side, patch_size in SITES[32]:
        x = torch.randn(2, channels, side, side, dtype=torch.bfloat16, requires_grad=True)
        calls = attention_calls(make_attention(name, channels, patch_size), x, torch.ones_like(x), "bf16")
        (y,) = calls["forward"]()
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert not y.requires_grad
        gradients = calls["forward + backward"]()
        assert gradients[0].shape == x.shape
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_allocator_is_counted_at_its_peak_and_behind_the_work() -> None:
    x = torch.randn(KIB)  # 4 KiB

    def work() -> Tensor:
        three = torch.cat([x, x, x])
        return three[:KIB] + three[KIB : 2 * KIB]  # 12 KiB and 4, of which the 4 stay

    assert allocated_bytes(work, CPU) == (16 * KIB, 4 * KIB)
    assert allocated_bytes(lambda: work() is None, CPU).left == 0


def test_bytes_kept_by_a_small_net_are_those_counted_by_hand() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 10))
    count = 6
    images = torch.randn(count, 3, 2, 2)
    # the hidden layer (5: ReLU and the second linear layer share it) and log-probabilities (10), each float32; the sum
    # of the class weights and the loss, one float32 each.
    assert kept_bytes(net, images, "fp32") == count * (5 + 10) * 4 + 4 + 4


def test_traffic_counts_what_is_read_and_written_but_no_views() -> None:
    a, b = torch.randn(64, 16), torch.randn(64, 16)
    with TrafficCounter() as traffic:
        c = (a + b).view(16, 64).t()  # 3 x 4 KiB
        c.half()  # reads 4 KiB, writes 2
    assert traffic.bytes == 18 * KIB


def test_the_peak_of_a_process_grows_by_what_it_touches(warm_python: str) -> None:
    code = """
import torch
from experiments.speed.measure import peak_growth_bytes
work = lambda: torch.ones(64 * 1024 * 1024 // 4)  # 64 MiB, gone again
print(peak_growth_bytes(work, torch.device("cpu")))
"""
    growth = int(subprocess.run([warm_python, "-c", code], stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert 60 <= growth / KIB / KIB <= 80


def test_every_call_gets_a_process_of_its_own() -> None:
    with fresh_processes("experiments.speed.measure") as processes:
        assert len({os.getpid(), *(processes.submit(os.getpid).result() for _ in range(2))}) == 3


def test_a_quick_run_of_modules_and_nets_prints_their_ratios(experiments, tmp_path: Path) -> None:
    arguments = ("cost", "--part", "module", "--part", "net", "--quick")
    code, out, _ = experiments(*arguments, "--json", tmp_path / "cost.json")
    assert code == 0
    assert "relative to ConAM" in out
    assert "relative to the plain twin" in out
    facts = json.loads((tmp_path / "cost.json").read_text())
    assert facts["what"] == "cost"
    assert facts["command"] == "python -m experiments cost --part module --part net --quick"
    by_part: dict[str, list[dict]] = {}
    for row in facts["rows"]:
        by_part.setdefault(row["group"]["part"], []).append(row)
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert [row["name"] for row in by_part["module"]] == [*ATTENTIONS, "copy"] * 2
    assert [row["name"] for row in by_part["net"]] == ["none", *ATTENTIONS] * 2
    assert {row["group"]["pass"] for row in by_part["net"]} == {"training step", "inference"}
    assert all(row["ratio"] == 1 for row in facts["rows"] if row["name"] == row["ratio_to"])


def test_memory_of_a_quick_run_is_relative_to_the_plain_twin() -> None:
    record = benchmark_cost(parts=["memory"], quick=True)
    kept = {row.name: row for row in record.rows if row.group["measured"] == "kept for backward"}
    assert list(kept) == ["none", *ATTENTIONS]
    assert kept["none"].ratio == 1
    assert all(kept[name].median > kept["none"].median for name in ATTENTIONS)
    assert kept["rearrange"].median > kept["conam"].median
    peaks = {row.name: row for row in record.rows if row.group["measured"] != "kept for backward"}
    assert list(peaks) == ["none", *ATTENTIONS]
    assert all(row.unit == "MiB" and row.median > kept[name].median for name, row in peaks.items())


BAD = {
    "part": (["--part", "nets"], "The option --part is nets, but it must be one of module, net, memory."),
    "model": (["--model", "resnet55_conam"], "did you mean resnet"),
    "image size": (["--image-size", "64"], "The option --image-size is 64, but it must be one of 32, 224."),
    "layout": (["--layout", "nhwc"], "The option --layout is nhwc"),
    "precision": (["--precision", "fp16"], "The option --precision is fp16"),
    "batch size": (["--batch-size", "0"], "The option --batch-size is 0, but it must be at least 1."),
    "repeats": (["--repeats", "0"], "The option --repeats is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_sentence(case: str, experiments) -> None:
    arguments, sentence = BAD[case]
    code, _, err = experiments("cost", "--quick", *arguments)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1

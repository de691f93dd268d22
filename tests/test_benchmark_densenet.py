"""torchvision's DenseNet stands beside ours as the very same net, and what is measured of both is what it is called."""

import json
from pathlib import Path

import pytest
import timm
import torch

import conam_zoo  # noqa: F401
from conam_zoo.errors import UserError
from conam_zoo.training.distributed import precision_on
from experiments.speed import densenet
from experiments.speed.densenet import (
    COMPARED,
    OPERATORS,
    benchmark_densenet,
    densenet_memory,
    torchvision_densenet,
)
from experiments.speed.measure import benchmark_device, operator_shares
from experiments.speed.record import read_record

pytestmark = pytest.mark.slow


def test_torchvision_s_net_is_our_plain_twin() -> None:
    ours = timm.create_model("densenetbc100_12_conam", attn_layer="none").eval()
    theirs = torchvision_densenet(100, 12).eval()
    state = ours.state_dict()
    names = list(theirs.state_dict())
    assert len(names) == len(state)
    theirs.load_state_dict(dict(zip(names, state.values(), strict=True)))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs(images), ours(images), atol=1e-4, rtol=1e-4)


def test_every_net_has_a_time_its_parts_and_its_memory(tmp_path: Path) -> None:
    record = benchmark_densenet(quick=True, command="python -m experiments densenet --quick")
    (tmp_path / "densenet.json").write_text(json.dumps(record.to_dict()))
    rows = {row.name: row for row in read_record(tmp_path / "densenet.json").rows}
    assert list(rows) == list(COMPARED)
    assert rows["conam_zoo"].ratio == 1
    for row in rows.values():
        assert row.median > 0
        assert row.facts["images_per_second"] == pytest.approx(1000 * 2 / row.median, rel=1e-3)
        assert row.facts["peak_mib"] > 0
        shares = [row.facts[share] for share in OPERATORS]
        assert all(share > 0 for share in shares)
        assert sum(shares) < 100
    kept = {name: row.facts["kept_for_backward_mib"] for name, row in rows.items()}
    assert kept["conam_zoo, recomputing"] < 0.7 * kept["conam_zoo"]
    assert kept["conam_zoo, plain twin"] < kept["conam_zoo"]
    assert rows["conam_zoo"].facts["precision"] == precision_on(benchmark_device())
    assert rows["torchvision"].facts["precision"] == rows["conam_zoo"].facts["precision"]
    assert rows["torchvision, fp32, nchw"].facts["precision"] == "fp32"


@pytest.mark.parametrize("has_bf16", [True, False])
def test_nets_are_in_bf16_where_the_device_has_it(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densenet, "precision_on", lambda device, wanted: wanted if has_bf16 else "fp32")
    kept = {
        name: densenet_memory(name, 16, 4, 2, torch.get_num_threads())["kept_for_backward_mib"]
        for name in ("torchvision", "torchvision, fp32, nchw")
    }
    if has_bf16:
        assert kept["torchvision, fp32, nchw"] > 1.3 * kept["torchvision"]
    else:
        assert kept["torchvision, fp32, nchw"] == kept["torchvision"]


def test_the_shares_of_operators_are_those_of_their_time() -> None:
    a = torch.randn(400, 400)

    def work() -> None:
        (a @ a @ a @ a).relu()

    work()
    groups = {"products": ("mm",), "again": ("*mm",), "part of a name": ("m",), "norms": ("*batch_norm*",)}
    shares = operator_shares(work, groups, a.device)
    assert 60 < shares["products"] < 100
    assert shares["again"] == shares["part of a name"] == shares["norms"] == 0
    with pytest.raises(RuntimeError, match="saw no operator"):
        operator_shares(lambda: None, groups, a.device)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": "densenet40_12_conam"}, "--model is densenet40_12_conam, but torchvision has nets only like"),
        ({"batch_size": 1}, "--batch-size is 1, but it must be at least 2"),
        ({"repeats": 0}, "--repeats is 0, but it must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        benchmark_densenet(**arguments)

"""The variants of the ``step`` benchmark compute the same step, and their columns hold what they are called."""

import json
from pathlib import Path

import pytest
import torch

from conam_zoo.errors import UserError
from experiments.speed.cost_net import image_batch, training_step
from experiments.speed.record import read_record
from experiments.speed.step import VARIANTS, benchmark_step, step_net

CPU = torch.device("cpu")


def test_joining_in_place_changes_nothing() -> None:
    images = image_batch(4, 32, "channels_last", CPU)
    nets = [step_net("resnet20_conam", name, CPU) for name in list(VARIANTS)[:2]]
    before = {name: tensor.clone() for name, tensor in nets[0].state_dict().items()}
    for net in nets:
        training_step(net, images, "fp32")()
    one, other = (net.state_dict() for net in nets)
    assert not torch.equal(one["conv1.weight"], before["conv1.weight"])
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=0)


@pytest.mark.slow
def test_every_variant_has_a_time_and_the_eager_ones_their_parts(tmp_path: Path) -> None:
    record = benchmark_step(quick=True, command="python -m experiments step --quick")
    (tmp_path / "step.json").write_text(json.dumps(record.to_dict()))
    rows = read_record(tmp_path / "step.json").rows
    assert [row.name for row in rows] == ["eager", "eager, joined in place"]
    assert rows[0].ratio == 1
    for row in rows:
        assert row.facts["images_per_second"] == pytest.approx(1000 * 2 / row.median, rel=1e-3)
        shares = [value for name, value in row.facts.items() if name.endswith("_percent")]
        assert len(shares) == 4
        assert all(share > 0 for share in shares)
        assert sum(shares) < 100


def test_a_net_without_basic_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="densenet40_12_conam, which has no basic blocks"):
        benchmark_step("densenet40_12_conam", quick=True)

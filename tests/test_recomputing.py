"""ConAM's result is computed again in the backward pass, not kept: same bits, less memory, no surprises."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from conam_zoo.layers.conam import ConAM
from conam_zoo.layers.conam_fused import recompute_rescaled
from conam_zoo.models.conam_densenet import ConAMDenseNet
from conam_zoo.models.conam_resnet import ConAMResNet
from conam_zoo.models.conam_wide_resnet import ConAMWideResNet
from experiments.speed.baselines import make_net
from experiments.speed.cost_net import kept_bytes, step_peak_bytes
from experiments.speed.measure import allocated_bytes

CPU = torch.device("cpu")
NETS = {
    "basic": lambda **options: ConAMResNet("basic", (2, 1, 1), (16, 16, 32), **options),
    "bottleneck": lambda **options: ConAMResNet("bottleneck", (1, 1, 1), (4, 8, 8), **options),
    "wide": lambda **options: ConAMWideResNet(10, 1, **options),
    "dense": lambda **options: ConAMDenseNet(10, 4, **options),
    "dense, bottleneck": lambda **options: ConAMDenseNet(16, 4, bottleneck=True, **options),
}


class Pair(nn.Module):
    """ConAM and the convolution behind it."""

    def __init__(self, patch_size: int = 2) -> None:
        super().__init__()
        self.attention = ConAM(4, patch_size)
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x)
        with recompute_rescaled(y):
            y = self.conv(y)
        return y


def _gradients(net: nn.Module, images: Tensor, bf16: bool) -> list[Tensor]:
    net = copy.deepcopy(net)
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        net(images).float().logsumexp(1).sum().backward()
    return [images.grad, *[parameter.grad for parameter in net.parameters()]]


@pytest.mark.parametrize("placement", ["stage", "block"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("family", NETS)
def test_gradients_have_the_same_bits_as_if_it_were_kept(family, layout, bf16, placement, monkeypatch) -> None:
    torch.manual_seed(0)
    net = NETS[family](attn_placement=placement).to(memory_format=layout).train()
    images = torch.randn(3, 3, 32, 32).contiguous(memory_format=layout)
    found = _gradients(net, images, bf16)
    for module in ("_base", "conam_densenet"):
        monkeypatch.setattr(f"conam_zoo.models.{module}.recompute_rescaled", lambda y: nullcontext())
    expected = _gradients(net, images, bf16)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("model", ["resnet20_conam", "wide_resnet16_4_conam", "densenet40_12_conam"])
def test_a_step_takes_two_percent_more_memory_than_the_plain_twins_at_most(model: str) -> None:
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    kept, peak = [], []
    for attention in ("none", "conam"):
        net = make_net(model, attention).to(memory_format=torch.channels_last).train()
        kept.append(kept_bytes(net, images, "bf16"))
        peak.append(step_peak_bytes(net, images, "bf16") - 2 * sum(p.nbytes for p in net.parameters()))
    plain, conam = kept
    assert plain < conam <= 1.02 * plain
    plain, conam = peak  # without the parameters' gradients and momenta, which four images do not outweigh
    assert conam <= 1.02 * plain


def test_the_rescaled_map_is_not_kept() -> None:
    pair, x = Pair(8), torch.randn(2, 4, 64, 64, requires_grad=True)
    pair(x)
    output = 2 * 3 * 64 * 64 * 4
    assert allocated_bytes(lambda: pair(x), CPU).left < output + x.nbytes / 2
    assert allocated_bytes(lambda: pair.conv(pair.attention(x)), CPU).left > output + x.nbytes


def test_a_graph_that_is_dropped_is_gone_without_the_garbage_collector() -> None:
    pair, x = Pair(8), torch.randn(2, 4, 64, 64, requires_grad=True)
    pair(x)
    gc.disable()
    try:
        assert allocated_bytes(lambda: pair(x) is None, CPU).left == 0
    finally:
        gc.enable()


def test_what_is_changed_in_place_afterwards_is_refused() -> None:
    pair, x = Pair(), torch.randn(2, 4, 8, 8)
    z = pair(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="ConAM rescaled has been changed in place"):
        z.sum().backward()


def test_a_map_that_a_hook_changed_is_kept() -> None:
    pair, x = Pair(), torch.randn(2, 4, 8, 8)

    def mask(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        with torch.no_grad():
            output[:, :, :4] = 0

    hook = pair.attention.register_forward_hook(mask)
    pair(x).sum().backward()
    hook.remove()
    seen = pair.attention(x).detach()
    seen[:, :, :4] = 0
    (expected,) = torch.autograd.grad(pair.conv(seen).sum(), [pair.conv.weight])
    torch.testing.assert_close(pair.conv.weight.grad, expected)


def test_a_graph_can_be_gone_through_twice_and_by_parts() -> None:
    pair, x = Pair(), torch.randn(2, 4, 8, 8, requires_grad=True)
    z = pair(x).square().sum()
    first = torch.autograd.grad(z, [x, pair.conv.weight], retain_graph=True)
    second = torch.autograd.grad(z, [pair.conv.weight], retain_graph=True) + torch.autograd.grad(z, [x])
    assert torch.equal(first[1], second[0])
    assert torch.equal(first[0], second[1])


def test_it_can_be_differentiated_twice() -> None:
    pair = Pair().double()
    x = torch.randn(1, 4, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(pair, x)
    assert torch.autograd.gradgradcheck(pair, x)


def test_other_hooks_for_saved_tensors_get_the_map() -> None:
    pair, x = Pair(), torch.randn(2, 4, 8, 8, requires_grad=True)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        z = pair(x)
    assert shapes.count(x.shape) == 2  # what ConAM and what the convolution keep
    z.sum().backward()
    assert x.grad is not None


def test_hooks_may_be_forbidden() -> None:
    pair, x = Pair(), torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        pair(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_happens_without_gradients_or_without_conam(frozen: bool) -> None:
    pair = Pair().requires_grad_(False) if frozen else Pair()
    x = torch.randn(2, 4, 8, 8)
    with nullcontext() if frozen else torch.no_grad():
        assert not pair(x).requires_grad
    assert isinstance(recompute_rescaled(x.requires_grad_() * 2), nullcontext)


@pytest.mark.slow
def test_the_compiled_net_agrees() -> None:
    torch.manual_seed(0)
    pair, x = Pair(), torch.randn(2, 4, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(pair(x).square().sum(), [x, *pair.parameters()])
    found = torch.autograd.grad(
        torch.compile(pair, fullgraph=True, backend="aot_eager")(x).square().sum(), [x, *pair.parameters()]
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

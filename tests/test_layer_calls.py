"""ConAM calls linear layers that are more than plain ones: tools that replace, hook or parametrise them work."""

import copy
import json
import math
import subprocess
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from oracles.conam_oracle import conam
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from conam_zoo import ConAM
from conam_zoo.layers._torch_private import HOOKS, has_bf16_convolutions
from conam_zoo.layers.conam_fused import recompute_rescaled

SHAPES = [(2, 6, 8, 12), (2, 6, 7, 10)]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def attention() -> ConAM:
    torch.manual_seed(0)
    module = ConAM(6, 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 2 / math.sqrt(6))
    return module


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def plain(module: ConAM) -> ConAM:
    """A plain module with the weights that are in force."""
    twin = ConAM(6, 4)
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            layer, source = getattr(twin, name), getattr(module, name)
            layer.weight.copy_(source.weight)
            layer.bias.copy_(source.bias)
    return twin


class Adapted(nn.Module):
    """A frozen linear layer and a trained addition of low rank, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight + self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def adapt(module: ConAM) -> None:
    module.fc1, module.fc2 = Adapted(module.fc1), Adapted(module.fc2)


def each(change: Callable[[nn.Module], Any]) -> Callable[[ConAM], None]:
    def apply(module: ConAM) -> None:
        for layer in (module.fc1, module.fc2):
            change(layer)

    return apply


CHANGES: dict[str, Callable[[ConAM], None]] = {
    "adapters": adapt,
    "pruning": each(lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5)),
    "parametrisation": each(lambda layer: parametrize.register_parametrization(layer, "weight", Doubled())),
    "weight norm": each(parametrizations.weight_norm),
    "old weight norm": each(torch.nn.utils.weight_norm),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_count_and_learn(change: str, shape: tuple[int, ...]) -> None:
    module, x = attention(), images(shape)
    CHANGES[change](module)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output = module(x)
        twin = plain(module)
        torch.testing.assert_close(output, twin(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.confidence(x), twin.confidence(x), rtol=1e-4, atol=1e-6)
        weights = [p.detach().double().numpy() for p in twin.parameters()]
        np.testing.assert_allclose(output.detach(), conam(x.double().numpy(), 4, *weights)[0], rtol=1e-3, atol=1e-4)
        (output * images(shape)).square().sum().backward()
        assert [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
def test_hooks_fire_and_their_answers_count(shape: tuple[int, ...]) -> None:
    fired = []
    for place in ("fc1", "fc2"):
        module = attention()
        layer = getattr(module, place)
        layer.register_forward_pre_hook(lambda *_, place=place: fired.append(f"pre {place}"))
        layer.register_forward_hook(lambda *_, place=place: fired.append(place))
        layer.register_full_backward_hook(lambda *_, place=place: fired.append(f"back {place}"))
        x = images(shape).requires_grad_()
        module(x).square().sum().backward()
        assert fired == [f"pre {place}", place, f"back {place}"]
        fired.clear()
        handle = layer.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
        confidence = module.confidence(x)
        torch.testing.assert_close(confidence, torch.full_like(confidence, 1 / confidence[0].numel()))
        assert not torch.equal(confidence, attention().confidence(x))
        handle.remove()
        fired.clear()
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: fired.append(type(layer).__name__))
        attention()(x)
        handle.remove()
    assert fired.count("Linear") == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_quantisation(shape: tuple[int, ...]) -> None:
    module, x = attention().eval(), images(shape)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear}, dtype=torch.qint8)
    assert not quantised.has_plain_layers
    with torch.no_grad():
        torch.testing.assert_close(quantised(x), module(x), rtol=0.2, atol=0.2)
        scripted = torch.jit.script(quantised)
        torch.testing.assert_close(scripted(x), quantised(x))
        torch.testing.assert_close(scripted.confidence(x), quantised.confidence(x))


def test_a_quantised_net_agrees_with_the_net() -> None:
    net = timm.create_model("resnet20_conam").eval()
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(quantised(x), net(x), rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["adapters", "parametrisation"])
def test_compilers_and_transforms_see_changed_layers(change: str) -> None:
    module, x = attention(), images(SHAPES[0])
    CHANGES[change](module)
    expected = module(x).detach()
    program = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(program(x), expected)
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(x), expected)
    called = torch.func.functional_call(module, dict(module.named_parameters()), (x,))
    torch.testing.assert_close(called, expected)


def test_the_plain_module_keeps_its_one_pass() -> None:
    output = attention()(images(SHAPES[0]))
    assert "InFewPasses" in type(output.grad_fn).__name__


# PyTorch without its private names


GONE = [
    (torch._C, "_are_functorch_transforms_active"),
    (torch._C, "_autograd"),
    (torch.autograd.forward_ad, "_current_level"),
    (nn.modules.module, "_has_any_global_hook"),
]


@pytest.mark.parametrize(("owner", "name"), GONE, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("net", ["resnet20_conam", "wide_resnet16_4_conam", "densenet40_12_conam"])
def test_nets_run_by_the_equations_without_private_names(net: str, owner: Any, name: str, monkeypatch) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model(net, attn_layer="conam").eval(), torch.randn(1, 3, 16, 16)

    def gradients() -> tuple[Tensor, ...]:
        output = model(x)
        return output, *torch.autograd.grad(output.logsumexp(1).sum(), list(model.parameters()))

    expected = gradients()
    monkeypatch.delattr(owner, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Without:
    """One of PyTorch's namespaces, in which one name is gone."""

    def __init__(self, namespace: Any, gone: str) -> None:
        self.namespace, self.gone = namespace, gone

    def __getattr__(self, name: str) -> Any:
        if name == self.gone:
            raise AttributeError(name)
        return getattr(self.namespace, name)


@pytest.mark.parametrize("scale", [1.0, 1e16])  # at the second one embeddings reach their bound
def test_gradients_keep_their_bits_without_the_one_operation_for_a_clamp(scale: float, monkeypatch) -> None:
    module, x = attention(), (scale * images(SHAPES[0])).requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad((module(x) * images(SHAPES[0])).sum(), [x, *module.parameters()])

    expected = gradients()
    monkeypatch.setattr(torch.ops, "aten", Without(torch.ops.aten, "hardtanh_backward"))
    for one, other in zip(gradients(), expected, strict=True):
        assert one.numpy().tobytes() == other.numpy().tobytes()


def test_nothing_is_computed_again_where_changes_in_place_are_not_counted(monkeypatch) -> None:
    y = attention()(images(SHAPES[0]).requires_grad_())
    assert not isinstance(recompute_rescaled(y), nullcontext)
    monkeypatch.setattr(Tensor, "_version", property(lambda tensor: tensor.there_is_no_such_thing))
    assert isinstance(recompute_rescaled(y), nullcontext)


@pytest.mark.parametrize("name", HOOKS)
def test_layers_are_called_where_hooks_lie_under_another_name(name: str, monkeypatch) -> None:
    module, x = attention(), images(SHAPES[0])
    expected = module(x)
    assert module.has_plain_layers
    renamed = [f"{hooks}_of_another_name" if hooks == name else hooks for hooks in HOOKS]
    monkeypatch.setattr("conam_zoo.layers._torch_private.HOOKS", renamed)
    assert not module.has_plain_layers
    torch.testing.assert_close(module(x), expected)


def test_bf16_is_not_denied_where_pytorch_does_not_say(monkeypatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", Without(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"))
    assert has_bf16_convolutions() is None


@pytest.mark.parametrize(
    ("machine", "asked", "instructions", "expected"),
    [
        ("x86_64", True, {"_is_avx512_bf16_supported"}, True),
        ("x86_64", True, {"_is_amx_tile_supported"}, True),
        ("AMD64", True, set(), False),  # AVX-512 alone: oneDNN emulates, several times slower than float32
        ("x86_64", False, {"_is_amx_tile_supported"}, False),
        ("x86_64", True, None, True),  # another PyTorch, without these names
        ("aarch64", True, set(), True),
        ("aarch64", False, set(), False),
    ],
)
def test_bf16_is_not_taken_where_it_would_be_emulated(
    machine: str, asked: bool, instructions: set[str] | None, expected: bool, monkeypatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: asked))
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if instructions is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions, raising=False)
    assert has_bf16_convolutions() is expected


# Run with private names removed before the package is imported; prints what a net and a moving average come to.
WITHOUT_NAMES = """
import json, sys, warnings
import timm, torch

torch.manual_seed(0)
if sys.argv[1] == "without":
    del torch._C._are_functorch_transforms_active, torch._C._autograd, torch.autograd.forward_ad._current_level
    del torch.nn.modules.module._has_any_global_hook, torch._foreach_lerp_, torch._foreach_copy_
    sys.modules["torch._subclasses.fake_tensor"] = sys.modules["torch._subclasses.functional_tensor"] = None
import conam_zoo
from conam_zoo.training.train_state import MovingAverage

warnings.simplefilter("error")
model = timm.create_model("resnet20_conam")
average = MovingAverage(model, 0.5)
output = model(torch.randn(2, 3, 16, 16))
gradients = torch.autograd.grad(output.logsumexp(1).sum(), list(model.parameters()))
for step in (1, 2, 3):
    average.update(model, step=step)
    model.conv1.weight.data.add_(1)
values = [output, *gradients, *average.module.state_dict().values()]
print(json.dumps([value.double().norm().item() for value in values]))
"""


@pytest.mark.slow
def test_names_that_are_gone_before_the_import_change_no_result(warm_python: str) -> None:
    with_names, without = (
        subprocess.run([warm_python, "-c", WITHOUT_NAMES, which], capture_output=True, text=True, check=True)
        for which in ("with", "without")
    )
    assert without.stderr == ""
    assert json.loads(without.stdout) == pytest.approx(json.loads(with_names.stdout), rel=1e-4, abs=1e-6)

"""ConAM2: its values against a slow oracle, its numerics, what compilers make of it, and nets that hold it."""

import doctest
import io
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import timm
import torch
from oracles.variant_oracle import conam_variant
from torch import Tensor

import conam_zoo.attention.conam2
from conam_zoo import ConAM, ConAM2
from conam_zoo.analysis.confidence import confidence_maps
from conam_zoo.attention_variants import ConfidenceForm

# Height, width, patch side: divided, not divided, a map smaller than a patch in one or both directions, one pixel.
SIZES = [
    (16, 24, 4),
    (6, 6, 1),
    (15, 22, 4),
    (7, 5, 3),
    (8, 9, 4),
    (9, 8, 4),
    (3, 2, 4),
    (3, 10, 4),
    (10, 3, 4),
    (1, 1, 1),
]
DIVIDED, UNDIVIDED = (2, 6, 16, 24), (2, 6, 15, 22)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
scripting = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def attention(patch_size: int = 4, hidden: int | None = None, **placement: Any) -> ConAM2:
    """A module of 6 channels with weights that make its gates uneven."""
    module = ConAM2(6, patch_size, hidden, **placement)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters(), start=1):
            parameter.copy_(noise(*parameter.shape, seed=seed) * 3 / math.sqrt(6))
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hidden", [None, 3])
@pytest.mark.parametrize(("height", "width", "patch_size"), SIZES)
def test_equals_the_oracle(height: int, width: int, patch_size: int, hidden: int | None, layout: str) -> None:
    module = attention(patch_size, hidden, dtype=torch.float64)
    x = noise(2, 6, height, width, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout])
    form = asdict(ConfidenceForm(heads=0, second_relu=False, gate="sigmoid", shortcut=False))
    arrays = [p.detach().numpy() for p in module.parameters()]
    unused = np.ones(6)
    expected = conam_variant(x.numpy(), patch_size, *arrays, form, unused, unused)
    y = module(x)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    assert module.gates(x).shape == (2, rows, columns, 6)
    torch.testing.assert_close(module.confidence(x), module.gates(x).mean(3))


def test_a_patch_is_gated_by_itself_and_suppressed_at_most_to_nothing() -> None:
    module, x = attention(), noise(*DIVIDED)
    factor = module(x) / x
    assert 0 < factor.min() < 0.2
    assert 0.8 < factor.max() < 1
    # Another patch changes it by way of the global context alone: two patches exchanged leave the others as they were.
    exchanged = x.clone()
    exchanged[:, :, :4, :4], exchanged[:, :, 4:8, :4] = x[:, :, 4:8, :4], x[:, :, :4, :4]
    torch.testing.assert_close(module(exchanged)[:, :, 8:], module(x)[:, :, 8:])
    torch.testing.assert_close(module(exchanged)[:, :, :4, :4], module(x)[:, :, 4:8, :4])


@pytest.mark.parametrize("shape", [(1, 6, 8, 4), (1, 6, 5, 7)])
def test_gradients(shape: tuple[int, ...]) -> None:
    module = attention(dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [noise(*shape, dtype=torch.float64), *(p.detach().clone() for p in module.parameters())]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_gates_are_computed_in_float32(low: torch.dtype) -> None:
    module = attention()
    x = noise(*DIVIDED)
    with torch.autocast("cpu", dtype=low):
        assert torch.equal(module(x), attention()(x))
        assert module(x.to(low)).dtype == low
        assert module.gates(x.to(low)).dtype == torch.float32
        torch.testing.assert_close(module.gates(x.to(low)), module.gates(x), rtol=0, atol=0.05)
    half = attention(dtype=low)
    assert half(x.to(low)).dtype == low
    torch.testing.assert_close(half(x.to(low)).float(), module(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
@pytest.mark.parametrize("value", [1e37, -1e37])
def test_huge_activations_stay_finite(value: float, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, value).requires_grad_()
    y = attention()(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


@scripting
def test_torchscript_fx_and_export() -> None:
    module = attention().eval()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    scripted, traced = torch.jit.load(buffer), torch.fx.symbolic_trace(module)
    for shape in (DIVIDED, UNDIVIDED):
        x = noise(*shape)
        torch.testing.assert_close(scripted(x), module(x))
        assert torch.equal(traced(x), module(x))
        torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
        batch = {"x": {0: torch.export.Dim("batch")}}
        program = torch.export.export(module, (noise(*shape),), dynamic_shapes=batch).module()
        for images in (1, 5):
            x = noise(images, *shape[1:])
            torch.testing.assert_close(program(x), module(x))


def test_meta_device_and_dtype() -> None:
    module = ConAM2(6, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    x = torch.empty(UNDIVIDED, device="meta", dtype=torch.bfloat16)
    assert (module(x).shape, module(x).dtype) == (x.shape, torch.bfloat16)


def test_it_has_the_parameters_of_conam() -> None:
    mine, theirs = ConAM2(6, 4, 3).state_dict(), ConAM(6, 4, 3).state_dict()
    assert {name: p.shape for name, p in mine.items()} == {name: p.shape for name, p in theirs.items()}


@pytest.mark.parametrize("argument", ["channels", "patch_size", "hidden_channels"])
@pytest.mark.parametrize("value", [0, 2.0, True])
def test_bad_sizes_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"ConAM2: {argument} is {value!r}, but it must be a positive integer"):
        ConAM2(**{"channels": 6, "patch_size": 4, argument: value})


def test_docstring_examples() -> None:
    results = doctest.testmod(conam_zoo.attention.conam2)
    assert results.failed == 0
    assert results.attempted >= 4


# In the nets


@pytest.mark.parametrize("name", ["resnet20_conam", "wide_resnet16_4_conam", "densenet40_12_conam"])
def test_nets_hold_it_and_train(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, attn_layer="conam2")
    assert [type(m) for m in model.modules() if isinstance(m, ConAM | ConAM2)] == [ConAM2] * 3
    logits, maps = confidence_maps(model.eval(), noise(2, 3, 32, 32))
    assert logits.shape == (2, 1000 if model.num_classes == 1000 else 10)
    assert [tuple(each.shape) for each in maps.values()] == [(2, 4, 4)] * 3
    model.train()(noise(2, 3, 32, 32)).square().sum().backward()
    assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.attention_arguments()["attn_layer"] == "conam2"


@scripting
def test_a_net_of_it_is_scripted_and_traced() -> None:
    model = timm.create_model("resnet20_conam", attn_layer="conam2", attn_placement="block").eval()
    x = noise(1, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))

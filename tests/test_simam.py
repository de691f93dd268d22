"""SimAM: its values against a slow oracle, its derivatives, its numerics, and what compilers make of it."""

import io
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from conam_zoo.layers.simam import SimAM

SHAPES = [(2, 3, 8, 8), (1, 2, 5, 3), (2, 4, 1, 7), (1, 3, 1, 1)]
scripting = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def oracle(x: np.ndarray, lambda_: float) -> np.ndarray:
    """Yang et al., equations 5 and 6, pixel by pixel."""
    output = np.empty_like(x)
    for index in np.ndindex(*x.shape):
        channel = x[index[:2]].ravel()
        mean = sum(channel) / len(channel)
        variance = sum((value - mean) ** 2 for value in channel) / max(len(channel) - 1, 1)
        inverse_energy = (x[index] - mean) ** 2 / (4 * (variance + lambda_)) + 0.5
        output[index] = x[index] / (1 + math.exp(-inverse_energy))
    return output


@pytest.mark.parametrize("lambda_", [1e-4, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_equations(shape: tuple[int, ...], lambda_: float) -> None:
    x = noise(*shape, dtype=torch.float64)
    np.testing.assert_allclose(SimAM(lambda_)(x).numpy(), oracle(x.numpy(), lambda_), rtol=1e-12)


def test_a_constant_map_by_hand() -> None:
    torch.testing.assert_close(
        SimAM()(torch.full((1, 1, 4, 4), 3.0)), torch.full((1, 1, 4, 4), 3 / (1 + math.exp(-0.5)))
    )


def test_has_no_parameters() -> None:
    assert SimAM().state_dict() == {}


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 2, 5, 3), (1, 2, 1, 1)])
def test_gradients(shape: tuple[int, ...]) -> None:
    x = noise(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(SimAM(), (x,))
    assert torch.autograd.gradgradcheck(SimAM(), (x,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format: torch.memory_format) -> None:
    x = noise(2, 3, 8, 8).to(memory_format=memory_format)
    output = SimAM()(x)
    assert output.stride() == x.stride()
    torch.testing.assert_close(output, SimAM()(x.contiguous()))


@pytest.mark.parametrize(("low", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_has_statistics_in_float32(low: torch.dtype, epsilon: float) -> None:
    x = (noise(2, 3, 32, 32) * 100).to(low)  # in float16 the sum of squares would be infinite
    output = SimAM()(x)
    assert output.dtype == low
    torch.testing.assert_close(output.float(), SimAM()(x.float()), rtol=3 * epsilon, atol=0)


@scripting
def test_torchscript_and_fx() -> None:
    module = SimAM(1e-3)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    scripted, traced = torch.jit.load(buffer), torch.fx.symbolic_trace(module)
    for shape in SHAPES:
        x = noise(*shape)
        torch.testing.assert_close(scripted(x), module(x))
        assert torch.equal(traced(x), module(x))
    x = noise(*SHAPES[0]).bfloat16()
    assert torch.equal(traced(x), module(x))


@pytest.mark.slow
def test_export_with_dynamic_batch_and_compile() -> None:
    module, x = SimAM().eval(), noise(2, 3, 8, 8)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}).module()
    for images in (1, 5):
        y = noise(images, 3, 8, 8)
        torch.testing.assert_close(program(y), module(y))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


@pytest.mark.parametrize("placement", ["stage", "block"])
@pytest.mark.parametrize("name", ["resnet20_conam", "wide_resnet16_4_conam", "densenet40_12_conam"])
def test_nets_train_with_it(name: str, placement: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, attn_layer="simam", attn_placement=placement)
    plain = timm.create_model(name, attn_layer="none", device="meta")
    assert list(model.state_dict()) == list(plain.state_dict())
    sites = [n for n, module in model.named_modules() if isinstance(module, SimAM)]
    conam = timm.create_model(name, attn_placement=placement, device="meta")
    assert sites == [n for n, module in conam.named_modules() if type(module).__name__ == "ConAM"]
    output = model(noise(2, 3, 16, 16))
    output.square().sum().backward()
    assert output.isfinite().all()
    assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("value", [0, -1e-4, math.nan])
def test_a_regulariser_that_is_not_positive_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"SimAM: lambda_ is .*, but it must be a positive number"):
        SimAM(value)

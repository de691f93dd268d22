"""ConAM: its values against a slow oracle, its numerics, its memory traffic, and what compilers make of it."""

import copy
import io
import math
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.conam_oracle import conam
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conam_zoo import ConAM
from conam_zoo.layers import conam_equations as equations
from conam_zoo.layers import conam_fused as passes

# Height, width, patch side: divided, not divided, a map smaller than a patch in one or both directions, one pixel.
SIZES = [
    (32, 32, 8),
    (16, 16, 4),
    (8, 12, 4),
    (6, 6, 1),
    (33, 29, 8),
    (7, 5, 3),
    (8, 9, 4),
    (4, 4, 8),
    (3, 10, 4),
    (10, 3, 4),
    (1, 1, 1),
    (1, 1, 4),
    (5, 1, 2),
]
DIVIDED, UNDIVIDED = (2, 6, 16, 24), (2, 6, 15, 22)
scripting = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def noise(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers that are the same wherever NumPy is."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape) * scale).to(dtype)


def attention(
    channels: int = 6, patch_size: int = 4, hidden: int | None = None, seed: int = 1, **placement: Any
) -> ConAM:
    """A module with weights large enough that its confidence is far from uniform."""
    module = ConAM(channels, patch_size, hidden, **placement)
    with torch.no_grad():
        for offset, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed + offset, scale=2 / math.sqrt(channels)))
    return module


def assert_equals_oracle(module: ConAM, x: Tensor) -> None:
    parameters = [parameter.detach().double().numpy() for parameter in module.parameters()]
    output, confidence = conam(x.double().numpy(), module.patch_size, *parameters)
    with torch.no_grad():
        np.testing.assert_allclose(module.confidence(x).numpy(), confidence, rtol=1e-6, atol=1e-200)
        np.testing.assert_allclose(module(x).numpy(), output, rtol=1e-6, atol=0)


def test_two_pixels_by_hand() -> None:
    # Patches of one pixel, identity perceptron: g = (1 + 3) / 2, logits 1 * 2 and 3 * 2, eta = softmax(2, 6).
    module = ConAM(channels=1, patch_size=1)
    with torch.no_grad():
        for layer in (module.fc1, module.fc2):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    x = torch.tensor([[[[1.0, 3.0]]]])
    low = 1 / (1 + math.exp(4))
    torch.testing.assert_close(module.confidence(x), torch.tensor([[[low, 1 - low]]]))
    torch.testing.assert_close(module(x), torch.tensor([[[[1 + low, 3 * (2 - low)]]]]))


@pytest.mark.parametrize("hidden", [None, 3, 11])
@pytest.mark.parametrize(("height", "width", "patch_size"), SIZES)
def test_equals_the_oracle(height: int, width: int, patch_size: int, hidden: int | None) -> None:
    module = attention(5, patch_size, hidden, dtype=torch.float64)
    assert_equals_oracle(module, noise(3, 5, height, width, dtype=torch.float64))


@settings(deadline=None, max_examples=80)
@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 6),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    patch_size=st.integers(1, 16),
    hidden=st.none() | st.integers(1, 8),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_oracle_everywhere(
    images: int,
    channels: int,
    height: int,
    width: int,
    patch_size: int,
    hidden: int | None,
    scale: float,
    channels_last: bool,
    seed: int,
) -> None:
    module = attention(channels, patch_size, hidden, seed=seed, dtype=torch.float64)
    x = noise(images, channels, height, width, seed=seed, scale=scale, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    assert_equals_oracle(module, x)


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
def test_confidence_is_a_distribution_over_patches(shape: tuple[int, ...]) -> None:
    confidence = attention().confidence(noise(*shape))
    assert confidence.shape == (2, 4, 6)
    assert (confidence > 0).all()
    assert confidence.flatten(1).std(dim=1).min() > 1e-3, "the test's weights should not make it uniform"
    torch.testing.assert_close(confidence.sum(dim=(1, 2)), torch.ones(2))


def test_asking_for_the_confidence_changes_nothing() -> None:
    module, x = attention(), noise(*DIVIDED)
    before = copy.deepcopy(module.state_dict())
    first = module(x)
    confidence = module.confidence(x)
    assert torch.equal(module(x), first)
    assert torch.equal(module.confidence(x), confidence)
    assert {key: tensor.tolist() for key, tensor in module.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in before.items()
    }


# Derivatives


@pytest.mark.parametrize("side", [4, 5])
def test_gradients(side: int) -> None:
    module = attention(3, 2, 4, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def both(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        output = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return output, equations.confidence_map(x, module.patch_size, *parameters)

    inputs = [noise(2, 3, side, side, dtype=torch.float64), *(p.detach().clone() for p in module.parameters())]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)


# Number formats


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_leaves_a_float32_map_alone(low: torch.dtype, shape: tuple[int, ...]) -> None:
    module, x = attention(), noise(*shape)
    confidence, output = module.confidence(x), module(x)
    with torch.autocast("cpu", dtype=low):
        assert torch.equal(module.confidence(x), confidence)
        assert torch.equal(module(x), output)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_embeds_in_float32(low: torch.dtype) -> None:
    # Patches of one pixel: the means of a half-precision map are its own values, and all that follows is float32.
    module, x = attention(patch_size=1), noise(2, 6, 5, 5).to(low)
    with torch.autocast("cpu", dtype=low):
        confidence = module.confidence(x)
        output = module(x)
    assert confidence.dtype == torch.float32
    assert output.dtype == low
    torch.testing.assert_close(confidence, module.confidence(x.float()))


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
@pytest.mark.parametrize(("low", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_autocast_rounds_patch_means_once(low: torch.dtype, epsilon: float, shape: tuple[int, ...]) -> None:
    module, x = attention(), noise(*shape).to(low)
    with torch.autocast("cpu", dtype=low):
        logits = module.confidence(x).log()
    exact = module.confidence(x.float()).log()
    # A mean m carries an error of epsilon * |m|; the logits are quadratic in the means.
    assert (logits - exact).abs().max() < 20 * epsilon * exact.abs().max()


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
@pytest.mark.parametrize(("low", "tolerance"), [(torch.bfloat16, 2**-5), (torch.float16, 2**-8)])
def test_half_precision_module(low: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    module, x = attention().to(low), noise(*shape).to(low)
    output, confidence = module(x), module.confidence(x)
    assert output.dtype == low
    assert confidence.dtype == torch.float32
    reference = copy.deepcopy(module).float()  # the same rounded weights
    torch.testing.assert_close(output.float(), reference(x.float()), rtol=tolerance, atol=tolerance)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == low and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("size", [32, 31])  # in few passes, and by the equations
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_bfloat16_map_gets_confidences_finer_than_bfloat16_is_beside_one(
    layout: torch.memory_format, size: int
) -> None:
    torch.manual_seed(0)
    module, x = ConAM(16, 8), torch.rand(4, 16, size, size).bfloat16().contiguous(memory_format=layout)
    confidence = module.confidence(x).detach()
    assert confidence.std() < 2**-8  # half a step of bfloat16 between one and two
    before, after = (equations.patch_means(each.detach().float(), 8).sum(1) for each in (x, module(x)))
    both = torch.stack([(after / before - 1).flatten(), confidence.flatten()])
    assert both.corrcoef()[0, 1] > 0.9


def test_float64_stays_float64() -> None:
    module, x = attention(dtype=torch.float64), noise(*DIVIDED, dtype=torch.float64)
    assert module(x).dtype == module.confidence(x).dtype == torch.float64


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
@pytest.mark.parametrize("sign", ["positive", "by patch", "by pixel"])
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e37), (torch.bfloat16, 1e37), (torch.float16, 3e4)])
def test_huge_activations_stay_finite(dtype: torch.dtype, value: float, sign: str, shape: tuple[int, ...]) -> None:
    module = attention(patch_size=8).to(dtype)  # the sum of 64 values of 1e37 is no float32 any more
    x = torch.full(shape, value, dtype=dtype)
    if sign == "by patch":
        x[..., :8] *= -1
    elif sign == "by pixel":
        x *= noise(*shape).sign().to(dtype)
    x.requires_grad_()
    confidence, output = module.confidence(x), module(x)
    assert confidence.isfinite().all()
    assert output.isfinite().all()
    torch.testing.assert_close(confidence.sum(dim=(1, 2)), torch.ones(2))


def test_nan_is_not_hidden() -> None:
    module, x = attention(), noise(*DIVIDED)
    clean = module(x)
    x[0, 2, 3, 5] = math.nan
    output, confidence = module(x), module.confidence(x)
    assert confidence[0].isnan().all(), "one NaN pixel makes the image's global context NaN"
    assert output[0].isnan().all()
    assert torch.equal(output[1], clean[1]), "the other image is untouched"


# Memory format and traffic


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format: torch.memory_format, shape: tuple[int, ...]) -> None:
    module, x = attention(), noise(*shape)
    laid_out = x.to(memory_format=memory_format)
    output = module(laid_out)
    assert output.is_contiguous(memory_format=memory_format)
    assert output.stride() == laid_out.stride()
    torch.testing.assert_close(output, module(x))


class Recorder(TorchDispatchMode):
    """Counts the operators that read a tensor as large as the map, and those that produce a new one."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.readers: Counter[str] = Counter()
        self.full_size: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ("_unsafe_view", "new_empty"):  # neither reads
            return result
        self.readers[name] += any(isinstance(arg, Tensor) and arg.numel() >= self.numel for arg in args)
        in_place = any(result is arg for arg in args)
        if isinstance(result, Tensor) and result.numel() >= self.numel and not in_place:
            self.full_size[name] += 1
        return result


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_map_is_pooled_once_and_multiplied_once(memory_format: torch.memory_format, grad: bool) -> None:
    module = attention(16, 8)
    x = noise(4, 16, 32, 32).to(memory_format=memory_format).requires_grad_(grad)
    with torch.set_grad_enabled(grad), Recorder(x.numel()) as recorder:
        module(x)
    assert recorder.full_size == {"mul": 1}, "nothing but the scaling may write a map"
    assert recorder.readers.total() == 2, "it is read to be pooled, and to be scaled"


# Compilers


@scripting
def test_torchscript_saved_and_loaded() -> None:
    module = attention()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for shape in (DIVIDED, UNDIVIDED, (1, 6, 1, 1)):
        x = noise(*shape)
        assert torch.equal(loaded(x), module(x))


def test_fx_trace_serves_all_sizes() -> None:
    module = attention()
    traced = torch.fx.symbolic_trace(module)
    for shape in (DIVIDED, UNDIVIDED, (1, 6, 1, 1)):
        x = noise(*shape)
        assert torch.equal(traced(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(traced(noise(*DIVIDED)), module(noise(*DIVIDED)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
def test_export_with_dynamic_batch(shape: tuple[int, ...]) -> None:
    module = attention().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (noise(*shape),), dynamic_shapes={"x": {0: batch}})
    for images in (1, 5):
        x = noise(images, *shape[1:])
        torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
def test_compiles_to_one_graph(shape: tuple[int, ...]) -> None:
    torch.compiler.reset()
    module, x = attention(), noise(*shape)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = x.bfloat16()
        torch.testing.assert_close(compiled(low), module(low))
    module, x = module.double(), x.double()  # sums of float32 differ in their last digits from processor to processor
    compiled(x).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in module.parameters()])


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    module, x = attention(), noise(*DIVIDED)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_comes_behind_may_change_the_result_in_place(layout: torch.memory_format) -> None:
    module, x = attention(), noise(*DIVIDED).contiguous(memory_format=layout)
    changed, kept = module(x), module(x)
    changed += 1
    changed.relu_()
    ours = torch.autograd.grad(changed.square().sum(), list(module.parameters()))
    theirs = torch.autograd.grad((kept + 1).relu().square().sum(), list(module.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_module_that_is_applied_twice_has_one_gradient_with_and_without_a_graph() -> None:
    module, x = attention().double(), noise(*DIVIDED, dtype=torch.double)
    y = module(module(x)).square().sum()
    plain = torch.autograd.grad(y, list(module.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, list(module.parameters()), create_graph=True), plain)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_many_gradients_at_once_are_those_one_by_one(layout: torch.memory_format) -> None:
    module = attention().double()
    x = noise(1, 6, 8, 8, dtype=torch.double).contiguous(memory_format=layout)
    together = torch.autograd.functional.jacobian(module, x, vectorize=True)
    torch.testing.assert_close(together, torch.autograd.functional.jacobian(module, x))


def test_a_backward_pass_under_vmap_gives_the_gradients_one_by_one() -> None:
    module, x = attention().double(), noise(*DIVIDED, dtype=torch.double).requires_grad_()
    y = module(x)
    directions = noise(3, *y.shape, seed=1, dtype=torch.double)

    def gradient(direction: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, direction, retain_graph=True)[0]

    torch.testing.assert_close(torch.func.vmap(gradient)(directions), torch.stack([*map(gradient, directions)]))


def test_a_backward_pass_within_autocast_stays_in_float32() -> None:
    module, x = attention(), noise(*DIVIDED)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Construction


def test_meta_device_and_dtype() -> None:
    module = ConAM(6, 4, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    for shape in (DIVIDED, UNDIVIDED):
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        output, confidence = module(x), module.confidence(x)
        assert (output.shape, output.dtype, output.device.type) == (x.shape, torch.bfloat16, "meta")
        assert (confidence.shape, confidence.dtype) == ((2, 4, 6), torch.float32)


@pytest.mark.parametrize(("hidden", "width"), [(None, 6), (2, 2)])
def test_state_dict_keys(hidden: int | None, width: int) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in ConAM(6, 4, hidden).state_dict().items()}
    assert shapes == {"fc1.weight": (width, 6), "fc1.bias": (width,), "fc2.weight": (6, width), "fc2.bias": (6,)}


def test_parameters_are_reset_as_they_start() -> None:
    torch.manual_seed(0)
    first = ConAM(8, 4)
    second = copy.deepcopy(first)
    for parameter in second.parameters():
        nn.init.zeros_(parameter)
    torch.manual_seed(0)
    second.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_starts_close_to_the_identity() -> None:
    torch.manual_seed(0)
    confidence = ConAM(16, 8).confidence(noise(4, 16, 32, 32).relu())
    torch.testing.assert_close(confidence, torch.full((4, 4, 4), 1 / 16), rtol=0.2, atol=0)


def test_the_second_bias_starts_at_one_and_the_rest_as_pytorch_has_it() -> None:
    module = ConAM(64, 4, 32)
    assert (module.fc2.bias == 1).all()
    for layer in (module.fc1, module.fc2):
        assert layer.weight.abs().max() <= layer.in_features**-0.5
    assert module.fc1.bias.abs().max() <= module.fc1.in_features**-0.5


def test_whole_numbers_of_numpy_are_sizes() -> None:
    attention = ConAM(np.int64(6), np.uint8(4), np.int32(3))
    sizes = (attention.channels, attention.patch_size, attention.hidden_channels)
    assert sizes == (6, 4, 3)
    assert {type(size) for size in sizes} == {int}
    assert attention(noise(1, 6, 8, 8)).shape == (1, 6, 8, 8)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True])
@pytest.mark.parametrize("argument", ["channels", "patch_size", "hidden_channels"])
def test_bad_sizes_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match="positive integer") as caught:
        ConAM(**{"channels": 6, "patch_size": 4, argument: value})
    assert str(caught.value) == f"ConAM: {argument} is {value!r}, but it must be a positive integer."


def test_prints_its_sizes() -> None:
    assert repr(nn.Sequential(ConAM(6, 4))).count("channels=6, patch_size=4") == 1


def test_a_scripted_module_keeps_dot_product_and_softmax_in_float32_under_autocast() -> None:
    module = ConAM(16, 8)
    scripted = torch.jit.script(module)
    x = torch.randn(2, 16, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        confidence, result = scripted.confidence(x), scripted(x)
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(result, module(x).detach(), atol=0.02, rtol=0.02)


# The backward pass of its own


def by_the_equations(module: ConAM, x: Tensor) -> Tensor:
    confidence = equations.confidence_map(
        x, module.patch_size, module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias
    )
    return equations.recalibrate(x, confidence, module.patch_size)


def gradients_of(output: Tensor, module: ConAM, x: Tensor, weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output, [x, *module.parameters()], weight))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("of_gradient", sorted(LAYOUTS))
@pytest.mark.parametrize("of_map", sorted(LAYOUTS))
def test_its_gradients_are_those_of_the_equations(of_map: str, of_gradient: str) -> None:
    module = attention(dtype=torch.float64)
    x = LAYOUTS[of_map](noise(*DIVIDED, dtype=torch.float64)).requires_grad_()
    weight = LAYOUTS[of_gradient](noise(*DIVIDED, seed=1, dtype=torch.float64))
    assert passes.applies(x, module.patch_size)
    output = module(x)
    assert "InFewPasses" in type(output.grad_fn).__name__
    expected = by_the_equations(module, x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients_of(output, module, x, weight), gradients_of(expected, module, x, weight))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_its_gradients_under_autocast_are_close_to_the_exact_ones(layout: str, low: torch.dtype) -> None:
    module = attention(16, 8)
    x = LAYOUTS[layout](noise(4, 16, 32, 32).to(low)).requires_grad_()
    weight = noise(4, 16, 32, 32, seed=1).to(low)
    with torch.autocast("cpu", dtype=low):
        output = module(x)
    exact = x.detach().double().requires_grad_()
    reference = copy.deepcopy(module).double()
    wanted = gradients_of(by_the_equations(reference, exact), reference, exact, weight.double())
    for found, expected in zip(gradients_of(output, module, x, weight), wanted, strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(low).eps


def test_frozen_parameters_and_a_map_without_gradient() -> None:
    module, x = attention().double(), noise(*DIVIDED).double()
    module.fc1.requires_grad_(False)
    module(x).square().sum().backward()
    assert module.fc1.weight.grad is None
    assert module.fc1.bias.grad is None
    found = module.fc2.weight.grad.clone()
    module.zero_grad()
    by_the_equations(module, x).square().sum().backward()
    torch.testing.assert_close(found, module.fc2.weight.grad)


def test_clamped_patch_means_get_the_gradient_of_the_equations() -> None:
    module = attention(patch_size=8, dtype=torch.float64)
    with torch.no_grad():
        module.fc1.weight *= 1e-17  # the means are huge, the embeddings are not
    x = (noise(*DIVIDED, dtype=torch.float64) * 1e18).requires_grad_()
    clamped = (torch.nn.functional.avg_pool2d(x, 8).abs() > equations.LIMIT).double().mean()
    assert 0.2 < clamped < 0.8
    weight = noise(*DIVIDED, seed=1, dtype=torch.float64)
    found, expected = (gradients_of(f(x), module, x, weight) for f in (module, lambda x: by_the_equations(module, x)))
    torch.testing.assert_close(found, expected)


def test_transforms_and_checkpointing_get_the_same_gradients() -> None:
    module = attention(dtype=torch.float64)
    x = noise(*DIVIDED, dtype=torch.float64).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return module(x).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    by_image = torch.func.vmap(torch.func.grad(lambda image: loss(image[None])))(x.detach())
    torch.testing.assert_close(by_image, expected)
    _, along = torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected.sum())
    checkpointed = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(checkpointed, x)[0], expected)
    retained = loss(x)
    torch.testing.assert_close(torch.autograd.grad(retained, x, retain_graph=True)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(retained, x)[0], expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_backward_pass_writes_one_gradient_map(memory_format: torch.memory_format) -> None:
    module = attention(16, 8)
    x = noise(4, 16, 32, 32).to(memory_format=memory_format).requires_grad_()
    output = module(x)
    with Recorder(x.numel()) as recorder:
        output.backward(torch.ones_like(x))
    # besides the sum of both terms: the seed of ones, and the product inside the dot products
    assert recorder.full_size.total() == 3

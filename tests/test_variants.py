"""The forms of ConAM: the default is ConAM, every switch does what its equation says, and nets are built with them."""

import io
import itertools
import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import timm
import torch
from oracles.variant_oracle import conam_variant
from timm.models import save_for_hf
from torch import Tensor, nn

from conam_zoo import ConAM
from experiments.accuracy.forms import ConAMVariant, ConAMVariantConfig

DIVIDED, UNDIVIDED = (2, 6, 8, 12), (2, 6, 7, 10)
FORMS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "no shortcut": {"shortcut": False},
    "one ReLU": {"second_relu": False},
    "local": {"context": "local"},
    "global": {"context": "global"},
    "global, sigmoid": {"context": "global", "gate": "sigmoid"},
    "sigmoid": {"gate": "sigmoid"},
    "tanh": {"gate": "tanh"},
    "tanh, not centred": {"gate": "tanh_uncentred", "second_relu": False},
    "a head for each channel": {"gate": "tanh_uncentred", "agreement": "scaled_dot", "heads": 6, "second_relu": False},
    "a sigmoid for each channel": {"gate": "sigmoid", "heads": 0, "second_relu": False, "shortcut": False},
    "a term for each channel": {"gate": "sigmoid", "channel_term": True, "second_relu": False, "shortcut": False},
    "a term for each channel, heads": {
        "gate": "tanh_uncentred",
        "channel_term": True,
        "heads": 2,
        "agreement": "scaled_dot",
        "identity_start": True,
    },
    "a term for each channel, local": {"gate": "sigmoid", "channel_term": True, "context": "local"},
    "bottleneck": {"reduction": 3},
    "narrowest bottleneck": {"reduction": 100},
    "scaled dot": {"agreement": "scaled_dot", "heads": 2},
    "cosine": {"agreement": "cosine"},
    "cosine with signs": {"agreement": "cosine", "second_relu": False},
    "heads": {"heads": 3},
    "mean one": {"scaling": "mean_one", "shortcut": False},
    "mean one of sigmoids": {"scaling": "mean_one", "gate": "sigmoid"},
    "mean zero, from the identity": {"scaling": "mean_zero", "identity_start": True, "heads": 2},
    "from the identity": {"identity_start": True},
}
scripting = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def variant(dtype: torch.dtype = torch.float32, **switches: Any) -> ConAMVariant:
    """A module of 6 channels with weights that make its confidences uneven, t and s among them."""
    module = ConAMVariant(6, 4, ConAMVariantConfig(**switches), dtype=dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters(), start=1):
            parameter.copy_(noise(*parameter.shape, seed=seed) * 2 / math.sqrt(6))
    return module


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED, (1, 6, 1, 1), (1, 6, 3, 9)])
def test_the_default_is_conam(shape: tuple[int, ...]) -> None:
    form = variant(torch.float64)
    conam = ConAM(6, 4, dtype=torch.float64)
    conam.load_state_dict(form.state_dict())
    x, y = (noise(*shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    upstream = noise(*shape, seed=9, dtype=torch.float64)
    torch.testing.assert_close(form.confidence(x), conam.confidence(y), rtol=1e-12, atol=1e-300)
    (form(x) * upstream).sum().backward()
    (conam(y) * upstream).sum().backward()
    torch.testing.assert_close(form(x), conam(y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(form.parameters(), conam.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_the_default_is_conam_in_low_precision(dtype: torch.dtype, rtol: float) -> None:
    # ConAM's global context is the mean of patch means rounded to the map's type, the variant's is not rounded before.
    form = variant().to(dtype)
    conam = ConAM(6, 4, dtype=dtype)
    conam.load_state_dict(form.state_dict())
    x = noise(*DIVIDED).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert form(x).dtype == conam(x).dtype == dtype
            assert form.confidence(x).dtype == torch.float32
            torch.testing.assert_close(form.confidence(x), conam.confidence(x), rtol=rtol, atol=0)
            torch.testing.assert_close(form(x), conam(x))


@pytest.mark.parametrize("shape", [DIVIDED, UNDIVIDED])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_equals_its_equations(name: str, shape: tuple[int, ...]) -> None:
    module = variant(torch.float64, **FORMS[name])
    x = noise(*shape, dtype=torch.float64)
    arrays = [p.detach().numpy() for p in (module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias)]
    ones = torch.zeros(6, dtype=torch.float64)
    temperature = (module.log_temperature if module.log_temperature is not None else ones).exp().detach().numpy()
    gain = (module.gain if module.gain is not None else ones).detach().numpy()
    expected = conam_variant(x.numpy(), 4, *arrays, asdict(ConAMVariantConfig(**FORMS[name])), temperature, gain)
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_the_forms_differ() -> None:
    x = noise(*DIVIDED)
    outputs = {name: variant(**switches)(x) for name, switches in FORMS.items()}
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.allclose(outputs[one], outputs[other], atol=1e-4), (one, other)


@pytest.mark.parametrize("name", FORMS)
def test_gradients(name: str) -> None:
    module = variant(torch.float64, **FORMS[name])
    x = noise(1, 6, 5, 8, dtype=torch.float64).requires_grad_()
    names = [n for n, _ in module.named_parameters()]

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [x, *(p.detach().clone().requires_grad_() for p in module.parameters())]
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


def test_mean_zero_with_the_shortcut_is_mean_one_without() -> None:
    x = noise(*DIVIDED)
    one = variant(scaling="mean_one", shortcut=False)(x)
    torch.testing.assert_close(variant(scaling="mean_zero")(x), one)
    torch.testing.assert_close(one, variant(shortcut=False)(x) * 6)  # 6 patches


def test_a_global_context_alone_is_a_constant_behind_a_softmax() -> None:
    x = noise(*DIVIDED)
    torch.testing.assert_close(variant(context="global")(x), x * (1 + 1 / 6))


@pytest.mark.parametrize("scaling", ["none", "mean_one", "mean_zero"])
def test_identity_start(scaling: str) -> None:
    torch.manual_seed(0)
    module = ConAMVariant(16, 4, ConAMVariantConfig(scaling=scaling, identity_start=True, heads=2))
    x = noise(2, 16, 7, 10)
    output = module(x)
    assert torch.equal(output, x)
    output.square().sum().backward()
    assert module.gain is not None
    assert module.gain.grad is not None
    assert module.gain.grad.abs().min() > 0, "the factor must be able to leave zero"


def test_unit_start() -> None:
    torch.manual_seed(0)
    module = ConAMVariant(16, 4, ConAMVariantConfig(gate="sigmoid", heads=0, second_relu=False, unit_start=True))
    assert torch.equal(module.fc2.bias, torch.ones(16))
    torch.manual_seed(0)
    plain = ConAMVariant(16, 4, ConAMVariantConfig(gate="sigmoid", heads=0, second_relu=False))
    assert torch.equal(module.fc1.weight, plain.fc1.weight)
    assert torch.equal(module.fc2.weight, plain.fc2.weight)
    x = noise(2, 16, 8, 8)
    assert (module.agreement_logits(x) - 1).abs().mean() < 0.5 < (plain.agreement_logits(x) - 1).abs().mean()


GATES_BELOW_ONE = [
    ({"gate": "tanh"}, 0, 2),
    # By the sign of the factor s, which is negative in one head.
    ({"gate": "tanh_uncentred", "second_relu": False, "identity_start": True, "heads": 6}, -1, 3),
    ({"scaling": "mean_zero"}, 0, 6),
]


@pytest.mark.parametrize(("switches", "low", "high"), GATES_BELOW_ONE)
def test_a_gate_can_go_below_one(switches: dict[str, Any], low: float, high: float) -> None:
    factor = variant(**switches)(torch.ones(1, 6, 8, 12) + noise(1, 6, 8, 12).abs()) / (1 + noise(1, 6, 8, 12).abs())
    assert low <= factor.min() < 0.99
    assert 1.01 < factor.max() <= high


BAD_SWITCHES = [
    ({"shortcut": 1}, "shortcut is 1, but it must be true or false"),
    ({"context": "none"}, "context is 'none', but it must be one of both, local, global"),
    ({"gate": "Softmax"}, "gate is 'Softmax', but it must be one of softmax, sigmoid, tanh, tanh_uncentred"),
    ({"agreement": None}, "agreement is None, but it must be one of dot, scaled_dot, cosine"),
    ({"scaling": 1}, "scaling is 1, but it must be one of none, mean_one, mean_zero"),
    ({"reduction": 0}, "reduction is 0, but it must be a positive integer"),
    ({"heads": 2.0}, "heads is 2.0, but it must be a positive integer"),
    ({"heads": 5}, "heads is 5, but it must divide the 16 channels"),
    ({"shortcut": False, "identity_start": True}, "identity_start is on, but it needs the shortcut"),
    ({"shortcut": False, "gate": "tanh"}, "but shortcut is off: set it to true"),
    ({"gate": "tanh", "scaling": "mean_one"}, "the mean of a tanh gate can be zero: use 'none'"),
    ({"gate": "tanh_uncentred", "scaling": "mean_zero"}, "the mean of a tanh_uncentred gate can be zero: use 'none'"),
    ({"channel_term": True}, "channel_term is on, but behind the gate 'softmax'"),
    ({"channel_term": True, "gate": "tanh"}, "channel_term is on, but behind the gate 'tanh'"),
    ({"shortcut": False, "gate": "tanh_uncentred"}, "but shortcut is off: set it to true"),
    ({"shortcuts": True}, "attn_args has 'shortcuts', but a conam_variant knows only shortcut, second_relu"),
]


@pytest.mark.parametrize(("switches", "sentence"), BAD_SWITCHES, ids=str)
def test_bad_switches_are_refused(switches: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^attn_args") as caught:
        timm.create_model("resnet20_conam", device="meta", attn_layer="conam_variant", attn_args=switches)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("argument", ["channels", "patch_size"])
@pytest.mark.parametrize("value", [0, 2.0, True])
def test_bad_sizes_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument} is {value!r}, but it must be a positive integer"):
        ConAMVariant(**{"channels": 6, "patch_size": 4, argument: value})


# In the nets


def net(name: str = "resnet20_conam", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_conam", "wide_resnet16_4_conam", "densenet40_12_conam"])
def test_nets_train_with_a_variant(name: str) -> None:
    model = net(name, attn_layer="conam_variant", attn_args={"agreement": "cosine", "scaling": "mean_zero", "heads": 2})
    assert sum(isinstance(module, ConAMVariant) for module in model.modules()) == 3
    model(noise(2, 3, 16, 16)).square().sum().backward()
    assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_net_with_the_default_form_is_the_paper_s_net() -> None:
    paper, form = net().eval(), net(attn_layer="conam_variant").eval()
    form.load_state_dict(paper.state_dict())
    x = noise(2, 3, 32, 32)
    torch.testing.assert_close(form(x), paper(x))


def test_other_layers_have_no_switches() -> None:
    with pytest.raises(ValueError, match=r"attn_args is .* but it must be empty for attn_layer 'se'"):
        net(attn_layer="se", attn_args={"shortcut": False})


@pytest.mark.parametrize("name", ["resnet20_conam", "resnet50_conam", "wide_resnet16_4_conam"])
def test_a_site_after_the_last_norm(name: str) -> None:
    model = net(name, attn_site="after_last_norm").eval()
    record: dict[str, tuple[Tensor, Tensor]] = {}
    block = "layer2.0"
    last_norm = "act2" if name.startswith("wide") else "bn3" if name == "resnet50_conam" else "bn2"
    first_input = {"resnet20_conam": "conv1", "resnet50_conam": "conv1", "wide_resnet16_4_conam": "conv1"}[name]
    for part in (last_norm, "attn", first_input):
        model.get_submodule(f"{block}.{part}").register_forward_hook(
            lambda _, inputs, output, part=part: record.__setitem__(part, (inputs[0].clone(), output.clone()))
        )
    raw: list[Tensor] = []
    before = "act1" if name.startswith("wide") else ""
    module = model.get_submodule(f"{block}.{before}" if before else block)
    if before:
        module.register_forward_hook(lambda _, inputs, output: raw.append(output.clone()))
    else:
        module.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0].clone()))
    with torch.no_grad():
        model(noise(1, 3, 32, 32))
    assert torch.equal(record["attn"][0], record[last_norm][1])
    assert not torch.equal(record["attn"][1], record["attn"][0])
    assert torch.equal(record[first_input][0], raw[0]), "the first convolution sees the map without attention"
    attn = model.get_submodule(f"{block}.attn")
    assert attn.confidence(record["attn"][0]).shape[1:] == (4, 4)
    assert [n.rpartition(".")[0] for n, m in model.named_modules() if isinstance(m, ConAM)] == [
        "layer1.0",
        "layer2.0",
        "layer3.0",
    ]


@pytest.mark.parametrize("name", ["resnet20_conam", "densenet40_12_conam"])
def test_unknown_sites_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="attn_site is 'behind', but it must be one of before_first_conv"):
        net(name, attn_site="behind")


def test_a_densenet_has_one_site() -> None:
    with pytest.raises(ValueError, match="attn_site is 'after_last_norm', but it must be before_first_conv"):
        net("densenet40_12_conam", attn_site="after_last_norm")


def test_the_arguments_survive_timm_s_folder(tmp_path) -> None:
    arguments = {
        "attn_layer": "conam_variant",
        "attn_placement": "block",
        "patch_sizes": [4, 8, 2],
        "attn_args": {"gate": "sigmoid", "heads": 4},
        "attn_site": "after_last_norm",
    }
    model = net(**arguments).eval()
    assert model.attention_arguments() == arguments
    assert json.loads(json.dumps(arguments)) == arguments
    save_for_hf(model, str(tmp_path), safe_serialization=True, model_args=model.attention_arguments())
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = noise(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert loaded.attention_arguments() == arguments


def test_the_paper_s_form_needs_no_new_arguments() -> None:
    assert net(device="meta").attention_arguments() == {
        "attn_layer": "conam",
        "attn_placement": "stage",
        "patch_sizes": [8, 8, 4],
    }


# Compilers


@scripting
@pytest.mark.parametrize("name", FORMS)
def test_torchscript_and_fx(name: str) -> None:
    module = variant(**FORMS[name])
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    scripted, traced = torch.jit.load(buffer), torch.fx.symbolic_trace(module)
    for shape in (DIVIDED, UNDIVIDED):
        x = noise(*shape)
        torch.testing.assert_close(scripted(x), module(x))
        assert torch.equal(traced(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["the paper's", "mean zero, from the identity", "cosine"])
def test_export_with_dynamic_batch(name: str) -> None:
    module = variant(**FORMS[name]).eval()
    program = torch.export.export(
        module, (noise(*UNDIVIDED),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}
    ).module()
    for images in (1, 5):
        x = noise(images, *UNDIVIDED[1:])
        torch.testing.assert_close(program(x), module(x))


@pytest.mark.slow
@scripting
@pytest.mark.parametrize("name", ["resnet20_conam", "wide_resnet16_4_conam"])
def test_a_net_with_the_other_site_is_scripted(name: str) -> None:
    model = net(name, attn_site="after_last_norm", attn_layer="conam_variant", attn_args={"gate": "tanh"}).eval()
    x = noise(1, 3, 16, 16)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_meta_device_and_dtype() -> None:
    form = ConAMVariantConfig(identity_start=True, agreement="cosine")
    module = ConAMVariant(6, 4, form, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    x = torch.empty(UNDIVIDED, device="meta", dtype=torch.bfloat16)
    assert (module(x).shape, module(x).dtype) == (x.shape, torch.bfloat16)

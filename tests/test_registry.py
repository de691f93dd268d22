"""The one list of attentions: names, factories, attentions of one's own in every family and folder, clear refusals."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import conam_zoo
import conam_zoo.layers.registry
from conam_zoo.errors import UserError
from conam_zoo.layers.registry import attention_names, create_attention
from conam_zoo.models.registry import export_model, open_model

SMALL = ["resnet20_conam", "wide_resnet16_4_conam", "densenet40_12_conam"]
ROOT = Path(__file__).parents[1]


class Gain(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int, patch_size: int, *, start: float = 1.0, device: Any = None, dtype: Any = None):
        super().__init__()
        self.gain = nn.Parameter(torch.full((channels, 1, 1), start, device=device, dtype=dtype))
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> str:
    """``Gain``, registered for one test."""
    monkeypatch.setattr(conam_zoo.layers.registry, "FACTORIES", dict(conam_zoo.layers.registry.FACTORIES))
    conam_zoo.register_attention("gain", Gain)
    return "gain"


@pytest.mark.parametrize("placement", ["stage", "block"])
@pytest.mark.parametrize("name", SMALL)
def test_an_attention_of_one_s_own_works_in_every_family(name: str, placement: str, gain: str) -> None:
    net = timm.create_model(name, attn_layer=gain, attn_placement=placement, attn_args={"start": 0.5})
    sites = [module for module in net.modules() if isinstance(module, Gain)]
    conam = timm.create_model(name, attn_placement=placement, device="meta")
    expected = [module.patch_size for module in conam.modules() if isinstance(module, conam_zoo.ConAM)]
    assert [site.patch_size for site in sites] == expected
    assert all(torch.equal(site.gain, torch.full_like(site.gain, 0.5)) for site in sites)
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(site.gain.grad is not None for site in sites)
    exempt = {n for n in net.no_weight_decay() if not n.startswith("_orig_mod.")}
    assert {n for n, _ in net.named_parameters() if n.endswith(".gain")} == exempt


def test_it_is_saved_and_loaded(gain: str, tmp_path: Path) -> None:
    net = timm.create_model("resnet20_conam", attn_layer=gain, attn_args={"start": 0.5}).eval()
    export_model(net, tmp_path, tag=None)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["attn_args"] == {"start": 0.5}
    loaded = open_model(f"local-dir:{tmp_path}")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), net(x))


def test_where_it_is_not_registered_loading_says_so_in_a_sentence(
    gain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(timm.create_model("resnet20_conam", attn_layer=gain), tmp_path, tag=None)
    factories = {k: v for k, v in conam_zoo.layers.registry.FACTORIES.items() if k != gain}
    monkeypatch.setattr(conam_zoo.layers.registry, "FACTORIES", factories)
    with pytest.raises(UserError, match=r"attn_layer is 'gain', but .*conam_zoo.register_attention") as caught:
        open_model(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)

    from conam_zoo.cli import app

    result = CliRunner().invoke(app, ["info", f"local-dir:{tmp_path}"])
    assert isinstance(result.exception, UserError)


@pytest.mark.slow
def test_forms_of_the_ablation_come_with_the_experiments(tmp_path: Path, warm_python: str) -> None:
    import experiments  # noqa: F401

    net = timm.create_model("resnet20_conam", attn_layer="conam_variant", attn_args={"gate": "sigmoid"})
    export_model(net, tmp_path, tag=None)
    program = "{0}\nimport timm, conam_zoo\ntimm.create_model('local-dir:{1}', pretrained=True)"
    for line, succeeds in (("import experiments", True), ("", False)):
        result = subprocess.run(
            [warm_python, "-c", program.format(line, tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert (result.returncode == 0) == succeeds, result.stderr
    assert "attn_layer is 'conam_variant', but it must be one of none, conam," in result.stderr.splitlines()[-1]
    assert "'import experiments'" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "factory", "error", "sentence"),
    [
        ("conam", Gain, ValueError, "is 'conam', but that is a built-in attention: choose another name"),
        ("none", Gain, ValueError, "is 'none', but that is a built-in attention"),
        ("", Gain, ValueError, "is '', but it must be made of letters"),
        ("my attention", Gain, ValueError, "is 'my attention', but it must be made of letters"),
        (3, Gain, ValueError, "is 3, but it must be made of letters"),
        ("mine", "Gain", TypeError, "attention 'mine' is 'Gain', but it must be callable"),
    ],
)
def test_bad_registrations_are_refused(name: Any, factory: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        conam_zoo.register_attention(name, factory)
    assert name == "conam" or name == "none" or name not in attention_names()


def test_a_factory_that_cannot_be_called_or_makes_no_module_is_named(gain: str) -> None:
    conam_zoo.register_attention("gain", lambda channels: Gain(channels, 1))
    with pytest.raises(ValueError, match=r"factory of attn_layer 'gain' cannot be called with \(channels, patch_size"):
        create_attention("gain", 16, 8)
    conam_zoo.register_attention("gain", lambda channels, patch_size, device, dtype: "module")
    with pytest.raises(TypeError, match="factory of attn_layer 'gain' returned 'module', but it must return a module"):
        create_attention("gain", 16, 8)


@pytest.mark.parametrize(
    ("name", "arguments", "remedy"),
    [
        ("none", {"a": 1}, "be empty for attn_layer 'none'"),
        ("se", {"a": 1}, "be empty for attn_layer 'se'"),
        ("conam", {"a": 1}, "hold no more than hidden_channels for attn_layer 'conam'"),
        ("gain", {"a": 1}, "hold no more than start for attn_layer 'gain'"),
    ],
)
def test_unknown_arguments_are_refused(name: str, arguments: dict[str, Any], remedy: str, gain: str) -> None:
    with pytest.raises(ValueError, match=rf"^attn_args is \{{'a': 1\}}, but it must {remedy}\.$"):
        timm.create_model("resnet20_conam", device="meta", attn_layer=name, attn_args=arguments)


@pytest.mark.parametrize("name", ["channels", "patch_size", "device", "dtype", "name"])
def test_arguments_that_the_net_gives_itself_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^attn_args is \{{'{name}': 1\}}, but it must hold no more than hidden"):
        timm.create_model("resnet20_conam", device="meta", attn_args={name: 1})


def test_arguments_reach_the_factory() -> None:
    net = timm.create_model("resnet20_conam", device="meta", attn_args={"hidden_channels": 5})
    assert {m.hidden_channels for m in net.modules() if isinstance(m, conam_zoo.ConAM)} == {5}


@pytest.mark.slow
def test_the_documentation_lists_every_built_in_attention(warm_python: str) -> None:
    program = "import conam_zoo.layers.registry as r; print(*r.attention_names())"
    names = subprocess.run([warm_python, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    (row,) = [
        line for line in (ROOT / "docs" / "conam.md").read_text().splitlines() if line.startswith("| `attn_layer`")
    ]
    assert [name for name in names if f"`{name}`" not in row] == []

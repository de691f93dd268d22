"""Weight decay leaves attention alone, also by timm's own means."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from conftest import PLAIN_RECIPE
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor

from conam_zoo.models.conam_densenet import ConAMDenseNet
from conam_zoo.models.conam_resnet import ConAMResNet
from conam_zoo.models.conam_wide_resnet import ConAMWideResNet
from conam_zoo.training.recipe import Recipe, load_recipe
from conam_zoo.training.train_state import TrainState

LR, DECAY, STEPS = 0.1, 0.5, 8
NETS: dict[str, Callable[..., torch.nn.Module]] = {
    "resnet": lambda **options: ConAMResNet("basic", (1, 1, 1), (16, 16, 16), **options),
    "wide": lambda **options: ConAMWideResNet(10, 1, **options),
    "dense": lambda **options: ConAMDenseNet(10, 4, **options),
}


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def decay_alone(net: torch.nn.Module, **options: Any) -> dict[str, float]:
    """By what factor the norm of every weight changes, in steps with a gradient of zero everywhere."""
    before = {name: p.detach().norm() for name, p in net.named_parameters() if p.ndim > 1}
    optimizer = create_optimizer_v2(options.pop("params", net), opt="momentum", lr=LR, momentum=0.0, **options)
    for _ in range(STEPS):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return {name: (net.get_parameter(name).detach().norm() / norm).item() for name, norm in before.items()}


@pytest.mark.parametrize("grouping", ["factory", "factory with layer decay", "layer decay"])
@pytest.mark.parametrize("layer", ["conam", "se", "eca", "cbam", "gc", "coord"])
@pytest.mark.parametrize("family", NETS)
def test_decay_shrinks_the_net_but_not_its_attention(family: str, layer: str, grouping: str) -> None:
    torch.manual_seed(0)
    net = NETS[family](attn_layer=layer, attn_placement="block")
    options: dict[str, Any] = {"weight_decay": DECAY}
    if grouping == "factory with layer decay":
        options["layer_decay"] = 1.0
    if grouping == "layer decay":
        options["params"] = param_groups_layer_decay(
            net, weight_decay=DECAY, layer_decay=1.0, no_weight_decay_list=net.no_weight_decay()
        )
    changed = decay_alone(net, **options)
    attention = {name: factor for name, factor in changed.items() if ".attn." in name}
    others = {name: factor for name, factor in changed.items() if ".attn." not in name}
    assert len(attention) >= 3
    assert all(factor == 1.0 for factor in attention.values()), attention
    assert others == pytest.approx(dict.fromkeys(others, (1 - LR * DECAY) ** STEPS), rel=1e-5)


@pytest.mark.parametrize("layer", ["conam", "se", "cbam"])
def test_attention_keeps_its_size_in_training_with_strong_decay(layer: str) -> None:
    torch.manual_seed(0)
    net = NETS["resnet"](attn_layer=layer).train()
    before = {name: p.detach().norm() for name, p in net.named_parameters() if p.ndim > 1}
    optimizer = create_optimizer_v2(net, opt="sgd", lr=0.01, momentum=0.9, weight_decay=5.0)
    for step in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images(step)), torch.arange(4)).backward()
        optimizer.step()
    after = {name: (net.get_parameter(name).detach().norm() / norm).item() for name, norm in before.items()}
    assert all(factor > 0.9 for name, factor in after.items() if ".attn." in name), after
    assert all(factor < 0.7 for name, factor in after.items() if ".attn." not in name), after


def recipe() -> Recipe:
    loaded = load_recipe(PLAIN_RECIPE, ["epochs=2", "batch_size=4", "warmup_epochs=0.5", "precision=fp32"])
    return replace(loaded, weight_decay=0.05, lr=0.05, ema_decay=0.0, mixup=0.0, cutmix=0.0)


def steps(state: TrainState, first: int, last: int) -> None:
    state.train()
    for number in range(first, last):
        state.accumulate([(images(number), torch.arange(4))], 4)
        state.step(number + 1)


@pytest.mark.parametrize("layer", ["conam", "none"])
@pytest.mark.parametrize("family", NETS)
def test_attention_takes_its_own_share_of_a_step(family: str, layer: str) -> None:
    changes = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        net = NETS[family](attn_layer=layer)
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        state = TrainState(net, replace(recipe(), warmup_epochs=0.0, attn_lr_scale=scale), 6)
        assert state.lr == recipe().lr
        steps(state, 0, 1)
        changes.append({name: parameter.detach() - before[name] for name, parameter in net.named_parameters()})
    whole, part = changes
    attention = [name for name in whole if ".attn." in name]
    assert bool(attention) == (layer == "conam")
    for name, change in whole.items():
        torch.testing.assert_close(part[name], change * (0.25 if name in attention else 1.0), rtol=1e-3, atol=1e-7)
    assert all(whole[name].abs().amax() > 1e-6 for name in attention if name.endswith("fc2.bias"))


def snapshot(state: TrainState) -> dict[str, Any]:
    copied = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    optimizer = state.optimizer.state_dict()
    buffers = {
        number: {k: v.clone() if torch.is_tensor(v) else v for k, v in values.items()}
        for number, values in optimizer["state"].items()
    }
    return {"model": copied, "ema": None, "optimizer": {**optimizer, "state": buffers}}


@pytest.mark.parametrize("feature_cls", ["list", "dict", "getter", "fx", "hook"])
def test_a_feature_net_exempts_its_attention_too(feature_cls: str) -> None:
    net = timm.create_model("resnet20_conam", features_only=True, feature_cls=feature_cls)
    optimizer = create_optimizer_v2(copy.deepcopy(net), opt="sgd", lr=LR, weight_decay=DECAY)
    decayed = [p.shape for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    own = {name: p.shape for name, p in net.named_parameters() if p.ndim > 1}
    attention = [shape for name, shape in own.items() if ".attn." in name]
    assert len(attention) == 6
    assert sorted(decayed) == sorted(shape for name, shape in own.items() if ".attn." not in name)


def test_a_compiled_net_exempts_its_attention_too() -> None:
    net = torch.compile(timm.create_model("resnet20_conam"))
    optimizer = create_optimizer_v2(net, opt="sgd", lr=LR, weight_decay=DECAY)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert len(decayed) == 22  # convolutions and fc
    assert not decayed & {id(p) for name, p in net.named_parameters() if ".attn." in name}


def test_a_run_of_today_goes_on_without_decay_of_its_attention() -> None:
    torch.manual_seed(0)
    today = TrainState(NETS["resnet"](), recipe(), 6)
    steps(today, 0, 3)
    resumed = TrainState(NETS["resnet"](), recipe(), 6)
    resumed.load(snapshot(today), 3)
    exempt = {id(p) for name, p in resumed.model.named_parameters() if name in resumed.model.no_weight_decay()}
    decayed = {id(p) for group in resumed.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert exempt
    assert not exempt & decayed


def test_the_state_of_another_net_is_still_refused() -> None:
    state = TrainState(NETS["resnet"](), recipe(), 6)
    saved = snapshot(state)
    saved["optimizer"]["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match=r"group|shorter|longer"):
        state.load(saved, 0)

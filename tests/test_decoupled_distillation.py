"""Decoupled distillation against an oracle in NumPy, its warm-up, and that its gradients stay finite."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import PLAIN_RECIPE
from oracles import distillation_oracle as oracle

from conam_zoo.errors import UserError
from conam_zoo.training.distillation import decoupled_loss, distillation_loss
from conam_zoo.training.recipe import load_recipe
from conam_zoo.training.train_state import TrainState

RECIPE = PLAIN_RECIPE


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    return draw.normal(0, 4, (6, 5)), draw.normal(0, 4, (6, 5))


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 8.0), (4.0, 1.0, 2.0), (2.0, 0.5, 0.0)])
def test_the_decoupled_loss_is_that_of_the_paper(logits, temperature: float, alpha: float, beta: float) -> None:
    student, teacher = (torch.from_numpy(array) for array in logits)
    classes = torch.tensor([0, 4, 2, 2, 1, 3])
    hard = decoupled_loss(student, teacher, classes, temperature, alpha=alpha, beta=beta).item()
    assert hard == pytest.approx(oracle.dkd(*logits, np.eye(5)[classes.numpy()], temperature, alpha, beta))
    # Of one-hot shares the same; of mixed ones each class is the target in turn, the last image's with itself.
    one_hot = torch.eye(5, dtype=torch.float64)
    assert decoupled_loss(student, teacher, one_hot[classes], temperature, alpha=alpha, beta=beta).item() == (
        pytest.approx(hard)
    )
    mixed = 0.7 * one_hot[classes] + 0.3 * one_hot[torch.tensor([1, 0, 3, 1, 0, 3])]
    soft = decoupled_loss(student, teacher, mixed, temperature, alpha=alpha, beta=beta).item()
    assert soft == pytest.approx(oracle.dkd(*logits, mixed.numpy(), temperature, alpha, beta))
    assert soft != pytest.approx(hard)


def test_the_plain_loss_is_that_of_the_paper(logits) -> None:
    student, teacher = (torch.from_numpy(array) for array in logits)
    assert distillation_loss(student, teacher, 3.0).item() == pytest.approx(oracle.kd(*logits, 3.0))


@pytest.mark.parametrize("scale", [1e2, 6e4])
@pytest.mark.parametrize("right", [True, False])
def test_gradients_are_finite_for_confident_nets(scale: float, right: bool) -> None:
    teacher = scale * torch.eye(4)
    student = (teacher if right else teacher.roll(1, 0)).clone().requires_grad_()
    loss = decoupled_loss(student, teacher, torch.arange(4), 1.0, alpha=1.0, beta=8.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (loss.item() == pytest.approx(0, abs=1e-4)) == right


def test_a_step_adds_the_ramped_loss_to_the_cross_entropy() -> None:
    settings = ["precision=fp32", "distill_loss=dkd", "dkd_alpha=0.5", "dkd_beta=3", "dkd_warmup_epochs=2"]
    recipe = load_recipe(RECIPE, [*settings, "distill_temperature=2", "batch_size=8", "lr=1e-9"])
    torch.manual_seed(0)
    state = TrainState(timm.create_model("resnet20_conam"), recipe, 2)
    images, labels, guide = torch.randn(8, 3, 32, 32), torch.arange(8), 3 * torch.randn(8, 10)
    state.train()
    losses = {}
    for updates in (1, 2, 3, 4, 5):
        loss, _ = state.accumulate([(images, labels, guide.half())], 8)
        losses[updates - 1] = loss.item() / 8
        state.step(updates)
    with torch.no_grad():
        student = state.model.train()(images)
    own = torch.nn.functional.cross_entropy(student, labels).item()
    learnt = oracle.dkd(student.double().numpy(), guide.half().double().numpy(), np.eye(10)[:8], 2.0, 0.5, 3.0)
    for done, ramp in {0: 0.0, 1: 0.25, 2: 0.5, 4: 1.0}.items():
        assert losses[done] == pytest.approx(own + ramp * learnt, rel=1e-3)
    # A resumed training goes on where the ramp was.
    again = TrainState(state.model, replace(recipe, ema_decay=0.0, final_weights="raw"), 2)
    again.load({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict(), "ema": None}, 2)
    again.train()
    assert again.accumulate([(images, labels, guide.half())], 8)[0].item() / 8 == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize(
    "setting",
    ["distill_loss=dist", "dkd_alpha=-1", "dkd_beta=inf", "dkd_warmup_epochs=-1", "dkd_beta=nan", "min_lr=-0.1",
     "min_lr=9", "mix_share=0", "mix_share=1.5", "attn_lr_scale=0"],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=f"The setting {setting.partition('=')[0]} is .*out of its range"):
        load_recipe(RECIPE, [setting])


def test_recipes_of_before_mean_the_plain_loss(checkout: Path) -> None:
    assert load_recipe("densenet40_12_conam.cifar10").distill_loss == "kd"

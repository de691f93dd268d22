"""Learning from another net's outputs: the teacher, and what is lost on it.

Sources: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, 2015, section 2;
Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, section 3.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conam_zoo.errors import UserError
from conam_zoo.models.registry import open_model, weights_sha256


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the Kullback-Leibler divergence of the student's softened outputs from the teacher's, per image.

    Logits are (N, classes) in float32. T divides both; T^2 keeps the gradients' size independent of it.
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def decoupled_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, *, alpha: float, beta: float
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) of Zhao et al., mean over the images.

    TCKD is the divergence of "target or not", NCKD that among the other classes. For a mixed target each of its two
    classes is the target in turn, weighted by its share: linear in the target, as cross-entropy is, and the ratio
    between the two classes is learnt as well, which it would not be if both were masked as one.

    Logits are (N, classes) in float32, ``targets`` classes (N,), int64, or shares of at most two classes (N, classes).
    """
    student, teacher = student / temperature, teacher / temperature
    if targets.ndim == 1:
        per_image = _decoupled(student, teacher, targets, alpha, beta)
    else:
        shares, classes = targets.topk(2, dim=1)
        parts = [_decoupled(student, teacher, one, alpha, beta) for one in classes.unbind(1)]
        per_image = (shares * torch.stack(parts, 1)).sum(1)
    return temperature**2 * per_image.mean()


def _decoupled(student: Tensor, teacher: Tensor, targets: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha TCKD + beta NCKD of every image (N,), for softened logits; in logarithms, so nothing divides by 0."""
    target = F.one_hot(targets, student.shape[1]).bool()

    def logarithms(logits: Tensor) -> tuple[Tensor, Tensor]:
        others = logits.masked_fill(target, -torch.inf).logsumexp(1, keepdim=True)
        both = torch.cat([logits.gather(1, targets[:, None]), others], 1)
        return both.log_softmax(1), logits - others  # the latter at other classes only

    (student_both, student_rest), (teacher_both, teacher_rest) = logarithms(student), logarithms(teacher)
    tckd = (teacher_both.exp() * (teacher_both - student_both)).sum(1)
    shares = teacher_rest.masked_fill(target, -torch.inf).exp()  # 0 at the target
    nckd = (shares * (teacher_rest - student_rest)).sum(1)
    return alpha * tckd + beta * nckd


class Renormalized(nn.Module):
    """A net that gets images (N, C, H, W) normalised with statistics, (mean, std), other than its own."""

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, own: tuple[Any, Any], given: tuple[Any, Any]) -> None:
        super().__init__()
        self.net = net
        (own_mean, own_std), (mean, std) = (torch.tensor(pair, dtype=torch.float64) for pair in (own, given))
        self.register_buffer("scale", (std / own_std).float().view(1, -1, 1, 1))
        self.register_buffer("shift", ((mean - own_mean) / own_std).float().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.scale + self.shift)


def open_teacher(name: str, student: nn.Module, classes: tuple[str, ...]) -> tuple[nn.Module, dict[str, Any]]:
    """Load a teacher for a student, in evaluation mode and without gradients; with ``name`` and ``sha256`` of it.

    It takes images as the student's configuration normalises them; one for other ``classes``, or another image size, is
    refused.
    """
    net = open_model(name)
    own, given = net.pretrained_cfg, student.pretrained_cfg
    assert isinstance(given, dict)
    if tuple(own.get("label_names") or ()) != classes:
        raise UserError(
            f"The teacher {name} was trained for other classes than those of the data, or in another order: "
            "choose one that was trained on the same classes."
        )
    if tuple(own["input_size"]) != tuple(given["input_size"]):
        raise UserError(
            f"The teacher {name} takes images of {'x'.join(map(str, own['input_size']))}, the student of "
            f"{'x'.join(map(str, given['input_size']))}: choose one of the same size."
        )
    statistics = [(tuple(cfg["mean"]), tuple(cfg["std"])) for cfg in (own, given)]
    teacher = net if statistics[0] == statistics[1] else Renormalized(net, *statistics)
    return teacher.eval().requires_grad_(False), {"name": name, "sha256": weights_sha256(name)}


def known_sha256(name: str) -> str | None:
    """Hash of a teacher's weights as far as it is known without opening them; None for what is not at hand."""
    kind, _, place = name.partition(":")
    there = kind == "local-dir" and (Path(place).expanduser() / "config.json").is_file()
    return weights_sha256(name) if there or not place else None

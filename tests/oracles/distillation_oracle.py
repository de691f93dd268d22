"""The losses of distillation as their papers write them, one image at a time in NumPy's float64.

Hinton et al., arXiv 1503.02531, section 2; Zhao et al., arXiv 2203.08679, section 3.1: b = [p_t, 1 - p_t] is "target or
not", p-hat the softmax over the other classes alone, KD_decoupled = alpha KL(b_T, b_S) + beta KL(p-hat_T, p-hat_S).
"""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def kd(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """T^2 KL, mean over the images."""
    pairs = zip(student, teacher, strict=True)
    return temperature**2 * float(np.mean([kl(softmax(t / temperature), softmax(s / temperature)) for s, t in pairs]))


def dkd_of_image(
    student: np.ndarray, teacher: np.ndarray, target: int, temperature: float, alpha: float, beta: float
) -> float:
    binary, others = [], []
    for logits in (teacher, student):
        p = softmax(logits / temperature)[target]
        binary.append(np.array([p, 1 - p]))
        others.append(softmax(np.delete(logits, target) / temperature))
    return temperature**2 * (alpha * kl(*binary) + beta * kl(*others))


def dkd(
    student: np.ndarray, teacher: np.ndarray, shares: np.ndarray, temperature: float, alpha: float, beta: float
) -> float:
    """Mean over the images; every class with a share is the target in turn."""
    losses = [
        sum(w * dkd_of_image(s, t, c, temperature, alpha, beta) for c, w in enumerate(row) if w > 0)
        for s, t, row in zip(student, teacher, shares, strict=True)
    ]
    return float(np.mean(losses))

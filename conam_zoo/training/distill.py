"""Knowledge distillation: a training in which the net also learns from the outputs of a teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from conam_zoo.training.recipe import Recipe
from conam_zoo.training.train import train

__all__ = ["distill"]


def distill(
    recipe: Recipe,
    data: str | Path,
    output: Path,
    *,
    teacher: str,
    resume: bool = False,
    compile: bool = False,
    checkpoint_minutes: float = 10.0,
    command: str = "",
) -> dict[str, Any]:
    """``train`` with the setting ``teacher``; the loss is (1 - w) * CE + w * T^2 * KL (Hinton et al., 2015).

    w and T are the settings ``distill_weight`` and ``distill_temperature`` of the recipe. The teacher sees the same
    augmented images, in evaluation mode.

    Args:
        recipe: What to train and how.
        data: Where the data set is; see ``conam_zoo.data.read_split``.
        output: The run folder.
        teacher: The net to learn from: a name with weights, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``, trained on
            the same classes and image size.
        resume: Continue from the checkpoint in the run folder.
        compile: Run the net through ``torch.compile``.
        checkpoint_minutes: Time after which the state is saved within an epoch, too.
        command: The command line, for the record.

    Returns:
        What ``run.json`` holds, with the teacher's name and hash under ``teacher``.

    Raises:
        UserError: If there is no such teacher, it does not fit, or anything ``train`` refuses.
        WeightsError: If the teacher's weights cannot be had.
    """
    return train(
        replace(recipe, teacher=teacher),
        data,
        output,
        resume=resume,
        compile=compile,
        checkpoint_minutes=checkpoint_minutes,
        command=command,
    )

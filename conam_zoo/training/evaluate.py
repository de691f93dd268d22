"""Evaluation of a net on a split of a data set, in float32 and without test-time augmentation."""

import difflib
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conam_zoo.data import ImageSplit, open_images
from conam_zoo.data.dataset import LazyImages, image_hashes, read_source
from conam_zoo.data.load import find_sources, of_one_size
from conam_zoo.errors import UserError
from conam_zoo.files import check_suffix, expand_path, write_npz
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import check_takes_rgb
from conam_zoo.training.engine import predict_logits, score
from conam_zoo.training.run_folder import RUN, read_run
from conam_zoo.weights import Metrics

TRAINED_ON = "trained_on.npy"  # in a run folder: the hashes of its training images, sorted
PREPARATION = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}  # of pictures, as resize_image does
PARTS = {"test": "test", "val": "validation", "train": "training"}


@dataclass(frozen=True)
class Evaluation:
    """What a net makes of a split."""

    split: ImageSplit  # with labels in the order of the net's classes
    part: str  # "test", "validation", "training", or "all" of a set that has no splits
    logits: Tensor  # float32, (N, classes), on the CPU
    scores: Metrics
    trained_on: int | None  # how many of the images the net was trained on; None where that is not known
    notes: tuple[str, ...]  # what a person should know about the choice, one sentence each


def run_folder_of(name: str) -> Path | None:
    """The run folder that the weights of a model ``local-dir:RUN/final`` lie in, if it is still there."""
    folder = expand_path(name.removeprefix("local-dir:")).resolve().parent
    return folder if name.startswith("local-dir:") and (folder / RUN).is_file() else None


def evaluate(
    model: StagedClassifier,
    data: str | Path,
    dataset: str | None = None,
    *,
    part: str | None = None,
    corrupt: str | None = None,
    run: Path | None = None,
) -> Evaluation:
    """Evaluate a net on ``data`` (see ``find_sources``), resized and normalised as the net's configuration says.

    ``data`` may also be a folder that holds the published ``dataset`` under its name. ``part`` is a key of ``PARTS``;
    None for the first that there is, which is all images where there are no splits. With the net's ``run`` folder
    (``run_folder_of``), data that the net was fine-tuned on are split as they were there. ``corrupt`` says whether to
    ``"stop"`` at images that cannot be read or to ``"skip"`` them; None for what the run did.
    """
    if part is not None and part not in PARTS:
        raise UserError(f"The split is {part!r}, but it must be one of {', '.join(PARTS)}.")
    if corrupt not in (None, "stop", "skip"):
        raise UserError(f"The choice for corrupt files is {corrupt!r}, but it must be 'stop' or 'skip'.")
    check_takes_rgb(model)
    check_preparation(model)
    facts = (read_run(run) or {}) if run is not None else {}
    averaged = bool(facts.get("recipe", {}).get("image_size"))  # the training saw means of pixels
    facts = facts if "choices" in facts else {}  # only a fine-tuning chose a split
    corrupt = corrupt or facts.get("split_rule", {}).get("corrupt", "skip" if facts.get("unreadable") else "stop")
    trained_on = _trained_on(run) if run is not None else None
    size = model.pretrained_cfg["input_size"][1]
    root = _root(data, dataset)
    sources = find_sources(root, training=False)
    found = _split_of_run(root, sources, size, facts, trained_on, part, corrupt)
    found = found or _split(root, sources, size, part, corrupt, averaged)
    split, name, notes = replace(found[0], labels=_labels(found[0], model)), found[1], list(found[2])
    names = model.pretrained_cfg.get("label_names")
    split = replace(split, classes=tuple(names) if names else split.classes)
    known = None if trained_on is None else int(np.isin(image_hashes(split, size), trained_on).sum())
    if known:
        notes.append(f"The net was trained on {known:,} of these {len(split):,} images: new ones score lower.")
    elif known is None and name == "training":
        notes.append("These are training images: new ones score lower.")
    elif known is None and name == "all" and facts:
        notes.append(f"{run} does not say which images it trained on; if they are among these, new ones score lower.")
    logits = logits_on(model, split).cpu()
    return Evaluation(split, name, logits, score(logits, split.labels.cpu()), known, tuple(notes))


def check_preparation(model: StagedClassifier) -> None:
    """Refuse a net whose configuration has its images prepared in another way than training and evaluation do."""
    cfg = model.pretrained_cfg
    for key, value in PREPARATION.items():
        if (stated := cfg.get(key) or value) != value:
            raise UserError(
                f"The net's configuration has {key} {stated}, but images are prepared here with {value} alone: "
                "evaluate it with timm's validate.py, or change the configuration."
            )
    _, height, width = cfg["input_size"]
    if height != width:
        raise UserError(
            f"The net takes {height} x {width} pixels, but images are prepared here as squares alone: evaluate it with "
            "timm's validate.py."
        )


def write_logits(evaluation: Evaluation, path: Path) -> None:
    """Write ``logits`` (N, classes) as float32, ``labels`` (N,) as int64, ``classes`` and the images' ``names``."""
    check_suffix(path, ".npz")
    split = evaluation.split
    arrays: dict[str, Any] = {
        "logits": evaluation.logits.numpy(),
        "labels": split.labels.cpu().numpy(),
        "classes": np.array(split.classes, dtype=str),
        "names": np.array(split.names, dtype=str),
    }
    write_npz(path, arrays)


def _trained_on(run: Path) -> np.ndarray | None:
    path = run / TRAINED_ON
    if not path.is_file():
        return None
    try:
        return np.asarray(np.load(path, allow_pickle=False), dtype=np.uint64)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore or remove it.") from error


def _root(data: str | Path, dataset: str | None) -> str | Path:
    path = expand_path(data)
    if not path.exists():
        if str(data).startswith("/") or isinstance(data, Path):
            raise UserError(f"The data folder {path} does not exist: pass a folder of images or arrays.")
        return data
    return path / dataset if dataset and (path / dataset).is_dir() else path


def _split_of_run(
    data: str | Path,
    sources: dict[str, LazyImages],
    size: int,
    facts: dict[str, Any],
    trained_on: np.ndarray | None,
    part: str | None,
    corrupt: str,
) -> tuple[ImageSplit, str, list[str]] | None:
    """The split that the run's own rule gives, if these are the images that it was trained on."""
    counts = facts.get("classes")
    if not isinstance(counts, dict) or "train" not in sources or list(sources["train"].classes) != list(counts):
        return None
    here = np.bincount(sources["train"].labels, minlength=len(counts))
    trained = np.array(list(counts.values()), dtype=np.int64)
    if (here < trained).any():
        return None
    rule = {"val_share": 0.1, "seed": facts.get("recipe", {}).get("seed", 0), **facts.get("split_rule", {})}
    if "val" not in sources and rule["val_share"] and here.sum() == trained.sum():
        return None  # none of these was held out
    images = open_images(
        data, image_size=size, val_share=rule["val_share"], seed=rule["seed"], corrupt=corrupt, sources=sources
    )
    if list(images.counts) != list(counts.values()):
        return None
    if trained_on is not None and not np.array_equal(np.sort(image_hashes(images.train, size)), trained_on):
        return None
    parts = {"test": images.test, "val": images.val, "train": images.train}
    chosen = part or ("test" if images.test is not None else "val")
    split = parts[chosen]
    if split is None:
        raise UserError(f"{data} has no {PARTS[chosen]} images: choose another split.")
    notes = [note + "." for note in images.notes]
    return read_source(split, size)[0] if isinstance(split, LazyImages) else split, PARTS[chosen], notes


def _split(
    data: str | Path, sources: dict[str, LazyImages], size: int, part: str | None, corrupt: str, averaged: bool
) -> tuple[ImageSplit, str, list[str]]:
    """The split as the data set has it; with ``averaged``, averaged down to the size from its own."""
    chosen = part or next(each for each in PARTS if each in sources)
    if chosen not in sources:
        there = " and ".join(PARTS[each] for each in sources)
        raise UserError(f"{data} has no {PARTS[chosen]} images, only {there} images: choose another split.")
    source, own = of_one_size(sources[chosen]) if averaged else (sources[chosen], size)
    split, unreadable = read_source(source, own)
    if unreadable and corrupt != "skip":
        raise UserError(
            f"{len(unreadable)} of {len(sources[chosen])} images cannot be read. {unreadable[0].reason} Repair or "
            "remove them, or leave them out with --corrupt skip."
        )
    if not len(split):
        raise UserError(f"{split.source} holds no image that can be read: check the files.")
    notes = [note + "." for source in sources.values() for note in source.notes]
    if unreadable:
        notes.append(f"{len(unreadable)} images cannot be read and are left out, such as {unreadable[0].name}.")
    split = split.averaged_down(size) if averaged else split
    return split, "all" if list(sources) == ["train"] else PARTS[chosen], notes


def _labels(split: ImageSplit, model: StagedClassifier) -> Tensor:
    """The labels of a split in the order of the net's classes."""
    names = model.pretrained_cfg.get("label_names")
    if not names:
        return split.labels
    places = {unicodedata.normalize("NFC", str(name)): place for place, name in enumerate(names)}
    order, present = [], set(split.labels.tolist())
    for label, name in enumerate(split.classes):
        place = places.get(unicodedata.normalize("NFC", name), None if label in present else 0)
        if place is None:
            near = difflib.get_close_matches(name, list(places), n=3) or list(places)[:3]
            raise UserError(
                f"{split.source} has {len(split.classes)} classes, but the model has {len(places)}, and none of them "
                f"is {name!r}: rename it to one of them, such as {', '.join(near)}, or evaluate on other data."
            )
        order.append(place)
    return torch.tensor(order, dtype=torch.int64)[split.labels.cpu()]


def evaluate_on(model: StagedClassifier, split: ImageSplit, *, sharded: bool = False) -> Metrics:
    """Scores of a net on a split that is already read; see ``logits_on``."""
    return score(logits_on(model, split, sharded=sharded), split.labels.to(next(model.parameters()).device))


def logits_on(model: StagedClassifier, split: ImageSplit, *, sharded: bool = False) -> Tensor:
    """float32 logits (N, classes), on the net's device, of a split with the net's classes and image size.

    With ``sharded`` the ranks of a training share the work; all have to call this, with the same weights.
    """
    cfg = model.pretrained_cfg
    names, size = cfg.get("label_names"), tuple(cfg["input_size"][1:])
    if len(split.classes) != model.num_classes:
        raise UserError(
            f"{split.source} has {len(split.classes)} classes, but the model has {model.num_classes}: "
            "evaluate it on the data set that it was trained for."
        )
    if names and tuple(names) != split.classes:
        raise UserError(f"The classes of {split.source} are not those of the model, or in another order.")
    if tuple(split.images.shape[1:3]) != size:
        raise UserError(
            f"The images of {split.source} have {split.images.shape[1]} x {split.images.shape[2]} pixels, but the "
            f"model takes {size[0]} x {size[1]}: resize them."
        )
    model = model.to(memory_format=torch.channels_last)
    images = split.images.to(next(model.parameters()).device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 means float32 on a GPU too
        return predict_logits(model, images, cfg["mean"], cfg["std"], sharded=sharded)

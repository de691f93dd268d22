"""Does starting from our weights beat starting from random weights on few images? Measured on three real sets.

None of the sets is downloaded: the caller has CIFAR-100, the other two are part of scikit-learn and scikit-image.
"""

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from conam_zoo.data import ImageData, ImageSplit, read_split
from conam_zoo.data.arrays import array_source
from conam_zoo.data.dataset import read_source
from conam_zoo.data.transforms import SPLITTING, random_stream
from conam_zoo.errors import UserError
from conam_zoo.finetuning.net import finetune_recipe, net_for_data, train_on
from conam_zoo.models.registry import weights_sha256
from conam_zoo.training.run_folder import describe_environment

SIZE = 32  # pixels
MAX_TEST = 500  # of the images that are not trained on
CLASS_STEP = 10  # of CIFAR-100's classes in alphabetical order
FIRST_CLASS = 5  # bed, camel, couch, girl, lobster, otter, rabbit, skunk, tank, whale: none of them is in CIFAR-10


@dataclass(frozen=True)
class FewImages:
    """A set with few training images."""

    title: str  # what it is, for a table
    draw: Callable[[int], ImageData]  # from a seed to the data: other training images for every seed
    flip: bool  # whether images may be mirrored


def few_of_cifar100(
    data: str | Path, *, per_class: int = 10, first: int = FIRST_CLASS, image_size: int = SIZE
) -> FewImages:
    """Every tenth class of CIFAR-100, with few training images of each and all test images.

    For ``data`` see ``conam_zoo.data.read_split``. ``first`` is the index of the first class that is taken,
    ``image_size`` the side in pixels that the images are resized to.
    """
    train, test = (_every_tenth(read_split(data, split, "cifar100"), first) for split in ("train", "test"))
    title = f"CIFAR-100, {len(train.classes)} classes that CIFAR-10 lacks, {per_class} images of each"
    if image_size != SIZE:
        train, test = (_resized_split(split, image_size) for split in (train, test))
        title += f", resized to {image_size} x {image_size}"
    return FewImages(title, lambda seed: _drawn(train, test, per_class, seed), flip=True)


def digits(*, per_class: int = 5) -> FewImages:
    """scikit-learn's handwritten digits (1,797 grey images of 8 x 8 pixels); 500 others are tested on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("The handwritten digits are part of scikit-learn: pip install scikit-learn.") from error
    loaded = load_digits()
    images = np.round(loaded.images / 16 * 255).astype(np.uint8)
    whole = _resized(images, loaded.target, tuple(str(name) for name in loaded.target_names), "scikit-learn's digits")
    return FewImages(
        f"handwritten digits, 8 x 8, {per_class} images of each",
        lambda seed: _drawn(whole, None, per_class, seed),
        flip=False,
    )


def faces(*, per_class: int = 10) -> FewImages:
    """scikit-image's subset of Labeled Faces in the Wild: 100 faces and 100 other patches, grey, 25 x 25 pixels."""
    try:
        from skimage.data import lfw_subset
    except ImportError as error:
        raise UserError("The face patches are part of scikit-image: pip install scikit-image.") from error
    images = np.round(lfw_subset() * 255).astype(np.uint8)
    labels = np.repeat([0, 1], 100)  # as its documentation says: first the faces
    whole = _resized(images, labels, ("face", "other"), "scikit-image's lfw_subset")
    return FewImages(
        f"faces and other patches, 25 x 25, {per_class} images of each",
        lambda seed: _drawn(whole, None, per_class, seed),
        flip=True,
    )


def _every_tenth(split: ImageSplit, first: int) -> ImageSplit:
    chosen = range(first, len(split.classes), CLASS_STEP)
    wanted = torch.tensor(list(chosen))
    indices = torch.isin(split.labels, wanted).nonzero().flatten()
    labels = torch.searchsorted(wanted, split.labels[indices])
    return ImageSplit(split.images[indices], labels, tuple(split.classes[i] for i in chosen), split.source)


def _resized_split(split: ImageSplit, size: int) -> ImageSplit:
    source = array_source(split.images.numpy(), split.labels.numpy(), split.classes, split.source)
    return read_source(source, size)[0]


def _resized(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], source: str) -> ImageSplit:
    return read_source(array_source(images, labels, classes, source), SIZE)[0]


def _drawn(train: ImageSplit, test: ImageSplit | None, per_class: int, seed: int) -> ImageData:
    """``per_class`` random training images of each class, drawn by the seed.

    Without ``test``, the first ``MAX_TEST`` of the others are the test split.
    """
    stream, labels = random_stream(SPLITTING, seed), train.labels.numpy()
    parts = [stream.permutation(np.flatnonzero(labels == label))[:per_class] for label in range(len(train.classes))]
    chosen = np.sort(np.concatenate(parts))
    rest = np.setdiff1d(np.arange(len(labels)), chosen)[:MAX_TEST]
    return ImageData(
        train=train.select(torch.from_numpy(chosen)),
        val=None,
        test=test if test is not None else train.select(torch.from_numpy(rest)),
        classes=train.classes,
        counts=(per_class,) * len(train.classes),
        image_size=train.images.shape[1],
        median_side=float(train.images.shape[1]),
        source=train.source,
    )


def benchmark_finetune(
    sets: list[FewImages],
    *,
    model: str = "resnet20_conam.cifar10",
    seeds: int = 5,
    epochs: int = 20,
    lr: float | None = None,
    lr_from_scratch: float | None = None,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Fine-tune and train from scratch on every set, with several seeds, for the same number of epochs.

    Each seed, from 0 on, draws other training images, another head or net, and another order. Nothing is chosen on the
    images that are measured; the last epoch counts. ``lr`` and ``lr_from_scratch`` are peak learning rates, None for
    the defaults; ``say`` gets a line for each training. The result is a record that JSON can hold: what was run on
    what, and for each set the test accuracy of every seed, in percent.
    """
    started = time.perf_counter()
    rows = []
    for few in sets:
        row: dict[str, Any] = {"set": few.title}
        for kind, from_scratch in (("pretrained", False), ("scratch", True)):
            row[kind] = []
            for seed in range(seeds):
                top1, counts = _measure(few, model, epochs, seed, lr_from_scratch if from_scratch else lr, from_scratch)
                row[kind].append(top1)
                row |= counts
                say(f"{few.title}, {kind}, seed {seed}: {top1:.1f} %")
        rows.append(row)
    return {
        "benchmark": "finetune",
        "model": model,
        "sha256": weights_sha256(model),
        "epochs": epochs,
        "seeds": seeds,
        "rows": rows,
        "minutes": (time.perf_counter() - started) / 60,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        **describe_environment(),
        "set_versions": {name: _version(name) for name in ("scikit-learn", "scikit-image")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _measure(
    few: FewImages, model: str, epochs: int, seed: int, lr: float | None, from_scratch: bool
) -> tuple[float, dict[str, int]]:
    data = few.draw(seed)
    recipe = finetune_recipe(
        model,
        data.source,
        data.image_size,
        images=len(data.train),
        from_scratch=from_scratch,
        epochs=epochs,
        lr=lr,
        flip=few.flip,
        seed=seed,
    )
    net = net_for_data(model, data, recipe, from_scratch=from_scratch)
    with tempfile.TemporaryDirectory() as folder:
        tuned = train_on(net, data, recipe, Path(folder) / "run", quiet=True)
    labels = tuned.report_on.labels.cpu()
    top1 = 100 * float((tuned.logits.argmax(1) == labels).double().mean())
    return top1, {"train_images": len(data.train), "test_images": len(labels)}


def _mean_and_deviation(values: list[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread} %"


def finetune_table(benchmark: dict[str, Any], *, replaced: bool = False) -> str:
    """The record of ``benchmark_finetune`` as a table in Markdown, with what it was measured on below it.

    Weights that are ``replaced`` since are called earlier ones.
    """
    lines = ["| set | training images | test images | from our weights | from scratch | difference |"]
    lines.append("| --- | --: | --: | --: | --: | --: |")
    for row in benchmark["rows"]:
        differences = [a - b for a, b in zip(row["pretrained"], row["scratch"], strict=True)]
        lines.append(
            f"| {row['set']} | {row['train_images']} | {row['test_images']:,} | "
            f"{_mean_and_deviation(row['pretrained'])} | {_mean_and_deviation(row['scratch'])} | "
            f"{_mean_and_deviation(differences).replace(' %', '')} |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in benchmark["library_versions"].items())
    whose = "earlier weights of " if replaced else ""
    lines += [
        "",
        f"Test accuracy of {whose}`{benchmark['model']}` after {benchmark['epochs']} epochs, mean and standard "
        f"deviation over {benchmark['seeds']} seeds; the difference is in percentage points, seed by seed. Measured on "
        f"{benchmark['hardware']}, with {versions}.",
    ]
    return "\n".join(lines) + "\n"

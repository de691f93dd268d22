"""The training loops that the ``train`` benchmark compares, each as a function that runs some steps.

All train the same net with the same initial weights on the same images, with SGD with Nesterov momentum, cross-entropy
and the same batches per epoch, and all keep count of loss or accuracy as their originals do. Two further loops are ours
with a teacher: one that runs beside the net, and its logits from a bank.
"""

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from conam_zoo.data import AugmentationSettings, Batches, BatchSettings, DeviceLoader, ImageSplit
from conam_zoo.datasets import DATASETS
from conam_zoo.models import StagedClassifier
from conam_zoo.training.engine import train_one_epoch
from conam_zoo.training.recipe import Recipe
from conam_zoo.training.teacher_bank import BankedBatches, TeacherBank, write_epoch
from conam_zoo.training.train_state import TrainState

TEACHER = "wide_resnet16_4_conam"
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
MEAN, STD = DATASETS["cifar10"].mean, DATASETS["cifar10"].std

# Runs the last ``steps`` steps of an epoch, or the first, as is easier; all of them if None.
Steps = Callable[[int | None], None]


@dataclass(frozen=True)
class LoopSettings:
    """What a loop is run with."""

    model: str  # builder of this package
    batch_size: int  # images in a step
    workers: int  # worker processes of a data loader
    compile: bool = False  # whether ``torch.compile`` is used where the loop's original offers it
    precision: str = "bf16"  # or "fp32"; of all loops but the plain one, which knows float32 alone


class PictureSet(Dataset[tuple[Image.Image, int]]):
    """Images held as an array in host memory and handed out as Pillow images, as torchvision's CIFAR10 does it.

    ``transform`` is applied to every image; set it before use, as timm's loader does.
    """

    def __init__(self, split: ImageSplit) -> None:
        self.images, self.labels = split.images.numpy(), split.labels.tolist()
        self.transform: Callable[[Image.Image], Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index])
        return (self.transform(image) if self.transform else image), self.labels[index]


def noise_images(count: int) -> ImageSplit:
    """Images of noise, always the same, as large as CIFAR-10's: uint8 (count, 32, 32, 3)."""
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    return ImageSplit(images, torch.arange(count) % 10, DATASETS["cifar10"].classes, "noise")


def _net(settings: LoopSettings, split: ImageSplit) -> StagedClassifier:
    torch.manual_seed(0)
    net: StagedClassifier = timm.create_model(settings.model, num_classes=len(split.classes))
    return net


def our_loop(settings: LoopSettings, split: ImageSplit, device: torch.device, *, teacher: str = "") -> Steps:
    """This package's loop: autocast, channels_last, the whole set on the device, whole batches augmented there.

    It is what ``conam train`` runs between two checkpoints, without a moving average of the weights, which the other
    loops lack too. ``teacher`` is ``"online"`` for a WideResNet-16-4 that is run on every batch, ``"bank"`` for logits
    from a bank, read from disk once an epoch, and empty for none. Time and memory do not depend on what the logits are:
    the teacher has not been trained, and those in the bank are random.
    """
    recipe = Recipe(
        model=settings.model,
        dataset="cifar10",
        model_args={},
        epochs=1000,
        batch_size=settings.batch_size,
        opt="sgd",
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        warmup_epochs=0.0,
        min_lr=0.0,
        label_smoothing=0.0,
        crop_padding=4,
        flip=True,
        ema_decay=0.0,
        final_weights="raw",
        holdout=0,
        precision=settings.precision,
        seed=0,
        teacher=TEACHER if teacher else "",
        distill_weight=0.9,
    )
    net = _net(settings, split).to(device).to(memory_format=torch.channels_last)
    augmentation = AugmentationSettings(crop_padding=recipe.crop_padding, flip=recipe.flip)
    how = BatchSettings(augmentation, settings.batch_size, recipe.seed, MEAN, STD)
    batches: Batches = DeviceLoader(split.to(device), how)
    folder, watching = tempfile.TemporaryDirectory(prefix="bank-"), None  # removed together with the loop
    if teacher == "online":
        watching = timm.create_model(TEACHER, num_classes=len(split.classes)).eval().requires_grad_(False)
        watching = watching.to(device).to(memory_format=torch.channels_last)
    elif teacher == "bank":
        bank = TeacherBank(Path(folder.name), 2, {})
        for epoch in range(bank.epochs):
            logits = torch.randn(len(split), len(split.classes)).half()
            write_epoch(bank.folder, epoch, logits, {"computed_in": "fp32"})
        batches = BankedBatches(batches, bank, settings.batch_size)
    state = TrainState(net, recipe, batches.steps, teacher=watching, compile=settings.compile)
    epochs = itertools.count()

    def run(steps: int | None = None, folder: tempfile.TemporaryDirectory[str] = folder) -> None:
        first = 0 if steps is None else max(0, batches.steps - steps)
        train_one_epoch(state, batches, epoch=next(epochs), first_step=first)

    return run


def plain_loop(settings: LoopSettings, split: ImageSplit, device: torch.device) -> Steps:
    """The loop of the common CIFAR repositories: float32, NCHW, eager, a DataLoader over Pillow images.

    Each image is padded, cropped, mirrored and normalised in a worker process; loss and accuracy are read each step.
    """
    images = PictureSet(split)
    images.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(
        images,
        batch_size=settings.batch_size,
        shuffle=True,
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=settings.workers > 0,  # started in the warm-up: negligible in a long epoch
    )
    net = _net(settings, split).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)

    def run(steps: int | None = None) -> None:
        net.train()
        loss_sum, correct = 0.0, 0
        for inputs, targets in itertools.islice(loader, steps):
            inputs, targets = inputs.to(device), targets.to(device)
            optimizer.zero_grad()
            outputs = net(inputs)
            loss = criterion(outputs, targets)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            correct += outputs.argmax(1).eq(targets).sum().item()

    return run


def timm_loop(settings: LoopSettings, split: ImageSplit, device: torch.device, *, channels_last: bool = False) -> Steps:
    """What timm's training script does with its own parts: autocast, its loader and prefetcher.

    timm has no loop to import, so these are the steps of ``train_one_epoch`` in its ``train.py``, with its
    ``create_loader``, ``ClassificationTask``, optimiser and meters, as it runs under the options ``--opt sgd
    --smoothing 0 --color-jitter 0 --train-interpolation bilinear``, with ``--amp --amp-dtype bfloat16`` unless in fp32,
    with ``--channels-last``, which is not its default, if asked for, and ``--torchcompile`` if compiled. bf16 needs no
    loss scaler then. timm has no padded random crop: its own random resized crop stands in for it. Nothing is logged,
    and the learning rate stays.
    """
    loader = create_loader(
        PictureSet(split),
        input_size=(3, 32, 32),
        batch_size=settings.batch_size,
        is_training=True,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=device.type == "cuda",
        device=device,
    )
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    net: nn.Module = _net(settings, split).to(device).to(memory_format=memory_format)
    optimizer = create_optimizer_v2(net, opt="sgd", lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    if settings.compile:
        net = torch.compile(net)  # type: ignore[assignment]
    task = ClassificationTask(net, criterion_kwargs={"smoothing": 0.0}, device=device, verbose=False)

    def run(steps: int | None = None) -> None:
        losses = AverageMeter()
        net.train()
        optimizer.zero_grad()
        for images, targets in itertools.islice(loader, steps):
            images = images.contiguous(memory_format=memory_format)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = task(images, targets)["loss"]
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(images))
            optimizer.zero_grad()

    return run


LOOPS: dict[str, Callable[[LoopSettings, ImageSplit, torch.device], Steps]] = {
    "conam_zoo": our_loop,
    "plain DataLoader": plain_loop,
    "timm": timm_loop,
    "timm, channels_last": partial(timm_loop, channels_last=True),
}

TEACHER_LOOPS: dict[str, Callable[[LoopSettings, ImageSplit, torch.device], Steps]] = {
    "conam_zoo, bank": partial(our_loop, teacher="bank"),
    "conam_zoo, online teacher": partial(our_loop, teacher="online"),
}

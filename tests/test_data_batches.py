"""Augmented batches: what they show, that they are functions of seed, epoch and step, and how ranks share them."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PLAIN_RECIPE
from PIL import Image

from conam_zoo.data import (
    AugmentationSettings,
    BatchSettings,
    DeviceLoader,
    ImageSplit,
    WorkerLoader,
    create_loader,
    loaders,
    normalize,
)
from conam_zoo.data.dataset import fits, source_of_split
from conam_zoo.data.loaders import Shards, epoch_order
from conam_zoo.data.transforms import MIXING, mix, random_stream
from conam_zoo.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = AugmentationSettings(crop_padding=0, flip=False)
EVERYTHING = AugmentationSettings(crop_padding=2, flip=True, cutout=4, mixup=0.8, cutmix=1.0)


def numbered(count: int, classes: int = 3, size: int = 8) -> ImageSplit:
    """Images that are noise, but whose upper left pixel is their number."""
    images = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.arange(count)
    names = tuple(f"class {index}" for index in range(classes))
    return ImageSplit(images, torch.arange(count) % classes, names, "made up")


def how(augmentation: AugmentationSettings = PLAIN, batch_size: int = 8, seed: int = 0, **more) -> BatchSettings:
    return BatchSettings(augmentation, batch_size, seed, MEAN, STD, **more)


def batches(split: ImageSplit, *settings, **more) -> DeviceLoader:
    return DeviceLoader(split, how(*settings, **more))


def numbers_of(images: torch.Tensor) -> list[int]:
    """The numbers in the pixels of unaugmented, normalised images."""
    return ((images[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().int().tolist()


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    split = numbered(20)
    made = batches(split)
    assert (made.steps, made.num_images) == (3, 20)
    seen = [[n for images, _ in made.epoch(epoch) for n in numbers_of(images)] for epoch in range(2)]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(20))
    assert seen[0] != seen[1] != list(range(20))


def test_images_are_the_normalised_ones_with_their_labels_in_channels_last() -> None:
    split = numbered(12)
    for images, labels in batches(split).epoch(0):
        indices = torch.tensor(numbers_of(images))
        torch.testing.assert_close(images, normalize(split.images[indices], MEAN, STD))
        assert torch.equal(labels, split.labels[indices])
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings", [PLAIN, EVERYTHING])
def test_a_batch_is_a_function_of_seed_epoch_and_step(settings: AugmentationSettings) -> None:
    split = numbered(40)
    whole = list(batches(split, settings).epoch(3))
    torch.rand(5)
    np.random.rand(5)
    later = list(batches(split, settings).epoch(3, first_step=2))
    assert len(later) == len(whole) - 2
    for (images, targets), (again, targets_again) in zip(whole[2:], later, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(targets, targets_again)
    for other in (batches(split, settings).epoch(4), batches(split, settings, seed=1).epoch(3)):
        assert not torch.equal(next(other)[0], whole[0][0])


@pytest.mark.parametrize("augmentation", [{}, {"crop_padding": 0, "flip": False, "cutout": 2}])
def test_early_epochs_show_smaller_crops(augmentation: dict) -> None:
    split = numbered(24)
    usual = AugmentationSettings(**augmentation)
    early = AugmentationSettings(**augmentation, early_size=6, early_epochs=2)
    shapes = [next(batches(split, early).epoch(epoch))[0].shape[2:] for epoch in range(4)]
    assert shapes == [(6, 6), (6, 6), (8, 8), (8, 8)]
    for (images, labels), (others, other_labels) in zip(
        batches(split, early).epoch(2), batches(split, usual).epoch(2), strict=True
    ):
        assert torch.equal(images, others)  # later epochs are those of a training without early ones
        assert torch.equal(labels, other_labels)
    loader = WorkerLoader(source_of_split(split), 8, how(early), workers=0)
    for (images, _), (others, _) in zip(loader.epoch(0), batches(split, early).epoch(0), strict=True):
        assert torch.equal(images, others)


def test_drawing_leaves_the_generators_of_torch_and_numpy_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    loader = WorkerLoader(source_of_split(numbered(12)), 8, how(EVERYTHING, 4), workers=0)
    for _ in loader.epoch(0):
        pass
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_the_bits_of_the_resident_batches(workers: int) -> None:
    split = numbered(22)
    loader = WorkerLoader(source_of_split(split), 8, how(EVERYTHING, seed=5), workers=workers)
    resident = batches(split, EVERYTHING, seed=5)
    assert (loader.steps, loader.num_images, loader.classes) == (resident.steps, resident.num_images, resident.classes)
    for (images, targets), (expected, expected_targets) in zip(loader.epoch(1, 1), resident.epoch(1, 1), strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(targets, expected_targets)
        assert images.is_contiguous(memory_format=torch.channels_last)


def all_but_the_fifth(index: int) -> Image.Image:
    if index == 5:
        raise UserError("image 5 cannot be read: check the disk.")
    return Image.new("RGB", (8, 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_can_no_longer_be_read_is_one_sentence(workers: int) -> None:
    source = replace(source_of_split(numbered(16)), read=all_but_the_fifth)
    with pytest.raises(UserError, match=r"^image 5 cannot be read: check the disk\.$"):
        list(WorkerLoader(source, 8, how(), workers=workers).epoch(0))


def test_processes_of_one_machine_share_its_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of_split(numbered(16))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for processes, workers in (("1", 7), ("4", 1), ("16", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert WorkerLoader(source, 8, how()).workers == workers
    assert fits(10, 8, 10 * 3 * 8 * 8 * 8, processes=4)
    assert not fits(10, 8, 10 * 3 * 8 * 8 * 8, processes=5)


def test_the_loader_does_not_read_what_a_resumed_epoch_skips() -> None:
    source = source_of_split(numbered(24))
    read: list[int] = []
    original = source.read
    object.__setattr__(source, "read", lambda index: (read.append(index), original(index))[1])
    loader = WorkerLoader(source, 8, how(), workers=0)
    assert [numbers_of(images) for images, _ in loader.epoch(0, first_step=2)] == [read]
    assert len(read) == 8


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("count", [24, 25, 31, 37])
def test_ranks_share_an_epoch_without_gap_or_overlap(world_size: int, count: int) -> None:
    split = numbered(count)
    ranks = [batches(split, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    shown = [[numbers_of(images) for images, _ in rank.epoch(0)] for rank in ranks]
    assert len({rank.steps for rank in ranks}) == len({rank.num_images for rank in ranks}) == 1
    assert all(len(steps) == ranks[0].steps for steps in shown)
    numbers = [number for steps in shown for batch in steps for number in batch]
    assert len(numbers) == len(set(numbers)) == ranks[0].num_images
    assert count - ranks[0].num_images < 2 * world_size
    assert all(len(batch) >= 2 for steps in shown for batch in steps)


def test_ranks_together_show_what_one_device_shows() -> None:
    split = numbered(37)
    settings = AugmentationSettings(crop_padding=2, flip=True, cutout=4)
    alone = list(batches(split, settings, batch_size=8).epoch(2))
    shared = [list(batches(split, settings, batch_size=4, rank=rank, world_size=2).epoch(2)) for rank in range(2)]
    for (images, labels), first, second in zip(alone, *shared, strict=True):
        assert torch.equal(images, torch.cat([first[0], second[0]]))
        assert torch.equal(labels, torch.cat([first[1], second[1]]))


def test_a_remainder_too_small_to_share_is_left_out() -> None:
    assert (Shards(17, 8).steps, Shards(17, 8).num_images) == (2, 16)
    assert (Shards(18, 8).steps, Shards(18, 8).num_images) == (3, 18)
    assert (Shards(19, 4, 0, 2).steps, Shards(19, 4, 0, 2).num_images) == (2, 16)
    with pytest.raises(UserError, match="There are 3 training images, but 2 device"):
        Shards(3, 4, 0, 2)
    with pytest.raises(UserError, match="batch norm needs 2 images"):
        Shards(30, 1)


def test_balance_shows_every_class_equally_often_and_its_images_evenly() -> None:
    labels = np.repeat([0, 1, 2], [40, 5, 15])
    order = epoch_order(labels, seed=0, epoch=0, balance=True).numpy()
    assert np.bincount(labels[order]).tolist() == [20, 20, 20]
    shown = np.bincount(order, minlength=60)
    assert set(shown[:40]) == {0, 1}
    assert set(shown[40:45]) == {4}
    assert set(shown[45:]) == {1, 2}


def test_cutout_blanks_a_square_whose_centre_may_be_any_pixel() -> None:
    split = numbered(60, size=12)
    split.images.fill_(255)
    areas, centres = [], []
    for images, _ in batches(split, AugmentationSettings(0, False, cutout=6), batch_size=60).epoch(0):
        blank = images == 0
        assert torch.equal(blank.all(1), blank.any(1))
        for mask in blank[:, 0]:
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert mask.sum() == len(rows) * len(columns)  # a filled rectangle
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            areas.append(int(mask.sum()))
            centres.append((int(rows[0]), int(columns[0])))
    assert max(areas) == 36
    assert min(areas) >= 9  # clipped at a corner
    assert len(set(areas)) > 3
    assert len(set(centres)) > 20


def _mixed(settings: AugmentationSettings, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    return mix(images, torch.tensor([0, 1, 2, 2]), 3, settings, random_stream(MIXING, 0, 0, step, 0))


def test_mixup_blends_images_and_targets_by_the_same_share() -> None:
    shares = set()
    for step in range(20):
        images, targets = _mixed(AugmentationSettings(mixup=0.4), step)
        assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
        share = 1 - images[0, 0, 0, 0] / 3  # image 0 is all 0, its partner all 3
        torch.testing.assert_close(targets[0], torch.tensor([share, 0.0, 1 - share]))
        torch.testing.assert_close(targets[1], torch.tensor([0.0, share, 1 - share]))
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert images.is_contiguous(memory_format=torch.channels_last)
        shares.add(round(float(share), 4))
    assert len(shares) > 15


def test_cutmix_pastes_a_box_and_counts_its_pixels() -> None:
    boxes = set()
    for step in range(30):
        images, targets = _mixed(AugmentationSettings(cutmix=1.0), step)
        assert set(images[0].unique().tolist()) <= {0.0, 3.0}
        pasted = images[0, 0] == 3
        torch.testing.assert_close(targets[0, 2], pasted.float().mean())
        rows, columns = pasted.any(1), pasted.any(0)
        assert pasted.sum() == rows.sum() * columns.sum()
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert images.is_contiguous(memory_format=torch.channels_last)
        boxes.add(int(pasted.sum()))
    assert len(boxes) > 10


def test_with_both_on_each_batch_gets_one_of_them() -> None:
    settings = AugmentationSettings(mixup=1.0, cutmix=1.0)
    kinds = []
    for step in range(60):
        images, _ = _mixed(settings, step)
        kinds.append(bool(set(images[0].unique().tolist()) <= {0.0, 3.0}))
    assert 15 < sum(kinds) < 45


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cutout": -1}, "cutout is -1"),
        ({"mixup": float("nan")}, "mixup is nan"),
        ({"crop_padding": 8}, "8 x 8 pixels"),
        ({"early_size": 9, "early_epochs": 1}, "early_size is 9, but the images of made up have 8 x 8 pixels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        batches(numbered(8), AugmentationSettings(**settings))


def test_the_path_is_chosen_by_size_and_said_in_a_line() -> None:
    split = numbered(16)
    made, line = create_loader(source_of_split(split), 8, how(batch_size=4), free=10**9, workers=0)
    assert isinstance(made, WorkerLoader)
    assert "read by a loader" in line
    made, line = create_loader(split, 8, how(batch_size=4), free=1)
    assert isinstance(made, DeviceLoader)  # it is in this memory already
    assert "stays on the cpu as uint8 (0.0 MB of images" in line
    assert "\n" not in line


def mirrored_in(made, epoch: int, split: ImageSplit) -> dict[int, bool]:
    """Which image was shown mirrored, by number; each image must be one of the two."""
    shown = {}
    for images, _ in made.epoch(epoch):
        pixels = (images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)).mul(255).round().byte()
        for image in pixels:
            plain = (split.images == image).all((1, 2, 3)).nonzero().flatten()
            flipped = (split.images.flip(2) == image).all((1, 2, 3)).nonzero().flatten()
            assert len(plain) + len(flipped) == 1
            shown[int(plain[0] if len(plain) else flipped[0])] = not len(plain)
    return shown


@pytest.mark.parametrize("path", ["device", "loader"])
@pytest.mark.parametrize("balance", [False, True])
def test_alternate_flip_shows_each_image_plain_and_mirrored_in_two_epochs_in_a_row(path: str, balance: bool) -> None:
    split = numbered(30)
    settings = how(AugmentationSettings(crop_padding=0, alternate_flip=True), balance=balance)
    made = DeviceLoader(split, settings)
    if path == "loader":
        made = WorkerLoader(source_of_split(split), 8, settings, workers=0)
    first, second, third = (mirrored_in(made, epoch, split) for epoch in range(3))
    assert len(first) == 30
    assert second == {number: not mirrored for number, mirrored in first.items()}
    assert third == first
    assert 5 < sum(first.values()) < 25
    assert mirrored_in(DeviceLoader(split, how(settings.augmentation, seed=1)), 0, split) != first


def test_alternate_flip_changes_nothing_else_that_is_drawn() -> None:
    split = numbered(30)
    usual, alternate = (AugmentationSettings(crop_padding=2, cutout=3, alternate_flip=flag) for flag in (False, True))
    for one, other in zip(batches(split, usual).epoch(0), batches(split, alternate).epoch(0), strict=True):
        assert torch.equal(one[1], other[1])  # the order
        assert torch.equal((one[0] == 0).sum((1, 2, 3)), (other[0] == 0).sum((1, 2, 3)))  # the squares of Cutout
    off = AugmentationSettings(crop_padding=2, flip=False, alternate_flip=True)
    for one, other in zip(
        batches(split, off).epoch(1), batches(split, AugmentationSettings(2, False)).epoch(1), strict=True
    ):
        assert torch.equal(one[0], other[0])  # without flip there is nothing to alternate


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 25, 65), (1.0, 150, 150)])
def test_a_share_of_the_batches_is_mixed(share: float, low: int, high: int) -> None:
    made = batches(numbered(300), AugmentationSettings(0, False, cutmix=1.0, mix_share=share), batch_size=2)
    soft = [targets.is_floating_point() for _, targets in made.epoch(0)]
    assert len(soft) == 150
    assert low <= sum(soft) <= high
    plain = batches(numbered(300), PLAIN, batch_size=2)
    for (images, targets), (expected, labels) in zip(made.epoch(0), plain.epoch(0), strict=True):
        if not targets.is_floating_point():
            assert torch.equal(images, expected)
            assert torch.equal(targets, labels)


def test_mixing_every_batch_draws_what_it_always_drew() -> None:
    split, settings = numbered(24), AugmentationSettings(0, False, mixup=0.8, mix_share=1.0)
    plain = batches(split, PLAIN).epoch(2)
    for step, ((images, targets), (before, labels)) in enumerate(
        zip(batches(split, settings).epoch(2), plain, strict=True)
    ):
        expected = mix(before, labels, 3, settings, random_stream(MIXING, 0, 2, step, 0))
        assert torch.equal(images, expected[0])
        assert torch.equal(targets, expected[1])


def test_a_recipe_s_alternate_flip_and_mix_share_reach_the_batches() -> None:
    from conam_zoo.training.distributed import Ranks
    from conam_zoo.training.recipe import load_recipe
    from conam_zoo.training.train_state import batch_settings

    given = ["batch_size=2", "crop_padding=0", "cutout=0", "mixup=0", "cutmix=0", "early_epochs=0", "early_size=0"]
    here, split = Ranks(0, 1, torch.device("cpu")), numbered(30)
    recipe = load_recipe(PLAIN_RECIPE, [*given, "flip=true", "alternate_flip=true"])
    made = DeviceLoader(split, batch_settings(recipe, MEAN, STD, here))
    first, second = (mirrored_in(made, epoch, split) for epoch in range(2))
    assert second == {number: not mirrored for number, mirrored in first.items()}
    for share, low, high in ((0.5, 1, 14), (1.0, 15, 15)):
        recipe = load_recipe(PLAIN_RECIPE, [*given, "flip=false", "cutmix=1.0", f"mix_share={share}"])
        made = DeviceLoader(split, batch_settings(recipe, MEAN, STD, here))
        assert low <= sum(targets.is_floating_point() for _, targets in made.epoch(0)) <= high


@pytest.mark.forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_outlives_the_signals_of_a_supervisor_but_not_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if (child := os.fork()) == 0:
        try:
            loaders._outlive_supervisors(0)
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            loaders.TOGETHER_SECONDS = -1.0
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_alpha_says_how_even_the_shares_are(kind: str) -> None:
    images, labels = torch.zeros(2, 3, 64, 64), torch.tensor([0, 1])

    def spread(alpha: float) -> float:
        settings = AugmentationSettings(crop_padding=0, flip=False, cutout=0, **{kind: alpha})
        streams = map(np.random.default_rng, range(200))
        shares = [float(mix(images, labels, 2, settings, stream)[1][0, 0]) for stream in streams]
        return float(np.mean(np.abs(np.array(shares) - 0.5) > 0.4))

    assert spread(0.1) > 0.35
    assert spread(8.0) < 0.05

"""Reading splits, and augmenting batches."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_arrays
from PIL import Image

from conam_zoo.data import AugmentationSettings, normalize, read_split
from conam_zoo.data.dataset import free_bytes
from conam_zoo.data.transforms import IMAGES, ImageDraws, crop_and_flip, random_stream
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError


def test_arrays_and_image_folders_give_the_same_split(tmp_path: Path) -> None:
    arrays = write_arrays(tmp_path / "arrays", ("ant", "bee", "cow"), {"train": 12, "test": 6})
    split = read_split(arrays, "train")
    for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
        folder = tmp_path / "tree" / "train" / split.classes[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / f"{index:03d}.png")
    tree = read_split(tmp_path / "tree", "train")
    order = split.labels.argsort(stable=True)
    assert tree.classes == split.classes
    assert torch.equal(tree.labels, split.labels[order])
    assert torch.equal(tree.images, split.images[order])


def test_the_data_sets_name_below_the_folder_is_found(small_data: Path) -> None:
    assert len(read_split(small_data, "test", "cifar10")) == 60


def test_val_serves_as_test(tmp_path: Path) -> None:
    for name in ("train/a", "val/a"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "val" / "a" / "1.png")
    assert len(read_split(tmp_path, "test")) == 1


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: (root / "train_labels.npy").unlink(), "train_labels.npy is missing"),
        (
            lambda root: (root / "train_images.npy").unlink(),
            "holds no class folders with images",
        ),
        (lambda root: np.save(root / "train_labels.npy", np.zeros(3, np.uint8)), "does not fit"),
        (lambda root: np.save(root / "train_labels.npy", np.full(12, 9, np.uint8)), "does not fit"),
        (lambda root: np.save(root / "train_images.npy", np.zeros((12, 32, 32), complex)), "must hold uint8"),
    ],
)
def test_bad_arrays_are_refused_in_a_sentence(tmp_path: Path, spoil, sentence: str) -> None:
    root = write_arrays(tmp_path, ("ant", "bee", "cow"), {"train": 12})
    spoil(root)
    with pytest.raises(UserError, match=sentence):
        read_split(root, "train")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_split(tmp_path / "nowhere", "train")


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 1 images cannot be read as they are, such as a/broken\.png"):
        read_split(tmp_path, "train")


def test_normalize_has_the_layout_and_values_of_the_usual_transform() -> None:
    images = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8)
    mean, std = DATASETS["cifar10"].mean, DATASETS["cifar10"].std
    result = normalize(images, mean, std)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_every_augmented_image_is_a_shifted_and_perhaps_mirrored_window_of_its_own_source() -> None:
    images = torch.randint(256, (64, 8, 10, 3), dtype=torch.uint8)
    draws = ImageDraws.draw(random_stream(IMAGES, 1), 64, (8, 10), AugmentationSettings(crop_padding=2), (8, 10))
    augmented = crop_and_flip(images, torch.arange(64), draws, 2, (8, 10))
    padded = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect"))
    found = set()
    for source, result in zip(padded, augmented, strict=True):
        matches = []
        for top, left in itertools.product(range(5), range(5)):
            window = source[top : top + 8, left : left + 10]
            matches += [(top, left, False)] if torch.equal(window, result) else []
            matches += [(top, left, True)] if torch.equal(window.flip(1), result) else []
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 25  # images draw for themselves
    assert {mirrored for _, _, mirrored in found} == {False, True}


def test_a_smaller_crop_is_a_window_of_the_padded_image() -> None:
    images = torch.randint(256, (200, 8, 10, 3), dtype=torch.uint8)
    draws = ImageDraws.draw(random_stream(IMAGES, 1), 200, (8, 10), AugmentationSettings(crop_padding=1), (6, 6))
    crops = crop_and_flip(images, torch.arange(200), draws, 1, (6, 6))
    assert crops.shape == (200, 6, 6, 3)
    padded = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"))
    for source, result, top, left, mirrored in zip(padded, crops, draws.top, draws.left, draws.mirrored, strict=True):
        window = source[top : top + 6, left : left + 6]
        assert torch.equal(window.flip(1) if mirrored else window, result)
    assert set(draws.top.tolist()) == set(range(5))  # 8 + 2 pixels hold 5 windows of 6
    assert set(draws.left.tolist()) == set(range(7))
    assert set(draws.centre_y.tolist()) == set(range(6))


def test_without_crop_and_flip_images_are_untouched() -> None:
    images = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8)
    order = torch.tensor([3, 1, 5])
    draws = ImageDraws.draw(
        random_stream(IMAGES, 0), 3, (8, 8), AugmentationSettings(crop_padding=0, flip=False), (8, 8)
    )
    assert torch.equal(crop_and_flip(images, order, draws, 0, (8, 8)), images[order])


@pytest.mark.slow
def test_the_stated_statistics_are_those_of_the_real_training_pixels(cifar_root: Path) -> None:
    split = read_split(cifar_root, "train", "cifar10")
    pixels = split.images.double() / 255
    facts = DATASETS["cifar10"]
    assert split.classes == facts.classes
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), facts.mean, atol=6e-6)
    np.testing.assert_allclose(pixels.std((0, 1, 2), correction=0), facts.std, atol=6e-6)


class _StandIn:
    """What this package uses of torchvision's CIFAR10."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download
        self.data = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8)
        self.targets = [0, 9, 1, 2] if train else [3, 4]


def test_the_word_cifar10_means_torchvisions_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", _StandIn)
    split = read_split("cifar10", "train")
    assert split.images.shape == (4, 32, 32, 3)
    assert split.labels.tolist() == [0, 9, 1, 2]
    assert split.classes == DATASETS["cifar10"].classes
    assert len(read_split("cifar10", "test")) == 2


def test_two_trainings_do_not_download_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    active, most = [], []

    class Slow(_StandIn):
        def __init__(self, *args: Any, **options: Any) -> None:
            active.append(self)
            most.append(len(active))
            time.sleep(0.2)
            active.remove(self)
            super().__init__(*args, **options)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Slow)
    with ThreadPoolExecutor(2) as pool:
        assert [len(split) for split in pool.map(read_split, ["cifar10"] * 2, ["train", "test"])] == [4, 2]
    assert most == [1, 1]


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cifar10 could not be downloaded by torchvision"):
        read_split("cifar10", "train")  # the tests have no network


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/proc/meminfo": ["MemTotal: 9000 kB", "MemAvailable:    5000 kB"],
        "/sys/fs/cgroup/memory.max": ["3000000"],
        "/sys/fs/cgroup/memory.current": ["1000000"],
    }
    monkeypatch.setattr("conam_zoo.data.dataset._lines", lambda path: texts.get(path, []))
    assert free_bytes("cpu") == 2_000_000
    texts["/sys/fs/cgroup/memory.stat"] = ["anon 1", "inactive_file 400000", "active_file 1"]
    assert free_bytes("cpu") == 2_400_000
    texts["/sys/fs/cgroup/memory.max"] = ["max"]
    assert free_bytes("cpu") == 5000 * 1024

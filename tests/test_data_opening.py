"""Opening sets of any kind: folders, arrays, names; splits, sizes, statistics, damaged files."""

import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_arrays
from PIL import Image

from conam_zoo.data import ImageSplit, open_images, pixel_statistics, read_split
from conam_zoo.data.dataset import stratified_split
from conam_zoo.data.load import find_sources
from conam_zoo.errors import UserError


def picture(path: Path, shade: int = 100, size: tuple[int, int] = (40, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, 255 - shade)).save(path)


def tree(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> Path:
    for rank, name in enumerate(classes):
        for index in range(count):
            picture(root / name / f"{index:02d}.png", 40 + 50 * rank + index)
    return root


def test_class_folders_without_splits(tmp_path: Path) -> None:
    data = open_images(tree(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.counts == (9, 9)
    assert data.val is not None
    assert len(data.val) == 2
    assert data.test is None
    assert (data.image_size, data.median_side) == (32, 40)
    assert isinstance(data.train, ImageSplit)
    assert data.train.images.shape == (18, 32, 32, 3)
    assert not set(data.train.names) & set(data.val.names)


def test_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    tree(tmp_path / "Train", count=4)
    tree(tmp_path / "valid", count=2)
    tree(tmp_path / "test", ("dog",), count=3)
    data = open_images(tmp_path)
    assert data.val is not None
    assert data.test is not None
    assert (sum(data.counts), len(data.val), len(data.test)) == (8, 2 * 2, 3)
    assert data.test.labels.tolist() == [1, 1, 1]


def test_without_training_images_the_classes_are_those_of_all_other_splits(tmp_path: Path) -> None:
    tree(tmp_path / "set" / "val", ("a", "b"), count=2)
    tree(tmp_path / "set" / "test", ("a", "b", "c"), count=2)
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.array(["a", "b"])
    np.savez(tmp_path / "set.npz", val_images=images, val_labels=labels, test_images=images, test_labels=["b", "c"])
    for place in (tmp_path / "set", tmp_path / "set.npz"):
        sources = find_sources(place, training=False)
        assert {source.classes for source in sources.values()} == {("a", "b", "c")}
        assert sources["test"].classes[sources["test"].labels[-1]] == "c"


def test_a_wrapping_folder_and_folders_below_a_class_are_seen_through(tmp_path: Path) -> None:
    tree(tmp_path / "flowers-v2", ("rose", "tulip"), 3)
    picture(tmp_path / "flowers-v2" / "rose" / "red" / "more" / "a.JPG")
    data = open_images(tmp_path)
    assert data.classes == ("rose", "tulip")
    assert sum(data.counts) + len(data.val or ()) == 7


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert open_images(tree(tmp_path, ("car", "train"))).classes == ("car", "train")


def test_other_files_are_left_out_and_told(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "empty class").mkdir()
    data = open_images(tmp_path)
    assert data.classes == ("cat", "dog")
    assert any("1 other files left out, such as Thumbs.db" in note for note in data.notes)
    assert any("empty class holds no images" in note for note in data.notes)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: picture(root / "a.png"), "holds no class folders with images"),
        (lambda root: tree(root, ("only",)), "has only the class only"),
        (lambda root: tree(root / "test"), "but none named train"),
        (lambda root: (tree(root / "train"), tree(root / "test", ("cow",))), "has the class cow"),
        (lambda root: tree(root, count=1), "a single image of each class"),
    ],
)
def test_trees_that_make_no_sense_are_refused_in_a_sentence(tmp_path: Path, make, sentence: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=sentence):
        open_images(tmp_path)


def test_nothing_there_and_wrong_choices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no data set"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "data.csv").write_text("a")
    with pytest.raises(UserError, match=r"not an \.npz one"):
        open_images(tmp_path / "data.csv")
    tree(tmp_path / "set")
    for wrong in ({"corrupt": "ignore"}, {"val_share": 1.0}, {"image_size": 33}):
        with pytest.raises(UserError, match="must"):
            open_images(tmp_path / "set", **wrong)


def test_the_validation_split_is_stratified_and_seeded() -> None:
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    kept, held = stratified_split(labels, 0.1, seed=0)
    assert np.bincount(labels[held], minlength=4).tolist() == [5, 1, 1, 0]
    assert sorted([*kept, *held]) == list(range(63))
    assert np.array_equal(held, stratified_split(labels, 0.1, seed=0)[1])
    assert not np.array_equal(held, stratified_split(labels, 0.1, seed=1)[1])


def test_a_class_with_a_single_image_is_told(tmp_path: Path) -> None:
    tree(tmp_path)
    picture(tmp_path / "rare" / "one.png")
    assert any("single image: rare" in note for note in open_images(tmp_path).notes)


def test_the_image_size_follows_from_the_images(tmp_path: Path) -> None:
    for rank, side in enumerate((49, 60, 200)):
        picture(tmp_path / "a" / f"{rank}.png", size=(side, 300))
        picture(tmp_path / "b" / f"{rank}.png", size=(300, side))
    assert open_images(tmp_path).image_size == 64
    assert open_images(tmp_path, image_size=96).image_size == 96


def test_resizing_keeps_the_middle_as_timm_does(tmp_path: Path) -> None:
    import timm
    from timm.data import create_transform

    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(noise).save(tmp_path / name / "1.png")
        Image.fromarray(noise).save(tmp_path / name / "2.png")
    cfg = timm.create_model("resnet20_conam.cifar10").pretrained_cfg
    transform = create_transform((3, 32, 32), interpolation=cfg["interpolation"], crop_pct=cfg["crop_pct"])
    data = open_images(tmp_path, image_size=32)
    assert isinstance(data.train, ImageSplit)
    expected = Image.fromarray(noise)
    for step in transform.transforms[:2]:
        expected = step(expected)
    assert np.array_equal(data.train.images[0].numpy(), np.asarray(expected))


def damage(root: Path) -> None:
    whole = (root / "cat" / "00.png").read_bytes()
    (root / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "empty.jpg").write_bytes(b"")
    (root / "dog" / "text.png").write_text("no picture")
    (root / "dog" / "noise.gif").write_bytes(random.Random(0).randbytes(500))


def test_damaged_files_are_counted_and_named_and_stop_before_anything_begins(tmp_path: Path) -> None:
    damage(tree(tmp_path))
    with pytest.raises(UserError, match=r"4 images cannot be read: .*cut\.png.*empty\.jpg.*; and 1 more"):
        open_images(tmp_path)


@pytest.mark.parametrize("free", [None, 1])
def test_damaged_files_can_be_skipped(tmp_path: Path, free: int | None) -> None:
    damage(tree(tmp_path))
    data = open_images(tmp_path, corrupt="skip", free=free)
    assert {Path(image.name).name for image in data.unreadable} == {"cut.png", "empty.jpg", "noise.gif", "text.png"}
    assert sum(data.counts) + len(data.val or ()) == 20
    assert isinstance(data.train, ImageSplit) == (free is None)


def test_a_damaged_class_without_a_rest_is_refused(tmp_path: Path) -> None:
    tree(tmp_path)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="no readable training image of the class gone"):
        open_images(tmp_path, corrupt="skip")


def test_images_that_do_not_fit_into_memory_give_the_same_splits(tmp_path: Path) -> None:
    tree(tmp_path)
    here, there = open_images(tmp_path), open_images(tmp_path, free=1)
    assert isinstance(here.train, ImageSplit)
    assert not isinstance(there.train, ImageSplit)
    assert (tuple(there.train.names), there.counts) == (here.train.names, here.counts)
    assert there.train.labels.tolist() == here.train.labels.tolist()
    assert all(torch.equal(there.train.pixels(index, 32), here.train.images[index]) for index in range(len(here.train)))
    assert here.val is not None
    assert there.val is not None
    assert torch.equal(here.val.images, there.val.images)


def test_npy_arrays(tmp_path: Path) -> None:
    data = open_images(write_arrays(tmp_path, ("ant", "bee", "cow"), {"train": 30, "test": 6}))
    assert data.classes == ("ant", "bee", "cow")
    assert data.test is not None
    assert len(data.test) == 6
    assert torch.equal(data.test.images, read_split(tmp_path, "test").images)


@pytest.mark.parametrize(
    "form",
    ["images", "train_images", "x_train"],
)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float", "grey", "one channel", "rgba"])
def test_npz_files(tmp_path: Path, form: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 256, (12, 9, 9, 3), dtype=np.uint8)
    if kind in ("grey", "one channel"):
        plain = plain[..., :1].repeat(3, -1)
    images = {
        "uint8": plain,
        "uint16": plain.astype(np.uint16) * 257,
        "float": plain / 255,
        "grey": plain[..., 0],
        "one channel": plain[..., :1],
        "rgba": np.concatenate([plain, np.full((12, 9, 9, 1), 255, np.uint8)], -1),
    }[kind]
    labels = form.replace("images", "labels").replace("x_", "y_")
    np.savez(tmp_path / "set.npz", **{form: images, labels: np.array(["b", "a"] * 6)})
    source = find_sources(tmp_path / "set.npz")["train"]
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [1, 0] * 6
    assert np.array_equal(np.stack([np.asarray(source.picture(index)) for index in range(12)]), plain)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"pictures": np.zeros(3)}, "holds no training images"),
        ({"images": np.zeros((4, 8, 8), np.uint8)}, "only one of"),
        ({"images": np.zeros((4, 8), np.uint8), "labels": np.arange(4)}, "must hold uint8"),
        ({"images": np.zeros((4, 8, 8), complex), "labels": np.arange(4)}, "must hold uint8"),
        ({"images": np.full((4, 8, 8), 16.0), "labels": np.arange(4)}, r"must lie in \[0, 1\]"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(3)}, "must be as many"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4) - 1}, "number them from 0"),
        ({"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros((4, 2))}, "one number or name"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict, sentence: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        find_sources(tmp_path / "set.npz")


def test_what_is_no_npz_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 nothing"):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as an \.npz file"):
            find_sources(tmp_path / "set.npz")


def test_statistics_are_those_of_the_pixels() -> None:
    images = torch.randint(256, (7, 5, 4, 3), dtype=torch.uint8)
    mean, std = pixel_statistics(images)
    pixels = images.double() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2), correction=0), atol=1e-12)


def test_sources_can_be_handed_to_other_processes(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=np.full((4, 8, 8), 7, np.uint8), labels=np.arange(4))
    for source in (find_sources(tree(tmp_path / "set"))["train"], find_sources(tmp_path / "set.npz")["train"]):
        assert pickle.loads(pickle.dumps(source)).picture(1) == source.picture(1)


def test_a_split_can_be_read_at_the_size_of_a_net(tmp_path: Path) -> None:
    tree(tmp_path / "train", count=3)
    everything = read_split(tmp_path, "test", image_size=16)
    assert everything.images.shape == (6, 16, 16, 3)
    assert "all images, because there is no test split" in everything.source
    tree(tmp_path / "test", ("dog",), count=2)
    split = read_split(tmp_path, "test", image_size=16)
    assert (len(split), split.classes) == (2, ("cat", "dog"))
    tree(tmp_path / "new" / "test", count=2)
    assert len(read_split(tmp_path / "new", "test", image_size=16)) == 4
    (tmp_path / "test" / "dog" / "broken.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read.*broken\.png"):
        read_split(tmp_path, "test", image_size=16)


def test_arrays_of_the_right_size_are_read_as_they_are(tmp_path: Path) -> None:
    root = write_arrays(tmp_path / "cifar10", ("ant", "bee"), {"train": 8, "test": 4}).parent
    plain, sized = read_split(root, "test", "cifar10"), read_split(root, "test", "cifar10", image_size=32)
    assert torch.equal(plain.images, sized.images)
    assert read_split(root, "test", "cifar10", image_size=16).images.shape == (4, 16, 16, 3)


class _Map:
    """What this package uses of timm's ``ImageDataset`` around a Hugging Face set."""

    def __init__(self, split: str) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split {split}")
        self.reader = self
        self.class_to_idx = {"yes": 0, "no": 1}
        self.count = {"train": 10, "test": 4}[split]

    def iter_targets(self):
        return iter([index % 2 for index in range(self.count)])

    def __getitem__(self, index: int):
        file = io.BytesIO()
        if index == 3:
            file.write(b"damaged")
        else:
            Image.new("LA", (50, 60), (index, 255)).save(file, "PNG")
        return io.BytesIO(file.getvalue()), index % 2


def test_a_test_split_with_secret_labels_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Secret(_Map):
        def iter_targets(self):
            return iter([-1] * self.count)

    kinds = {"train": _Map, "test": Secret}
    monkeypatch.setattr("timm.data.create_dataset", lambda name, split, **rest: kinds[split](split))
    assert open_images("hfds/someone/things", corrupt="skip").test is None


def test_a_split_without_a_readable_image_counts_as_absent(tmp_path: Path) -> None:
    tree(tmp_path / "train")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "1.png").write_bytes(b"")
    data = open_images(tmp_path, corrupt="skip")
    assert data.test is None
    assert any("the test split holds no readable image" in note for note in data.notes)


def test_a_name_of_timm_opens_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.data.create_dataset", lambda name, split, **rest: _Map(split))
    with pytest.raises(UserError, match="2 images cannot be read"):
        open_images("hfds/someone/things")
    data = open_images("hfds/someone/things", corrupt="skip")
    assert data.classes == ("yes", "no")
    assert (sum(data.counts), len(data.val or ()), len(data.test or ())) == (7, 2, 3)


def test_torchvision_sets_have_a_test_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Fake:
        def __init__(self, count: int) -> None:
            self.targets, self.classes = [index % 2 for index in range(count)], ["zero", "one"]

        def __getitem__(self, index: int):
            return Image.new("L", (28, 28), index), self.targets[index]

    asked = []

    def create(name: str, split: str, **rest):
        asked.append((name, split, rest["root"]))
        return Fake(20 if split == "train" else 6)

    monkeypatch.setattr("timm.data.create_dataset", create)
    data = open_images("torch/fashion_mnist@/somewhere")
    assert asked == [
        ("torch/fashion_mnist", "train", "/somewhere"),
        ("torch/fashion_mnist", "validation", "/somewhere"),
    ]
    assert (sum(data.counts), len(data.val or ()), len(data.test or ())) == (18, 2, 6)


def test_a_stream_of_tar_files_is_read_into_memory(tmp_path: Path) -> None:
    splits = {}
    for split, count in (("train", 8), ("validation", 4)):
        with tarfile.open(tmp_path / f"things-{split}-000.tar", "w") as archive:
            for index in range(count):
                file = io.BytesIO()
                Image.new("RGB", (20, 20), (index, 0, 0)).save(file, "PNG")
                for name, content in ((f"{index:03d}.png", file.getvalue()), (f"{index:03d}.cls", b"%d" % (index % 2))):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        shards = {"filenames": [archive.name], "shard_lengths": [count]}
        splits[split] = {"name": split, "num_samples": count, **shards}
    (tmp_path / "info.json").write_text(json.dumps({"splits": splits}))
    data = open_images(f"wds/things@{tmp_path}")
    assert (data.classes, data.counts, len(data.val or ())) == (("0", "1"), (4, 4), 4)
    assert isinstance(data.train, ImageSplit)
    assert sorted(data.train.images[:, 0, 0, 0].tolist()) == list(range(8))


def test_a_name_that_timm_cannot_open_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="timm cannot open the data set hfds/nobody/nothing"):
        open_images("hfds/nobody/nothing")  # neither network nor, perhaps, the library


def test_splits_without_class_names_share_the_classes_of_the_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbers(_Map):
        def __init__(self, split: str, classes: int) -> None:
            super().__init__(split)
            self.class_to_idx, self.classes = {}, classes

        def iter_targets(self):
            return iter([index % self.classes for index in range(self.count)])

    def opened(train: int, test: int):
        counts = {"train": train, "test": test}
        monkeypatch.setattr("timm.data.create_dataset", lambda name, split, **rest: Numbers(split, counts[split]))
        return open_images("hfds/someone/things", corrupt="skip")

    few = opened(3, 2)
    assert few.test is not None
    assert few.test.classes == few.classes == ("0", "1", "2")
    with pytest.raises(UserError, match="hfds/someone/things, test has the label 2, but the training images have 2"):
        opened(2, 3)


def test_what_the_library_of_a_set_raises_is_an_unreadable_image(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holes(_Map):
        def __getitem__(self, index: int):
            if index == 5:
                raise TypeError("argument of type 'NoneType' is not iterable")
            return super().__getitem__(index)

    monkeypatch.setattr("timm.data.create_dataset", lambda name, split, **rest: Holes(split))
    data = open_images("hfds/someone/things", corrupt="skip")
    assert "hfds/someone/things, train 5" in {image.name.partition(": ")[2] for image in data.unreadable}
    assert any("'NoneType' is not iterable" in image.reason for image in data.unreadable)


def test_a_test_split_that_cannot_be_opened_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, split: str, **rest):
        if split != "train":
            raise OSError("the network is down")
        return _Map(split)

    monkeypatch.setattr("timm.data.create_dataset", create)
    notes = open_images("hfds/someone/things", corrupt="skip").notes
    assert any("no test split" in note and "the network is down" in note for note in notes)


def test_a_folder_of_torchvision_is_read_as_any_other(tmp_path: Path) -> None:
    tree(tmp_path / "train")
    tree(tmp_path / "test", count=3)
    data = open_images(f"torch/image_folder@{tmp_path}")
    assert data.test is not None
    assert (data.classes, len(data.test)) == (("cat", "dog"), 6)


def test_files_that_torchvision_lists_are_read_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Listed:
        """What of torchvision's ``ImageNet`` and ``Places365`` is used."""

        loader = None

        def __init__(self, root: Path) -> None:
            sideways, exif = Image.new("RGBA", (40, 20), (0, 0, 0, 0)), Image.Exif()
            exif[0x0112] = 6
            sideways.save(root / "turned.png", exif=exif)
            self.imgs = [(str(root / "turned.png"), 0), (str(root / "missing.png"), 1)]
            self.targets, self.classes = [0, 1], ["one", "two"]

        def __len__(self) -> int:
            return 2

    monkeypatch.setattr("timm.data.create_dataset", lambda name, split, **rest: Listed(tmp_path))
    source = find_sources(f"torch/imagenet@{tmp_path}")["train"]
    assert source.picture(0).size == (20, 40)
    assert source.picture(0).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(UserError, match=r"missing\.png"):
        source.picture(1)


def test_dark_pictures_are_told_of_sets_that_do_not_fit_into_memory(tmp_path: Path) -> None:
    tree(tmp_path)
    Image.fromarray(np.full((32, 32), 200, np.uint16)).save(tmp_path / "cat" / "dark.png")
    for free in (None, 1):
        assert any("has 16 bits" in note for note in open_images(tmp_path, free=free).notes)


def test_a_split_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "train")
    tree(tmp_path / "test")
    monkeypatch.setattr("conam_zoo.data.dataset.free_bytes", lambda device: 10_000)
    with pytest.raises(UserError, match=r"test needs .* but 0\.0 GB of memory are free"):
        open_images(tmp_path, free=1)

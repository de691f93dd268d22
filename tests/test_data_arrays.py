"""Sets of arrays: types of labels and images, class names, damaged files."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_arrays
from PIL import Image

from conam_zoo.data import ImageSplit, open_images, read_split
from conam_zoo.data.load import find_sources
from conam_zoo.errors import UserError


def test_label_types_of_every_promised_format(tmp_path: Path) -> None:
    images = np.zeros((20, 8, 8), np.uint8)
    plain = np.arange(20) % 2
    types = [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64, np.bool_, np.float32]
    labels = [plain.astype(dtype) for dtype in types]
    labels += [each.reshape(20, 1) for each in labels]
    for index, each in enumerate(labels):
        np.savez(tmp_path / f"{index}.npz", images=images, labels=each)
        source = find_sources(tmp_path / f"{index}.npz")["train"]
        assert (source.classes, source.labels.tolist(), source.labels.dtype) == (("0", "1"), plain.tolist(), np.int64)
    for index, names in enumerate((np.array(["b", "a"] * 10), np.array([b"b", b"a"] * 10))):
        np.savez(tmp_path / f"names {index}.npz", images=images, labels=names[:, None])
        source = find_sources(tmp_path / f"names {index}.npz")["train"]
        assert (source.classes, source.labels.tolist()) == (("a", "b"), [1, 0] * 10)


def test_a_file_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=np.zeros((0, 8, 8), np.uint8), labels=np.zeros(0, np.uint8))
    with pytest.raises(UserError, match="holds no training images"):
        open_images(tmp_path / "set.npz")


def test_medmnist_and_keras_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    med = {}
    for split, count in (("train", 12), ("val", 4), ("test", 6)):
        med[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        med[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 2)[:, None]
    np.savez(tmp_path / "breastmnist.npz", **med)
    data = open_images(tmp_path / "breastmnist.npz")
    assert (data.counts, len(data.val or ()), len(data.test or ())) == ((6, 6), 4, 6)
    x = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    y = (np.arange(12, dtype=np.uint8) % 3)[:, None]
    np.savez(tmp_path / "cifar.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    data = open_images(tmp_path / "cifar.npz", val_share=0)
    assert isinstance(data.train, ImageSplit)
    assert data.test is not None
    assert (data.train.images.numpy() == x).all()
    assert data.test.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 0.5, 1, 1]),
        np.array([0, np.nan, 1, 1]),
        np.array([0, -1, 1, 1]),
        np.array([0, 2**63, 1, 1], np.uint64),
        np.eye(4),
        np.zeros(4, complex),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "set.npz", images=np.zeros((4, 8, 8), np.uint8), labels=labels)
    with pytest.raises(UserError, match=r"train_labels of .*(one number or name|number them from 0)"):
        find_sources(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("images", "shown"),
    [
        (np.array([0, 200, 255], np.int32), [0, 200, 255]),
        (np.array([0, 200, 255], np.float64), [0, 200, 255]),
        (np.array([0, 200 * 257, 65535], np.float32), [0, 200, 255]),
        (np.array([0, np.nan, 1], np.float32), [0, 0, 255]),
        (np.array([False, True, True]), [0, 255, 255]),
    ],
)
def test_arrays_are_scaled_as_files_are(tmp_path: Path, images: np.ndarray, shown: list[int]) -> None:
    train = images[:, None, None].repeat(8, 1).repeat(8, 2)
    test = train[:1]  # dark, but white is the same as in the training images
    np.savez(tmp_path / "set.npz", train_images=train, train_labels=np.arange(3), test_images=test, test_labels=[0])
    sources = find_sources(tmp_path / "set.npz")
    assert [np.asarray(sources["train"].picture(index))[0, 0, 0] for index in range(3)] == shown
    assert np.asarray(sources["test"].picture(0)).max() == 0


def test_twelve_bits_in_an_array_of_sixteen_get_a_note(tmp_path: Path) -> None:
    images = np.full((4, 8, 8), 4000, np.uint16)
    np.savez(tmp_path / "set.npz", images=images, labels=[0, 0, 1, 1])
    assert any("if it holds 12 bits, multiply it by 16" in note for note in open_images(tmp_path / "set.npz").notes)
    for name in ("a/1", "a/2", "b/1", "b/2"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[0]).save(tmp_path / "tree" / f"{name}.png")
    assert any("if it holds 12 bits" in note and "and 3 more" in note for note in open_images(tmp_path / "tree").notes)


def damaged_npz(path: Path, kind: str) -> None:
    arrays = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.arange(4)}
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, arrays["images"])
        return
    if kind == "objects":
        np.savez(path, images=np.array([{}] * 4), labels=arrays["labels"])
        return
    np.savez_compressed(path, **arrays)
    content = bytearray(path.read_bytes())
    if kind == "encrypted":
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            place = content.find(signature)
            while place >= 0:
                content[place + offset] |= 1
                place = content.find(signature, place + 4)
    elif kind == "flipped":
        content[60] ^= 255
    elif kind == "cut":
        content = content[: len(content) // 2]
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["npy", "objects", "encrypted", "flipped", "cut"])
def test_damaged_npz_files_end_in_a_sentence(tmp_path: Path, kind: str) -> None:
    damaged_npz(tmp_path / "set.npz", kind)
    with pytest.raises(UserError, match=r"set\.npz (cannot be read|holds Python objects)") as caught:
        find_sources(tmp_path / "set.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_a_header_that_claims_too_much_asks_for_no_memory(tmp_path: Path, suffix: str) -> None:
    header = io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 32, 32, 3)}
    np.lib.format.write_array_header_1_0(header, facts)
    if suffix == "npy":
        (tmp_path / "train_images.npy").write_bytes(header.getvalue())
        np.save(tmp_path / "train_labels.npy", np.arange(4))
        with pytest.raises(UserError, match=r"train_images\.npy cannot be read"):
            find_sources(tmp_path)
        return
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(UserError, match=r"is damaged: it claims 3,072,000,000,000,000 bytes"):
        find_sources(tmp_path / "set.npz")


def test_an_archive_that_unpacks_beyond_the_memory_is_refused(tmp_path: Path, monkeypatch) -> None:
    np.savez_compressed(tmp_path / "set.npz", images=np.zeros((400, 64, 64), np.uint8), labels=np.arange(400) % 2)
    monkeypatch.setattr("conam_zoo.data.arrays.free_bytes", lambda device: 10**6)
    with pytest.raises(UserError, match=r"but 0\.0 GB of memory are free"):
        find_sources(tmp_path / "set.npz")


def test_classes_txt_is_one_name_a_line(tmp_path: Path) -> None:
    write_arrays(tmp_path, ("ant", "bee", "cow"), {"train": 12})
    (tmp_path / "classes.txt").write_bytes("\ufeffice cream\r\ncafe\u0301\r\ncow\r\n".encode())
    assert find_sources(tmp_path)["train"].classes == read_split(tmp_path, "train").classes
    assert find_sources(tmp_path)["train"].classes == ("ice cream", "caf\u00e9", "cow")
    for content, sentence in (
        (b"ant\nbee\nant\n", "names ant twice"),
        ("caf\u00e9\ncafe\u0301\ncow".encode(), "twice"),
        (b"ant\n\ncow\n", "has no name for class 1"),
        (b"ant\n\xff\ncow\n", "cannot be read as UTF-8"),
        (b"ant\nbee\n", "there are 2 classes"),
        (b"ant\n" * 2**21, "has more than 4,194,304 letters"),
        ("ant\u2028bee\ncow".encode(), "there are 2 classes"),
    ):
        (tmp_path / "classes.txt").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            find_sources(tmp_path)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    write_arrays(tmp_path, ("ant", "bee"), {"train": 4})
    for name in ("classes.txt", "train_labels.npy", "train_images.npy"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="is a pipe, a device or a socket"):
            find_sources(tmp_path)
    os.mkfifo(tmp_path / "set.npz")
    with pytest.raises(UserError, match="is a pipe, a device or a socket"):
        find_sources(tmp_path / "set.npz")


@pytest.mark.parametrize("path", ["~nobody-at-all/data", "x" * 300, "x/" * 3000, "a\0b", ""])
def test_paths_that_cannot_be_are_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"home folder that does not exist|the name is too long|empty or holds a zero"):
        open_images(path)


def test_a_mapped_array_is_not_copied_to_other_processes(tmp_path: Path) -> None:
    np.save(tmp_path / "train_images.npy", np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8))
    np.save(tmp_path / "train_labels.npy", np.arange(500) % 2)
    source = find_sources(tmp_path)["train"]
    content = pickle.dumps(source.read)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert all(again(index) == source.picture(index) for index in (0, 7, 499))

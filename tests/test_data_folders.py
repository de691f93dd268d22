"""Image folders: what is a split, what is a class, what is neither, and links."""

import os
from pathlib import Path

import numpy as np
import pytest
from test_data_opening import picture, tree

from conam_zoo.data import open_images
from conam_zoo.data.load import find_sources
from conam_zoo.errors import UserError


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("Train", "Test"), ("train_images", "val")])
def test_usual_names_of_splits_are_no_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, count in zip(names, (4, 2), strict=True):
        tree(tmp_path / name, count=count)
    data = open_images(tmp_path)
    assert (data.classes, data.counts[0] >= 3) == (("cat", "dog"), True)
    assert len((data.test or data.val) or ()) == 4


def test_a_split_that_is_wrapped_in_its_own_name(tmp_path: Path) -> None:
    tree(tmp_path / "training_set" / "training_set", count=4)
    tree(tmp_path / "test_set" / "test_set", count=2)
    data = open_images(tmp_path)
    assert (data.classes, len(data.test or ())) == (("cat", "dog"), 4)


def test_splits_whose_names_begin_alike_are_no_classes(tmp_path: Path) -> None:
    tree(tmp_path / "intel" / "seg_train" / "seg_train", count=4)
    tree(tmp_path / "intel" / "seg_test" / "seg_test", count=2)
    tree(tmp_path / "intel" / "seg_pred", ("seg_pred",), 3)
    data = open_images(tmp_path / "intel")
    assert (data.classes, len(data.test or ())) == (("cat", "dog"), 4)
    assert any("left out beside the splits: seg_pred" in note for note in data.notes)
    tree(tmp_path / "asl" / "asl_alphabet_train" / "asl_alphabet_train", count=4)
    tree(tmp_path / "asl" / "asl_alphabet_test", ("asl_alphabet_test",), 3)
    data = open_images(tmp_path / "asl")
    assert (data.classes, data.test) == (("cat", "dog"), None)
    assert any("asl_alphabet_test was left out, because it holds no class folders" in note for note in data.notes)


def test_a_class_whose_name_ends_like_a_split_stays_one(tmp_path: Path) -> None:
    tree(tmp_path, ("bus", "steam_train"), 4)
    assert open_images(tmp_path).classes == ("bus", "steam_train")
    tree(tmp_path, ("screen_test", "blood_test"), 4)
    assert open_images(tmp_path).classes == ("blood_test", "bus", "screen_test", "steam_train")


def test_a_class_called_train_does_not_hide_the_others(tmp_path: Path) -> None:
    tree(tmp_path, ("bus", "car"), 4)
    tree(tmp_path / "train", ("diesel", "steam"), 4)
    data = open_images(tmp_path)
    assert (data.classes, data.counts) == (("bus", "car", "train"), (3, 3, 7))
    assert any("train counts as a class, because folders with images lie beside it" in note for note in data.notes)


def test_the_folder_of_a_single_class_is_not_taken_for_a_wrapping(tmp_path: Path) -> None:
    tree(tmp_path / "cats", ("tabby", "black"), 2)
    picture(tmp_path / "cats" / "1.png")
    with pytest.raises(UserError, match="has only the class cats"):
        open_images(tmp_path)


def test_a_flat_test_folder_is_told(tmp_path: Path) -> None:
    tree(tmp_path / "train", count=4)
    picture(tmp_path / "test" / "1.png")
    (tmp_path / "extra").mkdir()
    data = open_images(tmp_path)
    assert (data.classes, data.test) == (("cat", "dog"), None)
    assert any("test was left out, because it holds no class folders" in note for note in data.notes)
    assert any("left out beside the splits: extra" in note for note in data.notes)


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("2019", "2020")])
def test_classes_that_all_hold_the_same_folders_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        tree(tmp_path / name, count=2)
    with pytest.raises(UserError, match="each of them holds cat, dog"):
        open_images(tmp_path)


def test_flat_splits_and_two_folders_of_a_split_are_refused(tmp_path: Path) -> None:
    tree(tmp_path / "flat", ("train", "test"), 2)
    with pytest.raises(UserError, match="names of splits, without class folders"):
        open_images(tmp_path / "flat")
    picture(tmp_path / "wrapped" / "train" / "1.png")
    picture(tmp_path / "wrapped" / "test" / "test" / "1.png")
    with pytest.raises(UserError, match="names of splits, without class folders"):
        open_images(tmp_path / "wrapped")
    for name in ("train", "training"):
        tree(tmp_path / "twice" / name, count=2)
    with pytest.raises(UserError, match="holds both train and training"):
        open_images(tmp_path / "twice")


def test_what_is_no_class_is_left_out_and_told(tmp_path: Path) -> None:
    tree(tmp_path, count=4)
    picture(tmp_path / "__MACOSX" / "cat" / "1.png")
    picture(tmp_path / "runs" / "mistakes.png")
    (tmp_path / "runs" / "run.json").write_text("{}")
    picture(tmp_path / "cat" / ".ipynb_checkpoints" / "1.png")
    picture(tmp_path / "cat" / ".thumbnails" / "1.png")
    picture(tmp_path / "dog" / "@eaDir" / "1.png")
    (tmp_path / "dog" / "log.csv").write_text("a camera's")
    data = open_images(tmp_path, val_share=0)
    assert (data.classes, data.counts) == (("cat", "dog"), (4, 4))
    assert any("1 run folders left out, such as" in note for note in data.notes)
    assert any("2 folders of the system left out" in note for note in data.notes)


def test_links_that_lead_back_add_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", count=6)
    (root / "cat" / "all").symlink_to(root)
    (root / "cat" / "others").symlink_to(root / "dog")
    (root / "dog" / "up").symlink_to("..")
    (root / "kitty").symlink_to("cat")
    (root / "again").symlink_to(root)
    (root / "dog" / "loop").symlink_to("loop")
    (root / "dog" / "above").symlink_to("../..")
    (root / "dog" / "cat.png").symlink_to(root / "cat" / "00.png")
    (root / "cow").symlink_to(tree(tmp_path / "elsewhere", ("brown",), 3))
    source = find_sources(root)["train"]
    assert source.classes == ("cat", "cow", "dog")
    assert np.bincount(source.labels).tolist() == [6, 3, 6]
    assert all(
        name.split("/")[0] == source.classes[label] for name, label in zip(source.names, source.labels, strict=True)
    )
    assert any("links to folders of the set left out" in note for note in source.notes)
    assert any("further links to a picture left out" in note for note in source.notes)


def test_a_test_split_that_is_a_link_to_the_training_images_is_none(tmp_path: Path) -> None:
    tree(tmp_path / "train", count=4)
    (tmp_path / "test").symlink_to("train")
    data = open_images(tmp_path)
    assert data.test is None
    assert any("counts as absent" in note for note in data.notes)


def test_folders_that_may_not_be_opened_are_named(tmp_path: Path, monkeypatch) -> None:
    tree(tmp_path, count=3)
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match=r"dog cannot be read \(Permission denied\): check its rights"):
        open_images(tmp_path)


def test_composed_and_decomposed_accents_are_one_class(tmp_path: Path) -> None:
    tree(tmp_path / "train", ("caf\u00e9", "tea"), 2)
    tree(tmp_path / "train", ("cafe\u0301",), 3)
    tree(tmp_path / "test", ("cafe\u0301",), 2)
    sources = find_sources(tmp_path)
    assert sources["train"].classes == ("caf\u00e9", "tea")
    assert sources["test"].labels.tolist() == [0, 0]

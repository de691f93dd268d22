"""``config.json`` of a model folder: read by timm and transformers, and refused as a whole where anything is wrong."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_client import assert_one_sentence
from safetensors.torch import load_file, save, save_file

from conam_zoo import ConAM
from conam_zoo.datasets import DATASETS
from conam_zoo.errors import UserError
from conam_zoo.models.config_schema import check_model_args, load_config
from conam_zoo.models.registry import export_model, open_model
from conam_zoo.weights import WeightsError


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    export_model(timm.create_model("resnet20_conam.cifar10", patch_sizes=(8, 8, 8)), folder, tag=None)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_timm_and_transformers_read_the_same_net(exported: Path) -> None:
    from transformers import AutoModelForImageClassification

    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    other = AutoModelForImageClassification.from_pretrained(exported).eval()
    with torch.no_grad():
        assert torch.equal(other(image).logits, own(image))
    assert list(other.config.id2label.values()) == list(DATASETS["cifar10"].classes)
    assert other.timm_model.patch_sizes == own.patch_sizes == (8, 8, 8)


def test_a_config_of_the_first_release_still_loads(folder: Path) -> None:
    def as_before(config: dict[str, Any]) -> None:
        config["model_args"]["num_classes"] = 10
        del config["label_names"]

    change(folder, as_before)
    assert open_model(f"local-dir:{folder}").num_classes == 10


def test_every_published_config_passes(checkout: Path) -> None:
    for path in (checkout / "weights").glob("*/config.json"):
        load_config(path.parent)


def into(place: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: (config[place] if place else config).update(values)


WRONG = {
    "device": into("model_args", device="cuda:7"),
    "features_only": into("model_args", features_only=True),
    "pretrained_cfg": into("model_args", pretrained_cfg={"file": "/etc/passwd"}),
    "checkpoint_path": into("model_args", checkpoint_path="/tmp/x.pth"),
    "layers": into("model_args", layers=[9, 9, 9]),
    "file": into("pretrained_cfg", file="/etc/passwd"),
    "url": into("pretrained_cfg", url="http://x/y.pth"),
    "custom_load": into("pretrained_cfg", custom_load=True),
    "unknown key": into("", novelty=1),
    "std 0": into("pretrained_cfg", std=[0.0, 0.2, 0.2]),
    "std below 0": into("pretrained_cfg", std=[-0.2, 0.2, 0.2]),
    "mean NaN": into("pretrained_cfg", mean=[float("nan"), 0.5, 0.5]),
    "one mean": into("pretrained_cfg", mean=[0.5]),
    "one channel": into("model_args", in_chans=1),
    "crop_pct 0": into("pretrained_cfg", crop_pct=0),
    "crop_pct infinite": into("pretrained_cfg", crop_pct=float("inf")),
    "crop_pct that asks for a picture of 10^9 pixels": into("pretrained_cfg", crop_pct=1e-3),
    "test_crop_pct too small": into("pretrained_cfg", test_crop_pct=1e-300),
    "fixed input": into("pretrained_cfg", fixed_input_size=True),
    "interpolation of training": into("pretrained_cfg", interpolation="random"),
    "no pooling before the classes": into("model_args", global_pool=""),
    "poolings disagree": into("", global_pool="max"),
    "channels of the attention": into("model_args", attn_args={"channels": 4}),
    "interpolation": into("pretrained_cfg", interpolation="wobbly"),
    "classes as text": into("", num_classes="10"),
    "classes beyond reason": into("", num_classes=10**9),
    "classes disagree": into("", num_classes=3),
    "too few labels": into("", label_names=["a", "b"]),
    "labels as object": into("", label_names={"0": "a"}),
    "huge input": into("pretrained_cfg", input_size=[3, 10**6, 10**6]),
    "input of two": into("pretrained_cfg", input_size=[32, 32]),
    "patches 0": into("model_args", patch_sizes=[0, 8, 4]),
    "patches as text": into("model_args", patch_sizes="848"),
    "attention": into("model_args", attn_layer="../x"),
    "no such attention": into("model_args", attn_layer="telepathy"),
    "attn_args": into("model_args", attn_args={"reduction": 10**9}),
    "drop_rate": into("model_args", drop_rate=2),
    "drop_rate as text": into("model_args", drop_rate="a lot"),
    "architecture": into("", architecture="resnet18"),
    "architecture as list": into("", architecture=["resnet20_conam"]),
    "no pretrained_cfg": lambda config: config.pop("pretrained_cfg"),
    "sha256": into("", sha256="abc"),
    "weights_file": into("", weights_file="../model.safetensors"),
}


@pytest.mark.parametrize("edit", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_one_sentence(edit: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    change(folder, edit)
    with pytest.raises((WeightsError, UserError)) as refused:
        open_model(f"local-dir:{folder}")
    assert_one_sentence(str(refused.value))
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"a": ' * 5000, "\x00", "null"])
def test_what_is_no_config_is_one_sentence(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json") as refused:
        open_model(f"local-dir:{folder}")
    assert_one_sentence(str(refused.value))


def test_what_is_nested_deeply_within_the_layout_is_one_sentence(folder: Path) -> None:
    deep = '{"a": ' * 900 + "1" + "}" * 900
    text = (folder / "config.json").read_text().replace('"model_args": {', f'"model_args": {{"attn_args": {deep}, ')
    (folder / "config.json").write_text(text)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own, which PyTorch raises when it compiles
    try:
        with pytest.raises(WeightsError, match="nested too deeply") as refused:
            open_model(f"local-dir:{folder}")
    finally:
        sys.setrecursionlimit(limit)
    assert_one_sentence(str(refused.value))


def test_a_file_beyond_all_weights_is_not_read(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 10**12)
    with pytest.raises(WeightsError, match="has more than 2147483648 bytes"):
        open_model(f"local-dir:{folder}")


def test_timm_itself_is_held_to_it(folder: Path) -> None:
    change(folder, into("model_args", device="cuda:7"))
    with pytest.raises(WeightsError, match="device"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize("arguments", [{"checkpoint_path": "x.pth"}, {"device": "cuda"}, {"cache_dir": "/"}])
def test_arguments_of_a_recipe_name_no_file_and_no_device(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(arguments))):
        check_model_args(arguments, "The setting model_args")


def test_a_folder_below_the_home_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_model("local-dir:~/model").num_classes == 10


@pytest.mark.parametrize("kind", ["nan", "infinity", "bool", "int8", "complex"])
def test_tensors_that_are_no_weights_are_refused(kind: str, folder: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    bias = tensors["fc.bias"]
    dtypes = {"bool": torch.bool, "int8": torch.int8, "complex": torch.complex64}
    values = {"nan": torch.nan, "infinity": torch.inf}
    tensors["fc.bias"] = bias.to(dtypes[kind]) if kind in dtypes else torch.full_like(bias, values[kind])
    data = save(tensors)
    (folder / "model.safetensors").write_bytes(data)
    change(folder, into("", sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(WeightsError, match=r"tensor fc\.bias"):
        open_model(f"local-dir:{folder}")


def test_a_tensor_that_is_named_twice_is_refused(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    inner = json.loads(header)
    twice = header[:-1] + b',"fc.bias":' + json.dumps(inner["fc.bias"]).encode() + b"}"
    data = len(twice).to_bytes(8, "little") + twice + data[8 + size :]
    (folder / "model.safetensors").write_bytes(data)
    change(folder, into("", sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(WeightsError, match=r"names fc\.bias twice"):
        open_model(f"local-dir:{folder}")


def test_list_finds_what_begins_so_and_info_knows_a_folder(conam, folder: Path) -> None:  # type: ignore[no-untyped-def]
    _, out, _ = conam("list", "resnet20", "--json", "-")
    assert [row["model"] for row in json.loads(out)] == ["resnet20_conam"]
    code, out, _ = conam("info", f"local-dir:{folder}", "--json", "-")
    assert code == 0
    (facts,) = json.loads(out)["weights"].values()
    data = (folder / "model.safetensors").read_bytes()
    assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    assert (facts["size_bytes"], facts["dtype"]) == (len(data), "float32")


def test_a_file_is_not_loaded_into_other_patch_sizes(folder: Path) -> None:
    own = {"num_classes": 10, "input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"}
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(folder / "model.safetensors")}}
    with pytest.raises(WeightsError, match=r"patch_sizes=\[8, 8, 8\]") as refused:
        timm.create_model("resnet20_conam", pretrained_cfg=own, **options)
    assert_one_sentence(str(refused.value))
    net = timm.create_model("resnet20_conam", pretrained_cfg=own, patch_sizes=(8, 8, 8), **options)
    assert net.patch_sizes == (8, 8, 8)


def test_a_checkpoint_path_is_not_loaded_into_other_patch_sizes_nor_if_it_holds_nan(folder: Path) -> None:
    path = folder / "model.safetensors"
    with pytest.raises(WeightsError, match=r"patch_sizes=\[8, 8, 8\]"):
        timm.create_model("resnet20_conam", checkpoint_path=str(path))
    net = timm.create_model("resnet20_conam", checkpoint_path=path, patch_sizes=(8, 8, 8))
    assert torch.equal(net.fc.weight, load_file(path)["fc.weight"])
    net.load_state_dict(load_file(path))
    save_file(load_file(path) | {"fc.bias": torch.full((10,), torch.nan)}, path)
    with pytest.raises(WeightsError, match=r"fc\.bias holds NaN"):
        timm.create_model("resnet20_conam", checkpoint_path=path, patch_sizes=(8, 8, 8))


def test_a_pickled_checkpoint_is_not_loaded_into_other_patch_sizes(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    path = folder / "pytorch_model.bin"
    with pytest.raises(WeightsError, match=r"patch_sizes=\[8, 8, 8\]"):
        timm.create_model("resnet20_conam", checkpoint_path=str(path))
    assert timm.create_model("resnet20_conam", checkpoint_path=path, patch_sizes=(8, 8, 8)).patch_sizes == (8, 8, 8)


def test_a_configuration_that_is_passed_on_brings_its_arguments(folder: Path) -> None:
    cfg = timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
    assert timm.create_model("resnet20_conam", pretrained=True, pretrained_cfg=cfg).patch_sizes == (8, 8, 8)
    features = timm.create_model("resnet20_conam", pretrained=True, pretrained_cfg=cfg, features_only=True)
    assert {module.patch_size for module in features.modules() if isinstance(module, ConAM)} == {8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.weight": None, "fc.bias": None}, r"its fc\.weight has shape \(10, 64\) and theirs has none"),
        ({"fc.bias": None}, r"its fc\.bias has shape \(10,\) and theirs has none"),
        ({"fc.bias": torch.zeros(2)}, r"theirs has shape \(2,\)"),
        ({"fc.weight": torch.zeros(10, 63)}, r"theirs has shape \(10, 63\)"),
        ({"bn1.running_var": -torch.ones(16)}, r"bn1\.running_var holds a variance below zero"),
        ({"fc.bias": torch.full((10,), torch.nan)}, r"fc\.bias holds NaN"),
        ({"fc.bias": torch.zeros(10, dtype=torch.int8)}, "type torch.int8"),
    ],
)
def test_tensors_without_a_fitting_head_or_sense_are_refused(
    changes: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = timm.create_model("resnet20_conam").state_dict() | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(WeightsError, match=message):
        timm.create_model("resnet20_conam", pretrained=True, pretrained_cfg_overlay={"state_dict": tensors})

"""Opening models by name, and exported ONNX files as such: for ``conam evaluate``, ``predict`` and ``demo``."""

import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from conam_zoo.errors import UserError
from conam_zoo.models import StagedClassifier
from conam_zoo.models.config_schema import check_config
from conam_zoo.models.registry import open_model

FORMAT = "conam_zoo 1"  # in the metadata of every file that this package exports
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TEXTS = ("architecture", "interpolation")
FACTS = (*TEXTS, "classes", "num_classes", "input_size", "mean", "std", "crop_pct")


def need_onnx(otherwise: str = "") -> None:
    """Refuse to go on without the packages of the extra ``onnx``; ``otherwise``, after a comma, is another way out."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"ONNX files need {', '.join(missing)}: pip install {' '.join(missing)}{otherwise}.")


def open_classifier(name: str) -> StagedClassifier:
    """A model by name, ``local-dir:FOLDER``, ``hf-hub:OWNER/NAME``, or path of an exported ``.onnx`` file.

    Such a file stands in for a net where logits and configuration are all that is asked for.
    """
    if not name.startswith(("local-dir:", "hf-hub:")) and name.lower().endswith(".onnx"):
        return cast(StagedClassifier, OnnxClassifier(name).eval())
    return open_model(name)


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on a file, on the CPU, with as many threads as PyTorch has."""
    need_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors are raised as well
    try:
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
    except Exception as error:  # ONNX Runtime's own errors have no class in common
        raise UserError(f"{path} is not an ONNX file that ONNX Runtime can run: export it again.") from error


class OnnxClassifier(nn.Module):
    """A file that ``export`` wrote as a net, on the CPU: normalised images (N, 3, H, W) to logits (N, classes)."""

    mean: Tensor
    std: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        self._session = open_session(path)
        cfg, self.pixels = _facts(path, self._session.get_modelmeta().custom_metadata_map)
        self.num_classes: int = cfg["num_classes"]
        self.pretrained_cfg = cfg
        self.default_cfg = self.pretrained_cfg
        mean, std = (torch.tensor(cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.device_marker = nn.Parameter(torch.empty(0), requires_grad=False)  # callers ask a net for its device so

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        if self.pixels:  # back to the pixels, which are whole numbers
            x = ((x * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        (logits,) = self._session.run(["logits"], {"image": x.cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(x.device)


def _facts(path: Path, metadata: dict[str, str]) -> tuple[dict[str, Any], bool]:
    """The configuration that an exported file states, and whether it takes pixels; a damaged one is refused."""
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by 'conam export': its classes and normalisation are unknown.")
    try:
        cfg = {key: metadata[key] if key in TEXTS else json.loads(metadata[key]) for key in FACTS}
        cfg |= {"label_names": cfg.pop("classes"), "crop_mode": metadata.get("crop_mode", "center")}
        check_config({"architecture": cfg["architecture"], "pretrained_cfg": cfg})
        pixels = metadata["layout"].startswith("NHWC")
        if not cfg["num_classes"]:
            raise ValueError("num_classes is 0")
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"The metadata of {path} is damaged ({error}): export it again.") from error
    tuples = {key: tuple(value) for key, value in cfg.items() if isinstance(value, list)}
    return cfg | tuples | {"tag": metadata.get("tag") or None}, pixels

"""Opening models by name, and exported ONNX files as such: for ``conam evaluate``, ``predict`` and ``demo``."""

import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from conam_zoo.errors import UserError
from conam_zoo.models import StagedClassifier
from conam_zoo.models.registry import open_model

FORMAT = "conam_zoo 1"  # in the metadata of every file that this package exports
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FACTS = ("architecture", "classes", "num_classes", "input_size", "mean", "std", "layout", "interpolation", "crop_pct")


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
        cfg = _facts(path, self._session.get_modelmeta().custom_metadata_map)
        self.num_classes: int = cfg["num_classes"]
        self.pixels = str(cfg.pop("layout")).startswith("NHWC")
        self.pretrained_cfg: dict[str, Any] = {
            **cfg,
            "label_names": tuple(cfg.pop("classes")),
            "input_size": tuple(cfg["input_size"]),
        }
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


def _facts(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by 'conam export': its classes and normalisation are unknown.")
    try:
        texts = ("architecture", "layout", "interpolation")
        facts = {key: metadata[key] if key in texts else json.loads(metadata[key]) for key in FACTS}
        size, classes = facts["input_size"], facts["num_classes"]
        sound = (
            isinstance(classes, int)
            and classes > 0
            and len(size) == 3
            and all(isinstance(side, int) and side > 0 for side in size)
            and len(facts["classes"]) in (0, classes)
            and all(isinstance(name, str) for name in facts["classes"])
            and all(len(facts[key]) == size[0] for key in ("mean", "std"))
            and all(float(value) > 0 for value in facts["std"])
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"The metadata of {path} is damaged ({error}): export it again.") from error
    if not sound:
        raise UserError(f"The metadata of {path} is damaged: export it again.")
    return facts | {"tag": metadata.get("tag") or None, "crop_mode": metadata.get("crop_mode", "center")}

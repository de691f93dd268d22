"""torch.hub: what it lists, explains and loads, offline, from a copy of the repository.

Each case runs in a process of its own that cannot see the checkout: what is imported is the copy that torch.hub found.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm

import conam_zoo  # noqa: F401 (registers the models)

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[1]
REPOSITORY, REFERENCE = "some-lab/conam_zoo", "v1"

# Runs a task that is given as JSON, in a process whose import path lacks the checkout.
CLIENT = """
import json, os, sys

task = json.loads(sys.argv[1])
sys.path[:] = [p for p in sys.path if p and os.path.realpath(p) != task["checkout"]]


class Without:
    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder, task["hidden"]) for finder in sys.meta_path]

for name in task["hidden"]:
    sys.modules.pop(name, None)
import torch

told = {}
try:
    if task["source"] == "github":
        options = {"source": "github", "trust_repo": True}
        told["names"] = torch.hub.list(task["repository"], trust_repo=True)
        told["docs"] = {name: torch.hub.help(task["repository"], name, trust_repo=True) for name in task["help"]}
    else:
        options = {"source": "local"}
    shapes = {}
    for name, arguments, channels in task["load"]:
        model = torch.hub.load(task["repository"], name, **options, **arguments).eval()
        shapes[name] = list(model(torch.zeros(2, channels, 32, 32)).shape)
    told["shapes"] = shapes
    if task["refused"]:
        try:
            torch.hub.load(task["repository"], task["refused"], **options, not_an_argument=1)
        except TypeError as error:
            told["refused"] = str(error)
    import conam_zoo
    told["imported"] = os.path.realpath(conam_zoo.__file__)
except RuntimeError as error:
    told["error"] = str(error)
print(json.dumps(told))
"""


@pytest.fixture
def repository_copy(tmp_path: Path) -> Path:
    """A copy where torch.hub looks for a repository that it has downloaded."""
    copy = tmp_path / "home" / "hub" / f"{REPOSITORY.replace('/', '_')}_{REFERENCE}"
    copy.mkdir(parents=True)
    for file in ("hubconf.py", "weights_manifest.json"):
        shutil.copy(CHECKOUT / file, copy)
    shutil.copytree(CHECKOUT / "conam_zoo", copy / "conam_zoo", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def ask(tmp_path: Path, python: str, **task: Any) -> dict[str, Any]:
    """What the client tells about a task."""
    defaults = {"checkout": str(CHECKOUT), "hidden": [], "help": [], "load": [], "refused": None}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        [python, "-I", "-c", CLIENT, json.dumps(defaults | task)],
        cwd=tmp_path,
        env=environment | {"TORCH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_from_a_downloaded_repository(repository_copy: Path, tmp_path: Path, warm_python: str) -> None:
    names = timm.list_models("*_conam")
    told = ask(
        tmp_path,
        warm_python,
        source="github",
        repository=f"{REPOSITORY}:{REFERENCE}",
        help=names,
        load=[
            ["resnet20_conam", {}, 3],
            ["wide_resnet16_4_conam", {"tag": "cifar100", "attn_layer": "none"}, 3],
            ["densenet40_12_conam", {"pretrained": False, "num_classes": 7, "in_chans": 1}, 1],
        ],
        refused="resnet20_conam",
    )
    assert "error" not in told
    assert sorted(told["names"]) == sorted(names), "every registered model, and nothing else"
    for name in names:
        summary = (timm.model_entrypoint(name).__doc__ or "").strip()
        assert summary
        assert told["docs"][name].startswith(summary)
        assert "Example:" in told["docs"][name]
        assert f'"{name}", pretrained=True, tag="cifar100"' in told["docs"][name]
    assert told["shapes"] == {
        "resnet20_conam": [2, 10],
        "wide_resnet16_4_conam": [2, 100],
        "densenet40_12_conam": [2, 7],
    }
    assert "not_an_argument" in told["refused"]
    assert Path(told["imported"]).is_relative_to(repository_copy.resolve()), "the copy serves itself"


def test_from_a_local_folder(repository_copy: Path, tmp_path: Path, warm_python: str) -> None:
    told = ask(
        tmp_path,
        warm_python,
        source="local",
        repository=str(repository_copy),
        load=[["resnet20_conam", {"tag": "cifar100"}, 3]],
    )
    assert "error" not in told
    assert told["shapes"] == {"resnet20_conam": [2, 100]}


@pytest.mark.parametrize("missing", [["timm"], ["safetensors"], ["timm", "torchvision"]])
def test_missing_dependency_is_named(
    missing: list[str], repository_copy: Path, tmp_path: Path, warm_python: str
) -> None:
    told = ask(
        tmp_path,
        warm_python,
        source="local",
        repository=str(repository_copy),
        hidden=missing,
        load=[["resnet20_conam", {}, 3]],
    )
    assert told["error"].startswith("Missing dependencies: ")
    assert sorted(told["error"].removeprefix("Missing dependencies: ").split(", ")) == sorted(missing)

"""A broken manifest is one sentence from every command, and no obstacle to importing and to nets without weights."""

import os
import subprocess

import pytest
from conftest import CHECKOUT
from hub_client import assert_one_sentence, install_package

from conam_zoo.weights import Manifest

pytestmark = pytest.mark.slow

# Puts each of the files that it is given in the place of the manifest, and uses the package in a fork; what that prints
# is in ``FILE.out`` and ``FILE.err``.
PROGRAM = """
import os, shutil, sys
import huggingface_hub, jsonschema, rich.console, rich.table, safetensors.torch, timm, torchvision  # which take seconds
site, *files = sys.argv[1:]
for file in files:
    shutil.copy(file, os.path.join(site, "conam_zoo", "weights_manifest.json"))
    if os.fork() == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(file + "." + name, os.O_WRONLY | os.O_CREAT), number)
        break
    assert os.wait()[1] == 0, file
else:
    sys.exit()
sys.path.insert(0, site)
sys.argv[:] = ["conam"]
import conam_zoo, timm
assert conam_zoo.__file__.startswith(sys.path[0])
timm.create_model("resnet20_conam")
from conam_zoo.cli import main
commands = ["list"], ["info", "resnet20_conam"], ["verify"], ["mirror", "m"], ["predict", "resnet20_conam", "x.png"]
for command in commands:
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as stop:
        print(command[0], stop.code)
import runpy
hubconf = runpy.run_path(%r)
hubconf["resnet20_conam"]()
try:
    timm.create_model("resnet20_conam.cifar10", pretrained=True)
except ValueError as error:
    print(type(error).__name__, error)
"""


TEXTS = {
    "half an object": b"{",
    "no UTF-8": b"\xff",
    "another version": b'{"schema_version": 99}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "empty": b"",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, tuple[str, str]]:
    """Standard output and standard error for each text in the place of the manifest."""
    root = tmp_path_factory.mktemp("broken")
    site = install_package(root / "site", Manifest({}))
    for name, text in TEXTS.items():
        (root / name).write_bytes(text)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [warm_python, "-c", PROGRAM % str(CHECKOUT / "hubconf.py"), site, *TEXTS],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr
    return {name: ((root / f"{name}.out").read_text(), (root / f"{name}.err").read_text()) for name in TEXTS}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("text", TEXTS)
def test_a_broken_manifest_is_one_sentence(text: str, told: dict[str, tuple[str, str]]) -> None:
    out, err = told[text]
    *codes, last = out.strip().splitlines()
    assert codes == ["list 2", "info 2", "verify 2", "mirror 2", "predict 2"]
    assert last.startswith("ManifestError The manifest ")
    lines = err.strip().splitlines()
    assert len(lines) == len(codes)
    for line in lines:
        assert line.startswith("conam: The manifest ")
        assert_one_sentence(line)

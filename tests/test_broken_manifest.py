"""A broken manifest is one sentence from every command, and no obstacle to importing and to nets without weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT
from hub_client import assert_one_sentence, install_package

from conam_zoo.weights import Manifest

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
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


@pytest.mark.parametrize("text", [b"{", b"\xff", b'{"schema_version": 99}', b"[" * 100_000, b""], ids=str)
def test_a_broken_manifest_is_one_sentence(text: bytes, tmp_path: Path) -> None:
    if len(text) > 1000:
        text = text + b"]" * len(text)
    site = install_package(tmp_path / "site", Manifest({}))
    (site / "conam_zoo" / "weights_manifest.json").write_bytes(text)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM % str(CHECKOUT / "hubconf.py"), str(site)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    *codes, last = result.stdout.strip().splitlines()
    assert codes == ["list 2", "info 2", "verify 2", "mirror 2", "predict 2"]
    assert last.startswith("ManifestError The manifest ")
    for line in result.stderr.strip().splitlines():
        assert line.startswith("conam: The manifest ")
        assert_one_sentence(line)

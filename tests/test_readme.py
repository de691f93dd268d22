"""The README's Python blocks run as they stand, one after the other, from the checkout."""

import re
import subprocess
import sys
from pathlib import Path

import typer
from conftest import CHECKOUT
from PIL import Image

from conam_zoo.cli import app

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_python_block_runs(tmp_path: Path) -> None:
    blocks = BLOCK.findall((CHECKOUT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 4
    for name in ("ant", "bee", "cow"):
        folder = tmp_path / "my_pictures" / name
        folder.mkdir(parents=True)
        for index in range(4):
            Image.effect_noise((48, 40), 80).convert("RGB").save(folder / f"{index}.jpg")
    for block in blocks:
        script = block.replace('torch.hub.load(".",', f"torch.hub.load({str(CHECKOUT)!r},")
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_every_command_it_names_exists() -> None:
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"\bconam ([a-z]+)", text))
    defined = set(typer.main.get_group(app).commands)
    assert commands <= defined
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_every_link_to_a_file_leads_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (CHECKOUT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (CHECKOUT / target).exists(), f"{document} links to {target}"

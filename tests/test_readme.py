"""The README's Python blocks run as they stand; commands, options, links and paths that a document names are there."""

import re
import subprocess
from pathlib import Path

import pytest
import typer
from conftest import CHECKOUT, PYTHON_BLOCK
from PIL import Image

from conam_zoo.cli import app
from experiments import __main__  # noqa: F401 (registers its commands)
from experiments.speed.commands import app as research


@pytest.mark.slow
def test_every_python_block_runs(tmp_path: Path, warm_python: str) -> None:
    blocks = PYTHON_BLOCK.findall((CHECKOUT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 2
    page = (CHECKOUT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    blocks += PYTHON_BLOCK.findall(page.partition("## A loop of your own")[2])
    assert len(blocks) == 3
    for name in ("ant", "bee", "cow"):
        folder = tmp_path / "my_pictures" / name
        folder.mkdir(parents=True)
        for index in range(4):
            Image.effect_noise((48, 40), 80).convert("RGB").save(folder / f"{index}.jpg")
    for block in blocks:
        script = block.replace('torch.hub.load(".",', f"torch.hub.load({str(CHECKOUT)!r},")
        result = subprocess.run([warm_python, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/LOG.md"),
    *(f"docs/{path.name}" for path in sorted((CHECKOUT / "docs").glob("*.md"))),
]


COMMAND = r"(?:torchrun .*-m )?(conam_zoo|conam|python -m experiments)"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_it_names_exists(document: str) -> None:
    text = (CHECKOUT / document).read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`|\$ )(conam|python -m experiments) ([a-z][a-z-]*)", text, re.MULTILINE)
    commands = {"conam": app, "python -m experiments": research}
    for command, word in named:
        assert word in typer.main.get_group(commands[command]).commands, f"{document} names {command} {word}"
    for command, word, arguments in re.findall(rf"^{COMMAND} ([a-z][a-z-]*) ([^#\n]*)", text, re.MULTILINE):
        known = typer.main.get_group(commands.get(command, app)).commands[word]
        if word == "gpu":
            known = known.commands[arguments.split()[0]]
        options = {name for parameter in known.params for name in (*parameter.opts, *parameter.secondary_opts)}
        given = set(re.findall(r"(?<!\S)--[a-z][\w-]*", arguments))
        assert given <= options, f"{document} gives {command} {word} {given - options}"
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_path_leads_somewhere(document: str) -> None:
    path = CHECKOUT / document
    text = path.read_text(encoding="utf-8")
    for target, section in re.findall(r"\]\(([^)#]*)(#[^)]+)?\)", text):
        if target.startswith("http"):
            continue
        linked = path.parent / target if target else path
        assert linked.exists(), f"{document} links to {target}"
        if section:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {"#" + re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert section in anchors, f"{document} links to {target}{section}"
    for named in re.findall(r"`((?:conam_zoo|experiments|tests|docs|examples|weights)/[\w./-]*)`", text):
        if "NAME" in named:
            continue
        assert (CHECKOUT / named).exists(), f"{document} names {named}"

"""The command as a process: Ctrl-C at any moment, output that cannot be written, a working folder that is gone."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conam_zoo.startup import is_our_command

pytestmark = pytest.mark.slow

SCRIPT = "import sys; sys.argv[0] = '/usr/bin/conam'; from conam_zoo.cli import main; main()"
# Python imports this before anything else: from then on it is certain what the signal meets.
TIMER = """
import os, signal, threading, time
def interrupt():
    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a busy machine takes its time until there
        time.sleep(0.01)
    time.sleep({seconds})
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
"""
IMPORTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


def conam_process(
    *arguments: str,
    command: tuple[str, ...] = ("-m", "conam_zoo"),
    path: Path | None = None,
    shell: str = "",
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own, perhaps with a ``sitecustomize`` or in a line of a shell."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root if path is None else f"{path}{os.pathsep}{root}"}
    line = [python, *command, *arguments]
    if shell:
        line = ["bash", "-c", shell, "bash", *line]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)


MODULE, EXPERIMENTS, FROM_SCRIPT = ("-m", "conam_zoo"), ("-m", "experiments"), ("-c", SCRIPT)


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (MODULE, "torch"),
        (MODULE, "timm.models"),
        (EXPERIMENTS, "torch"),
        (EXPERIMENTS, "experiments.speed.commands"),
        (MODULE, "conam_zoo.cli.zoo"),
        (FROM_SCRIPT, "torch.nn"),
    ],
)
def test_ctrl_c_during_an_import_is_exit_code_130_alone(
    command: tuple[str, ...], module: str, tmp_path: Path, warm_python: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(IMPORTED.format(module=module))
    python = sys.executable if module.startswith("torch") else warm_python
    done = conam_process("list", command=command, path=tmp_path, python=python)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("seconds", [0.2, 1.5])
def test_ctrl_c_after_a_while_is_exit_code_130_alone(seconds: float, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TIMER.format(seconds=seconds))
    done = conam_process("list", path=tmp_path)
    assert (done.returncode, done.stderr) in [(130, ""), (0, "")]  # 0: it was quicker
    assert done.returncode == 130 or done.stdout.startswith(" model")


def test_other_programs_keep_their_handler(tmp_path: Path, warm_python: str) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").touch()
    lines = "import signal, conam_zoo\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    (tmp_path / "experiments" / "__main__.py").write_text(lines)
    shell = f'cd {shlex.quote(str(tmp_path))} && "$@"'
    done = conam_process(command=EXPERIMENTS, path=tmp_path, shell=shell, python=warm_python)
    assert done.stdout == "True\n"
    code = "import signal, conam_zoo; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = conam_process(command=("-c", code), python=warm_python)
    assert done.stdout == "True\n"
    assert is_our_command(["/usr/local/bin/conam"], [])
    assert is_our_command(["-m"], ["python", "-X", "dev", "-m", "conam_zoo", "list"])
    assert is_our_command(["/x/conam_zoo/__main__.py", "list"], [])
    assert not is_our_command(["-m"], ["python", "-m", "pytest", "conam_zoo"])
    assert not is_our_command(["-c"], ["python", "-c", "import conam_zoo"])
    assert not is_our_command(["conam.py"], ["python", "conam.py"])
    assert not is_our_command(["-m"], ["python", "-m"])
    assert not is_our_command(["train.py"], ["python", "train.py", "-m", "conam_zoo"])
    assert not is_our_command(["/x/torch/__main__.py"], [])
    assert not is_our_command([], [])


@pytest.mark.parametrize(
    ("arguments", "shell", "code", "sentence"),
    [
        (["list"], '"$@" > /dev/full', 2, "No space left on device"),
        (["--help"], '"$@" > /dev/full', 2, "No space left on device"),
        (["list"], '"$@" >&-', 2, "Standard output is closed"),
        (["list", "--json"], 'set -o pipefail; "$@" | head -0', 1, ""),
        (["list"], 'mkdir "$GONE" && cd "$GONE" && rmdir "$GONE" && "$@"', 2, "The working folder cannot be used"),
    ],
    ids=["full", "help to a full disk", "closed", "unread", "deleted folder"],
)
def test_output_that_cannot_be_written_is_told(
    arguments: list[str],
    shell: str,
    code: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warm_python: str,
) -> None:
    monkeypatch.setenv("GONE", str(tmp_path / "gone"))
    told_at_the_start = ">&-" in shell or "GONE" in shell
    done = conam_process(*arguments, shell=shell, python=sys.executable if told_at_the_start else warm_python)
    assert done.returncode == code
    assert sentence in done.stderr
    assert done.stderr.count("\n") == (1 if sentence else 0)


CHATTY = """
import logging, typer, torch
from torch.profiler import profile
from conam_zoo.cli import run_app
app = typer.Typer()
@app.command()
def measure():
    with profile():
        torch.ones(3).sum()
    logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
    logging.getLogger("conam_zoo").warning("of ours")
run_app(app, "measure")
"""


def test_chatter_of_libraries_stays_off_the_terminal(warm_python: str) -> None:
    done = conam_process(command=("-c", CHATTY), python=warm_python)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "conam: of ours\n")

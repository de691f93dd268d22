"""Writing files: whole or not at all, through links and devices, and nobody else's file touched."""

import errno
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from safetensors.torch import save_file

from conam_zoo.errors import UserError
from conam_zoo.files import (
    clear_temporaries,
    make_folder,
    refuse_overwriting,
    refuse_replacing,
    write_atomically,
    write_figure,
    write_text,
)
from conam_zoo.training.run_folder import check_free, hold

DOT_FILES = (".env.template", "sub/.env.override", ".prettier.override.json", "docs/.eslintrc.settings", ".tmpabc123")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of somebody's own."""
    for name in (*DOT_FILES, "src.py"):
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text("mine")
    return tmp_path / "project"


@pytest.mark.slow
def test_only_what_is_ours_is_cleared(project: Path, warm_python: str) -> None:
    killed = "import os; from pathlib import Path; from conam_zoo.files import write_atomically\n"
    killed += f"write_atomically(Path({str(project / 'a.png')!r}), lambda temporary: os._exit(9))"
    assert subprocess.run([warm_python, "-c", killed]).returncode == 9
    (left,) = project.glob(".conam-tmp-*~")
    below = project / "sub" / left.name
    below.mkdir()
    clear_temporaries(project)
    assert not left.exists()
    assert below.exists()
    assert all((project / name).read_text() == "mine" for name in (*DOT_FILES, "src.py"))


def test_a_folder_that_is_no_run_folder_is_refused_and_left_alone(project: Path) -> None:
    before = sorted(project.rglob("*"))
    with pytest.raises(UserError, match="is not empty and no run folder"):
        check_free(project, resume=False)
    with pytest.raises(UserError, match="is not empty"), hold(project, resume=False):
        pass
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize("name", ["report.md", "recipe.toml", "log.csv", "raw/holiday.jpg", "final/thesis.pdf"])
def test_files_of_the_users_that_are_called_like_ours_are_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"it holds '{Path(name).parts[0]}'"):
        check_free(tmp_path, resume=False)


@pytest.mark.parametrize("names", [(), ("tensorboard", "log.csv", ".conam-lock"), (".DS_Store",)])
def test_an_empty_folder_or_a_run_that_came_to_nothing_is_taken(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    check_free(tmp_path, resume=False)


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_a_link(dangling: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "file.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    if not dangling:
        target.write_text("before")
    link.symlink_to(target)
    write_text(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert not target.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt", "there"]


def test_a_named_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join()
    assert got == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.slow
def test_devices_are_written_to(tmp_path: Path, warm_python: str) -> None:
    write_text(Path("/dev/null"), "x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    code = "from pathlib import Path; from conam_zoo.files import write_text; print('one', flush=True)\n"
    code += "write_text(Path('/dev/stdout'), 'two\\n'); print('three')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([warm_python, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"
    piped = subprocess.run([warm_python, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    assert piped.stdout == "one\ntwo\nthree\n"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_the_permissions_of_the_umask_and_old_ones_keep_theirs(
    mask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "new", lambda path: save_file({"x": torch.zeros(1)}, path))
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(0o640)
        write_text(tmp_path / "old", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640


def test_an_umask_that_shuts_everybody_out_is_told(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        with pytest.raises(UserError, match="umask"):
            write_text(tmp_path / "new", "x")
        with pytest.raises(UserError, match="umask"):
            make_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_of_safetensors_gets_the_sentence_of_the_others(tmp_path: Path, warm_python: str) -> None:
    (tmp_path / "model").write_text("before")
    full = "import resource, signal, sys, torch; from pathlib import Path; from safetensors.torch import save_file\n"
    full += "from conam_zoo.files import write_atomically\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    full += "try: write_atomically(Path(sys.argv[1]), lambda path: save_file({'x': torch.zeros(100)}, path))\n"
    full += "except Exception as error: sys.exit(f'{type(error).__name__} {error}')"
    result = subprocess.run([warm_python, "-c", full, tmp_path / "model"], capture_output=True, text=True)
    assert result.stderr.startswith(f"UserError {tmp_path / 'model'} cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_text() == "before"


@pytest.mark.parametrize("name", ["x" * 300, "loop", "file/below", "folder"])
def test_a_place_that_cannot_be_written_gets_a_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / name, "x")


def test_texts_of_figures_are_not_tex_whatever_the_user_s_settings_say(tmp_path: Path) -> None:
    with rc_context({"text.usetex": True}):
        axes = Figure().subplots()
        axes.set_title(r"\input{secret} & 100 %")
        write_figure(tmp_path / "figure.png", axes.figure)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_of_the_writer_is_its_own(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left on device"):
        write_atomically(tmp_path / "file", full)
    with pytest.raises(KeyError):
        write_atomically(tmp_path / "file", lambda path: {}["x"])
    assert list(tmp_path.iterdir()) == []


def test_homes_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text(Path("~/x"), "text")
    assert (tmp_path / "x").read_text() == "text"
    assert make_folder(Path("~/runs")) == tmp_path / "runs"
    with pytest.raises(UserError, match="a home folder that does not exist"):
        write_text(Path("~nobody-of-that-name/x"), "text")


def test_an_input_or_a_text_below_home_is_not_written_onto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("text")
    for output, source in (
        (Path("~/notes.txt"), tmp_path / "notes.txt"),
        (tmp_path / "notes.txt", Path("~/notes.txt")),
    ):
        with pytest.raises(UserError, match="it is the input"):
            refuse_overwriting([output], [source])
    with pytest.raises(UserError, match="is not JSON"):
        refuse_replacing(Path("~/notes.txt"))


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm")
def test_a_file_in_shared_memory_is_replaced_like_any_other() -> None:
    path = Path(f"/dev/shm/conam-test-{os.getpid()}")
    try:
        for text in ("one", "two"):
            write_text(path, text)
            assert path.read_text() == text
    finally:
        path.unlink(missing_ok=True)

"""What all tests share: the real images where they are given, and small synthetic ones everywhere.

Where ``CONAM_DATA`` names a folder with ``cifar10/`` and ``cifar100/`` in one of the layouts of ``conam_zoo.data``, the
tests on real images run, and a skip of any test is a failure; for tests that need a browser, ``CONAM_BROWSER=1`` says
so. Where pytest shares the tests out over processes, each process computes with one thread: two with all threads each
would wait for one another.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from warm_python import start as warm_python_in

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported, and for what the tests start

CHECKOUT = Path(__file__).resolve().parents[1]
PLAIN_RECIPE = str(CHECKOUT / "tests" / "plain_recipe.toml")  # what tests train by, whatever the shipped recipes become
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # of a page in Markdown


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    excused = hasattr(report, "wasxfail") or item.get_closest_marker("browser")
    if report.skipped and not excused and os.environ.get("CONAM_DATA"):
        report.outcome = "failed"
        report.longrepr = f"skipped although CONAM_DATA is set: {item.nodeid}: {report.longrepr}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin each process's share with slow tests, file by file, so that none of them is left alone at the end.

    Those that fork come first of all: after some backward passes of other tests, autograd refuses to work in a fork.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow: dict[Path, list[pytest.Item]] = {}
    quick = []
    for item in items:
        (slow.setdefault(item.path, []) if item.get_closest_marker("slow") else quick).append(item)
    shares: list[list[pytest.Item]] = [[] for _ in range(processes)]
    for file in sorted(slow.values(), key=lambda tests: not tests[0].get_closest_marker("forks")):
        min(shares, key=len).extend(file)
    size = -(-len(items) // processes)
    for share in shares:
        missing = max(0, size - len(share))
        share.extend(quick[:missing])
        del quick[:missing]
    items[:] = [item for share in shares for item in share]


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The top folder of the checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """The folder that holds ``cifar10/``."""
    root = os.environ.get("CONAM_DATA")
    if not root:
        pytest.skip("CONAM_DATA is not set: it names a folder that holds cifar10/ as arrays or image folders")
    assert (Path(root) / "cifar10").is_dir(), f"CONAM_DATA={root} holds no cifar10/"
    return Path(root)


def write_arrays(root: Path, classes: tuple[str, ...], sizes: dict[str, int], seed: int = 0) -> Path:
    """Write a learnable data set as arrays: each class has a colour of its own, under noise."""
    generator = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    colours = np.linspace(0, 255, len(classes))[:, None] * np.array([1.0, 0.5, 0.0]) + np.array([0.0, 60.0, 120.0])
    for split, count in sizes.items():
        labels = np.arange(count) % len(classes)
        noise = generator.normal(0, 25, (count, 32, 32, 3))
        images = (colours[labels][:, None, None, :] + noise).clip(0, 255).astype(np.uint8)
        np.save(root / f"{split}_images.npy", images)
        np.save(root / f"{split}_labels.npy", labels.astype(np.uint8))
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """160 training and 60 test pictures with the classes of CIFAR-10, as arrays, below ``data/cifar10``."""
    from conam_zoo.datasets import DATASETS

    write_arrays(tmp_path / "data" / "cifar10", DATASETS["cifar10"].classes, {"train": 160, "test": 60})
    return tmp_path / "data"


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings leave ``curves.png`` out, which takes as long as an epoch on a few small images."""
    monkeypatch.setattr("conam_zoo.training.run_folder.draw_curves", lambda *args, **kwargs: None)


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Python that has PyTorch imported already: for programs that need a process, but no start of one."""
    with warm_python_in(tmp_path_factory.mktemp("warm")) as program:
        yield program


Command = Callable[..., tuple[int, str, str]]


def run_command(
    main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """A function that runs a command in this process; gives (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["conam", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture
def conam(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run ``conam``."""
    from conam_zoo import cli

    return run_command(cli.main, monkeypatch, capfd)


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run ``python -m experiments``."""
    from experiments import __main__ as command

    return run_command(command.main, monkeypatch, capfd)


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Have something done in the middle of the n-th step of this process."""
    from conam_zoo.training.train_state import TrainState

    def arrange(steps: int, happens: Callable[[], object]) -> None:
        accumulate, calls = TrainState.accumulate, []

        def counted(self, *args):
            calls.append(1)
            if len(calls) == steps:
                happens()
            return accumulate(self, *args)

        monkeypatch.setattr(TrainState, "accumulate", counted)

    return arrange

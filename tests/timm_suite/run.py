"""Run timm's own model tests on the models of this package: ``python tests/timm_suite/run.py``.

The tests are those of the installed timm version, taken from its source distribution on the package index and kept in
``.timm-tests/``; ``CONAM_TIMM_TESTS`` names a folder that already holds them instead. Exits with 1 if a test fails or
if fewer tests ran than there are models for, with 2 if the tests cannot be had. Takes some minutes on two cores.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import plugin
import timm

CACHE = Path(__file__).resolve().parents[2] / ".timm-tests"
OVERRIDE = "CONAM_TIMM_TESTS"
TEST_FILE = "test_models.py"


class NoTestsError(Exception):
    """timm's tests cannot be had; the message is one sentence."""


def find_tests() -> Path:
    """The folder with timm's tests; downloads them if need be.

    Raises:
        NoTestsError: They can neither be found nor downloaded.
    """
    named = os.environ.get(OVERRIDE)
    if named:
        folder = Path(named).resolve()
        if not (folder / TEST_FILE).is_file():
            raise NoTestsError(f"{OVERRIDE} is {named}, but there is no {TEST_FILE} in that folder.")
        return folder
    folder = CACHE / f"timm-{timm.__version__}" / "tests"
    if not (folder / TEST_FILE).is_file():
        unpack_tests(download(timm.__version__), folder)
    return folder


def download(version: str) -> Path:
    """Download timm's source distribution into the cache folder.

    Raises:
        NoTestsError: It did not come.
    """
    CACHE.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    result = subprocess.run(
        [*command, f"timm=={version}", "--dest", str(CACHE)], capture_output=True, text=True, check=False
    )
    archive = CACHE / f"timm-{version}.tar.gz"
    if result.returncode != 0 or not archive.is_file():
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise NoTestsError(
            f"The source distribution of timm {version}, which holds its tests, could not be downloaded ({reason}): "
            f"connect to the package index, or set {OVERRIDE} to an unpacked copy of its tests folder."
        )
    return archive


def unpack_tests(archive: Path, folder: Path) -> None:
    """Unpack the archive's tests, and nothing else, to the given folder.

    Raises:
        NoTestsError: The archive has no model tests.
    """
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch, tarfile.open(archive) as tar:
        top = archive.name.removesuffix(".tar.gz")
        members = [member for member in tar.getmembers() if member.name.startswith(f"{top}/tests/")]
        tar.extractall(scratch, members, filter="data")
        unpacked = Path(scratch) / top / "tests"
        if not (unpacked / TEST_FILE).is_file():
            raise NoTestsError(f"{archive} has no tests/{TEST_FILE}: this version of timm ships its tests elsewhere.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unpacked.rename(folder)


def run_pytest(tests: Path, report: Path) -> int:
    """Run the selected tests in a process of their own; returns pytest's exit code.

    They see timm's defaults alone: none of this project's pytest options, and not the variable by which timm knows its
    own CI, where it leaves tests out.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("GITHUB_ACTIONS", "PYTEST_ADDOPTS")}
    paths = [str(Path(__file__).resolve().parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment.setdefault("OMP_NUM_THREADS", "1")
    parallel = ["-n", "2"] if importlib.util.find_spec("xdist") else []
    configuration = ["-c", os.devnull, "--rootdir", str(tests), "-p", "plugin", "-p", "no:cacheprovider"]
    options = [*configuration, "-q", "--tb=short", "--disable-warnings"]
    command = [sys.executable, "-m", "pytest", *options, *parallel, f"--junitxml={report}", str(tests / TEST_FILE)]
    return subprocess.run(command, cwd=tests, env=environment, check=False).returncode


def count_passed(report: Path) -> Counter[tuple[str, str]]:
    """How often each pair of test function and model passed, from pytest's report."""
    passed: Counter[tuple[str, str]] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        parts = re.fullmatch(r"(\w+)\[(?:\d+-)?(.+)\]", case.get("name", ""))
        if parts and not any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped")):
            passed[parts[1], parts[2]] += 1
    return passed


def main() -> int:
    """Run, count and tell; returns the exit code."""
    try:
        tests = find_tests()
    except NoTestsError as error:
        print(error, file=sys.stderr)
        return 2
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        code = run_pytest(tests, report)
        passed = count_passed(report) if report.is_file() else Counter()

    told, missing = [], []
    for kind, functions in plugin.selection().items():
        wanted = [(function, model) for function, models in functions.items() for model in models]
        missing += [pair for pair in wanted if pair not in passed]
        told.append(f"{kind} {sum(pair in passed for pair in wanted)}/{len(wanted)}")
    for function, model in missing:
        print(f"did not pass: {function} on {model}", file=sys.stderr)
    print(
        f"timm {timm.__version__}'s model tests, passed/expected: {', '.join(told)} ({time.monotonic() - start:.0f} s)"
    )
    return 1 if missing or code else 0


if __name__ == "__main__":
    sys.exit(main())

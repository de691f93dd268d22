"""A user's machine: an installed copy of the package, a home with a Hub cache, and a process that does tasks there.

huggingface_hub reads its ``HF_…`` variables when it is imported, so one process stands for one environment; it lives on
between tasks because it takes seconds to start. Where a task wants several processes, they are forked from it.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conftest import CHECKOUT

from conam_zoo.weights import Manifest, dump_manifest

# Reads tasks from standard input, one line of JSON each, and answers each with one line of JSON.
PROGRAM = """
import ctypes, json, logging, os, signal, sys, time
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer
logging.basicConfig(stream=sys.stderr, level=logging.DEBUG, format="%(levelname)s %(name)s %(message)s")


def read_only_for_root():
    # A root user is above permissions by two capabilities, which are laid down here for good.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    for index in (0, 1):
        data[index] &= ~0b110
    assert libc.capset(header, data) == 0


def full_disk():
    # The client's temporary file becomes the device that is always full, so it is the kernel that says so.
    real = Path.open

    def on_full_device(path, mode="r", *rest, **options):
        if path.suffix == ".incomplete":
            path.symlink_to("/dev/full")
        return real(path, mode, *rest, **options)

    Path.open = on_full_device


def find(task):
    from conam_zoo.weights import find_verified, load_manifest, resolve
    resolve.LOCK_TIMEOUT_S = task.get("lock_timeout_s", resolve.LOCK_TIMEOUT_S)
    manifest = load_manifest(Path(task["manifest"]))
    found = find_verified(
        manifest.entry(task["name"]), cache_dir=task.get("cache_dir"), namespace=manifest.hub_namespace
    )
    sums = {key: float(value.double().sum()) for key, value in found.state_dict.items()}
    return {"source": found.source, "path": str(found.path), "sums": sums}


def check(task):
    from conam_zoo.weights import check_copies, load_manifest
    manifest = load_manifest(Path(task["manifest"]))
    copies = check_copies(
        manifest.entry(task["name"]), cache_dir=task["cache_dir"], namespace=manifest.hub_namespace
    )
    return {"copies": {copy.place: copy.status for copy in copies}}


def folder(task):
    from conam_zoo.weights.folder import read_hub_folder
    state = read_hub_folder(task["hub_id"], task.get("cache_dir"))
    return {"sums": {key: float(value.double().sum()) for key, value in state.items()}}


def get_ready(task):
    for module in task["imports"]:
        __import__(module)
    return {}


def create(task):
    import conam_zoo, timm
    model = timm.create_model(task["name"], pretrained=True, **task.get("options", {}))
    sums = {key: float(value.double().sum()) for key, value in model.state_dict().items()}
    return {"sums": sums, "imported": conam_zoo.__file__}


def open_model(task):
    from conam_zoo.models.registry import open_model as run
    return {"architecture": run(task["name"], cache_dir=task["cache_dir"]).pretrained_cfg["architecture"]}


def mirror(task):
    from conam_zoo.weights import load_manifest
    from conam_zoo.weights.resolve import fill_mirror
    manifest = load_manifest()
    path, written = fill_mirror(manifest.entry(task["name"]), Path(task["folder"]), namespace=manifest.hub_namespace)
    return {"path": str(path), "written": written}


def torch_hub(task):
    import torch
    model = torch.hub.load(task["repository"], task["name"], source="local", pretrained=True, tag=task["tag"])
    import conam_zoo
    sums = {key: float(value.double().sum()) for key, value in model.state_dict().items()}
    return {"sums": sums, "imported": conam_zoo.__file__}


def onnx_files(made):
    import hashlib
    from conam_zoo.weights import OnnxFile
    contents = {path: (top1, text.encode()) for path, (top1, text) in made.items()}
    return {
        path: (OnnxFile(hashlib.sha256(content).hexdigest(), len(content), top1), content)
        for path, (top1, content) in contents.items()
    }


def publish(task):
    from conam_zoo.release.publish import publish as run
    options = task["options"]
    options["manifest_path"] = Path(options["manifest_path"])
    cards = options.pop("cards")
    options["card"] = lambda entry: cards[entry.name] + "".join(
        f"{file.top1_percent} % in {path}\\n" for path, file in (entry.onnx or {}).items()
    )
    if isinstance(made := options.setdefault("onnx", "none"), dict):
        options["onnx"] = lambda entry, folder: onnx_files(made)
    return {"done": [[p.name, p.hub_id, p.tag, dict(p.files), p.revision, p.changed] for p in run(**options)]}


def validate_card(task):
    from huggingface_hub import ModelCard
    ModelCard(task["card"]).validate()
    return {}


def forked(task):
    # The same task in several processes at once; with "kill_after_s", one that does not live to tell, so many seconds
    # after its download has begun.
    ends, cache = [], task["task"].get("cache_dir")
    incomplete = lambda: set(Path(cache).rglob("*.incomplete")) if cache else set()
    before = incomplete()
    for _ in range(task["processes"]):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            sys.path[:0] = [task["site"]] if "site" in task else []
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(answer_to(task["task"])))
            os._exit(0)
        os.close(writer)
        ends.append((child, reader))
    if "kill_after_s" in task:
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not incomplete() - before and os.waitid(os.P_PID, ends[0][0], ended) is None:
            time.sleep(0.005)
        time.sleep(task["kill_after_s"])
        os.kill(ends[0][0], signal.SIGKILL)
    told = []
    for child, reader in ends:
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        told.append(json.loads(text) if text else {"signal": os.WTERMSIG(status)})
    return {"told": told}


def answer_to(task):
    before = dict(os.environ)
    os.environ.update(task.get("environment", {}))
    start = time.monotonic()
    try:
        for hardship in task.get("hardships", []):
            {"read-only": read_only_for_root, "full disk": full_disk}[hardship]()
        answer = globals()[task["action"]](task)
    except Exception as error:
        import traceback
        answer = {
            "error": type(error).__name__,
            "kinds": [kind.__name__ for kind in type(error).__mro__],
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
    answer["seconds"] = time.monotonic() - start
    os.environ.clear()
    os.environ.update(before)
    return answer


for line in sys.stdin:
    task = json.loads(line)
    answers.write(json.dumps(answer_to(task)) + "\\n")
    answers.flush()
"""


class HubClient:
    """A process on a user's machine.

    Args:
        python: The Python that it runs in.
        home: A folder of its own.
        endpoint: Where its Hub is.
        site: The folder that the package is installed in; a copy of ``conam_zoo.weights`` alone if None.
        environment: Further variables.
    """

    def __init__(
        self,
        python: str,
        home: Path,
        endpoint: str,
        site: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.home = home
        self.site = site or install_weights_only(home / "site")
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "CONAM_", "PYTHON")) and not key.lower().endswith("_proxy")
        }
        given = {
            "PYTHONPATH": str(self.site),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # the server has no Xet storage
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }
        self.log_path = home / "client.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=home,
                env=kept | given | dict(environment or {}),
            )

    def do(self, action: str, patience_s: float = 120, **task: Any) -> dict[str, Any]:
        """The answer to a task; ``log`` is what was printed and logged meanwhile."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        before = self.log_path.stat().st_size
        stop = threading.Timer(patience_s, self.process.kill)
        stop.start()
        try:
            self.process.stdin.write(json.dumps({"action": action} | task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            stop.cancel()
        with self.log_path.open(encoding="utf-8", errors="replace") as file:
            file.seek(before)
            log = file.read()
        assert line, f"no answer to {action}: {log[-2000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer | {"log": log}

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


def install_weights_only(site: Path) -> Path:
    """Install ``conam_zoo.weights`` and what publishes them, which need little else of the package."""
    source = CHECKOUT / "conam_zoo" / "weights"
    shutil.copytree(source, site / "conam_zoo" / "weights", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "conam_zoo" / "release").mkdir()
    for file in ("checks.py", "errors.py", "release/exchange.py", "release/publish.py"):
        shutil.copy(CHECKOUT / "conam_zoo" / file, site / "conam_zoo" / file)
    for package in ("", "release"):
        (site / "conam_zoo" / package / "__init__.py").touch()
    return site


def assert_one_sentence(text: str) -> None:
    """Fails on anything but a single sentence on a single line."""
    assert re.fullmatch(r"[^\n]*\.", text), text
    assert not re.search(r"[.!?]\s+[A-Z]", text), text


def install_package(site: Path, manifest: Manifest) -> Path:
    """Install the whole package as the wheel lays it out, with a manifest of one's own."""
    shutil.copytree(CHECKOUT / "conam_zoo", site / "conam_zoo", ignore=shutil.ignore_patterns("__pycache__"))
    dump_manifest(manifest, site / "conam_zoo" / "weights_manifest.json")
    return site

"""A Hugging Face Hub of one's own on the loopback interface, as far as downloading and publishing files needs one.

It speaks ``HEAD`` and ``GET /{repository}/resolve/{revision}/{file}`` with the headers that huggingface_hub
reads, and of the API what creating a repository, committing to it and tagging it take. ``mode`` may be changed
while it runs; ``requests`` lists what was asked, ``with_token`` the paths that came with a token.
"""

import base64
import gzip
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import yaml

Mode = Literal[
    "ok",
    "corrupt-always",
    "corrupt-once",
    "other-etag",
    "no-etag",
    "no-repository",
    "no-revision",
    "no-file",
    "gated",
    "expired-token",
    "503",
    "503-on-get",
    "500",
    "500-once",
    "500-once-on-get",
    "silent",
    "stalled",
    "cut",
    "cut-once",
    "short",
    "slow",
    "endless",
    "gzip",
    "drip",
]

ERRORS: dict[str, tuple[int, dict[str, str]]] = {
    "no-repository": (404, {"X-Error-Code": "RepoNotFound"}),
    "no-revision": (404, {"X-Error-Code": "RevisionNotFound"}),
    "no-file": (404, {"X-Error-Code": "EntryNotFound"}),
    "gated": (403, {"X-Error-Code": "GatedRepo"}),
    "expired-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "503": (503, {}),
    "500": (500, {}),
}

SLOW_S = 0.6  # how long a body takes in the mode of that name


@dataclass
class Repository:
    """A repository that was created here: its commits, oldest first, each a whole tree, and its tags."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a branch, tag or hash names."""
        wanted = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == wanted), None)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of clients that went away in the middle of an answer, as killed ones do."""


class HubServer:
    """Serves ``files``, which maps ``(repository, revision, file)`` to content, and what is published to it.

    Modes: ``corrupt-…`` change a byte of the body but neither its size nor its ETag; ``other-etag`` announces
    another SHA-256; those in ``ERRORS``, and the ``50…``s, answer with an error; ``silent`` accepts a connection
    and never answers, ``stalled`` stops in the middle of a body; ``cut`` closes the connection there; ``short``
    sends less than ``HEAD`` had announced; ``slow`` takes ``SLOW_S`` seconds over it; ``endless`` goes on after it,
    ``gzip`` packs it, and ``drip`` sends a byte now and then.

    Of its attributes, ``tokens`` may write, and read what is ``private``; ``elsewhere`` answers for a large file
    with a redirection to another host, as the Hub does to its storage; ``fails_at`` is a part of the path of
    requests that are answered with status 400; ``spoils_uploads`` keeps another large file than was sent; ``lies`` are
    headers that replace the right ones in answers about a file, None for none.
    """

    def __init__(self, files: dict[tuple[str, str, str], bytes], mode: Mode = "ok") -> None:
        self.files = files
        self.mode: Mode = mode
        self.requests: list[str] = []
        self.with_token: list[str] = []
        self.tokens: set[str] = set()
        self.private: set[str] = set()
        self.elsewhere = False
        self.repositories: dict[str, Repository] = {}
        self.fails_at = ""
        self.spoils_uploads = False
        self.sent = 0  # bytes of bodies without a length
        self.lies: dict[str, str | None] = {}
        self._large: dict[str, bytes] = {}
        self._spent: set[str] = set()
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self.http = _Server(("127.0.0.1", 0), _handler_for(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def set_mode(self, mode: Mode) -> None:
        """Change the mode; what happens once will happen once more."""
        self.mode = mode
        self._spent.clear()

    def once(self, mode: Mode) -> bool:
        """Whether the server is in a mode of that name, which passes with this question."""
        with self._lock:
            hit = self.mode == mode and mode not in self._spent
            if hit:
                self._spent.add(mode)
            return hit

    def body(self, content: bytes) -> bytes:
        """What a ``GET`` of ``content`` delivers in the present mode."""
        corrupt = self.mode == "corrupt-always" or self.once("corrupt-once")
        return content[:-1] + bytes([content[-1] ^ 1]) if corrupt else content

    def find(self, repository: str, revision: str, file: str) -> tuple[str, bytes] | None:
        """The commit and the content that a path names."""
        if repository in self.repositories:
            found = self.repositories[repository].tree(revision)
            return (found[0], found[1][file]) if found and file in found[1] else None
        for (own, branch, name), content in self.files.items():
            if (own, name) == (repository, file) and revision in (branch, commit_of(branch)):
                return commit_of(branch), content
        return None

    def count(self, method: str) -> int:
        """How many requests of a method there were for files."""
        return sum(request.startswith(f"{method} ") and "/resolve/" in request for request in self.requests)


@contextmanager
def serve(files: dict[tuple[str, str, str], bytes], mode: Mode = "ok") -> Iterator[HubServer]:
    """A ``HubServer`` that runs for the length of a ``with`` block."""
    server = HubServer(files, mode)
    threading.Thread(target=server.http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.http.shutdown()
        server.http.server_close()


def commit_of(revision: str) -> str:
    """The commit that a branch of ``files`` is at; a commit is its own."""
    return revision if re.fullmatch("[0-9a-f]{40}", revision) else _hash(revision)


def is_large(file: str) -> bool:
    """Whether the Hub keeps a file outside git; its ETag is a SHA-256 then, and a git hash otherwise."""
    return file.endswith((".safetensors", ".png", ".onnx"))


def etag_of(file: str, content: bytes) -> str:
    if is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler_for(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if "Authorization" in self.headers:
                hub.with_token.append(self.path)
            path = unquote(urlsplit(self.path).path)
            if hub.mode == "silent":
                hub.closing.wait(60)
            elif hub.fails_at and hub.fails_at in path:
                self.headers_only(400, {})
            elif "/resolve/" in path:
                self.resolve(path)
            elif path.startswith("/storage/"):
                self.storage(path.removeprefix("/storage/"))
            else:
                self.api(path)

        @property
        def known(self) -> bool:
            return self.headers.get("Authorization", "").removeprefix("Bearer ") in hub.tokens

        # --- files ---

        def resolve(self, path: str) -> None:
            repository, _, rest = path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            found = hub.find(repository, revision, file)
            own = hub.repositories.get(repository)
            hidden = (repository in hub.private or (own is not None and own.private)) and not self.known
            if hub.once("500-once") or (self.command == "GET" and hub.once("500-once-on-get")):
                self.headers_only(500, {})
            elif hub.mode == "503-on-get" and self.command == "GET":
                self.headers_only(503, {})
            elif hub.mode in ERRORS:
                self.headers_only(*ERRORS[hub.mode])
            elif hidden:
                self.headers_only(401, {"X-Error-Code": "RepoNotFound"})
            elif found is None:
                known = own is not None or any(key[0] == repository for key in hub.files)
                self.headers_only(404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
            else:
                self.send_file(file, *found)

        def send_file(self, file: str, revision: str, content: bytes) -> None:
            etag = etag_of(file, content + (b"?" if hub.mode == "other-etag" else b""))
            headers = {"X-Repo-Commit": revision, "Content-Type": "application/octet-stream"}
            if hub.elsewhere and is_large(file):
                hub._large[etag] = content
                headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
                self.headers_only(
                    302, headers | {"Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/storage/{etag}"}
                )
                return
            if hub.mode != "no-etag":
                headers["ETag"] = f'"{etag}"'
            self.send_body(headers, content)

        def send_body(self, headers: dict[str, str], content: bytes) -> None:
            headers |= {name: value for name, value in hub.lies.items() if value is not None}
            headers = {name: value for name, value in headers.items() if hub.lies.get(name, "") is not None}
            if self.command == "GET" and hub.mode == "short":
                content = content[:-7]
            if self.command == "GET" and hub.mode in ("endless", "gzip", "drip"):
                self.unbounded(headers, content)
                return
            self.headers_only(200, headers, len(content))
            if self.command != "GET":
                return
            body = hub.body(content)
            if hub.mode == "cut" or hub.once("cut-once"):
                self.wfile.write(body[: len(body) // 2])
            elif hub.mode == "stalled":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                hub.closing.wait(60)
            elif hub.mode == "slow":
                for start in range(0, len(body), len(body) // 20 + 1):
                    self.wfile.write(body[start : start + len(body) // 20 + 1])
                    self.wfile.flush()
                    time.sleep(SLOW_S / 20)
            else:
                self.wfile.write(body)

        def unbounded(self, headers: dict[str, str], content: bytes) -> None:
            """A body in chunks, without a length."""
            packed = {"Content-Encoding": "gzip"} if hub.mode == "gzip" else {}
            self.protocol_version = "HTTP/1.1"
            self.close_connection = True
            self.send_response(200)
            for name, value in (headers | packed | {"Transfer-Encoding": "chunked", "Connection": "close"}).items():
                self.send_header(name, value)
            self.end_headers()
            chunk = content if hub.mode == "endless" else b"\0"
            if hub.mode == "gzip":
                chunk = gzip.compress(content + bytes(100 << 20))
            while not hub.closing.is_set():
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.wfile.flush()
                hub.sent += len(chunk)
                if hub.mode == "gzip":
                    self.wfile.write(b"0\r\n\r\n")
                    return
                if hub.mode == "drip":
                    hub.closing.wait(0.5)
                chunk = bytes(1 << 16) if hub.mode == "endless" else chunk

        def storage(self, etag: str) -> None:
            if self.command == "PUT":
                content = self.received()
                hub._large[etag] = content[:-1] + b"!" if hub.spoils_uploads else content
                self.headers_only(200, {})
            else:
                headers = {"ETag": f'"{etag}"', "Content-Disposition": 'inline; filename="model.safetensors";'}
                self.send_body(headers, hub._large[etag])

        # --- the API ---

        def api(self, path: str) -> None:
            if path == "/api/validate-yaml":
                self.validate_card(json.loads(self.received()))
                return
            writing = self.command != "GET"
            if hub.mode == "expired-token":
                self.headers_only(*ERRORS[hub.mode])
            elif writing and not self.known:
                self.send_json({"error": "Forbidden"}, 403)
            elif path == "/api/repos/create":
                self.create(json.loads(self.received()))
            elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                self.large_files(json.loads(self.received()))
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path):
                repository = hub.repositories.get(match[1])
                if repository is None or (repository.private and not self.known):
                    self.headers_only(404, {"X-Error-Code": "RepoNotFound"})
                else:
                    self.of_repository(match[1], repository, match[2], match[3])
            else:
                self.headers_only(404, {})

        def validate_card(self, asked: dict[str, Any]) -> None:
            """What the Hub checks of a model card's metadata, as far as it can be known from outside."""
            match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
            data = yaml.safe_load(match[1]) if match else None
            errors = []
            if not isinstance(data, dict):
                errors.append("no metadata")
            else:
                if not isinstance(data.get("license"), str) or data["license"] != data["license"].lower():
                    errors.append('"license" must be one of the known identifiers')
                errors += [
                    f'"{key}" must be a list of strings'
                    for key in ("tags", "datasets", "metrics")
                    if key in data and not (isinstance(data[key], list) and all(isinstance(i, str) for i in data[key]))
                ]
                if "model-index" in data:
                    for model in data["model-index"]:
                        if not model.get("name") or not all(
                            {"type"} <= set(result["task"]) and {"type", "name"} <= set(result["dataset"])
                            for result in model["results"]
                        ):
                            errors.append('"model-index" is not complete')
            reply = {"errors": [{"message": text} for text in errors], "warnings": []}
            self.send_json(reply, 400 if errors else 200)

        def create(self, asked: dict[str, Any]) -> None:
            hub_id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            status = 409 if hub_id in hub.repositories else 200
            if status == 200:
                repository = hub.repositories[hub_id] = Repository(
                    bool(asked.get("private") or asked.get("visibility") == "private")
                )
                repository.commits.append((_hash(hub_id), {".gitattributes": b""}))
            self.send_json({"url": f"{hub.url}/{hub_id}"}, status)

        def large_files(self, asked: dict[str, Any]) -> None:
            answers = [
                {
                    "oid": item["oid"],
                    "size": item["size"],
                    "actions": {"upload": {"href": f"{hub.url}/storage/{item['oid']}", "header": {}}},
                }
                for item in asked["objects"]
            ]
            self.send_json({"transfer": "basic", "objects": answers})

        def of_repository(self, hub_id: str, repository: Repository, what: str | None, rest: str | None) -> None:
            head, tree = repository.commits[-1]
            if what == "refs":
                self.send_json(
                    {
                        "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": head}],
                        "converts": [],
                        "tags": [
                            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
                            for name, commit in repository.tags.items()
                        ],
                    }
                )
            elif what == "preupload":
                self.send_json(
                    {
                        "files": [
                            {
                                "path": file["path"],
                                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                                "shouldIgnore": False,
                                "oid": etag_of(file["path"], tree[file["path"]]) if file["path"] in tree else None,
                            }
                            for file in json.loads(self.received())["files"]
                        ]
                    }
                )
            elif what == "commit":
                self.commit(hub_id, repository, [json.loads(line) for line in self.received().splitlines()])
            elif what == "tag":
                tag = json.loads(self.received())["tag"]
                found = repository.tree(rest or "main")
                if tag in repository.tags or found is None:
                    self.send_json({"error": "no"}, 409 if found else 404)
                else:
                    repository.tags[tag] = found[0]
                    self.send_json({})
            else:
                found = repository.tree(rest or "main")
                if found is None:
                    self.headers_only(404, {"X-Error-Code": "RevisionNotFound"})
                else:
                    self.send_json(
                        {
                            "_id": "0",
                            "id": hub_id,
                            "sha": found[0],
                            "private": repository.private,
                            "siblings": [{"rfilename": name} for name in found[1]],
                        }
                    )

        def commit(self, hub_id: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
            head, tree = repository.commits[-1]
            tree = dict(tree)
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    if value.get("parentCommit") not in (None, head):
                        self.send_json({"error": "the branch has moved on"}, 412)
                        return
                elif line["key"] == "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    tree[value["path"]] = hub._large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del tree[value["path"]]
            commit = _hash(f"{head} {sorted(tree)} {len(repository.commits)}")
            repository.commits.append((commit, tree))
            self.send_json(
                {
                    "success": True,
                    "commitOid": commit,
                    "commitUrl": f"{hub.url}/{hub_id}/commit/{commit}",
                    "hookOutput": "",
                }
            )

        # --- plumbing ---

        def received(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def send_json(self, document: object, status: int = 200) -> None:
            content = json.dumps(document).encode()
            self.headers_only(status, {"Content-Type": "application/json"}, len(content))
            self.wfile.write(content)

        def headers_only(self, status: int, headers: dict[str, str], length: int = 0) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test output free of an access log."""

    return Handler


def _hash(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


_BOUND: list[socket.socket] = []


def refusing_url() -> str:
    """The address of a server that is not there: connections to it are refused at once."""
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))  # and not listening; held, so that nobody else gets the port
    _BOUND.append(probe)
    return f"http://127.0.0.1:{probe.getsockname()[1]}"

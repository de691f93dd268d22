"""A Hugging Face Hub of one's own on the loopback interface, as far as downloading a file needs one.

It speaks `HEAD` and `GET /{repository}/resolve/{revision}/{file}` with the headers that huggingface_hub
reads. `mode` may be changed while it runs; `requests` lists what was asked.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

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
    "503",
    "503-on-get",
    "silent",
]

ERRORS: dict[str, tuple[int, str]] = {
    "no-repository": (404, "RepoNotFound"),
    "no-revision": (404, "RevisionNotFound"),
    "no-file": (404, "EntryNotFound"),
    "gated": (403, "GatedRepo"),
}


class HubServer:
    """Serves `files`, which maps `(repository, revision, file)` to content.

    Modes: `corrupt-…` change a byte of the body but neither its size nor its ETag; `other-etag` announces
    another SHA-256; those in `ERRORS`, and the `503`s, answer with an error; `silent` accepts a connection
    and never answers.
    """

    def __init__(self, files: dict[tuple[str, str, str], bytes], mode: Mode = "ok") -> None:
        self.files = files
        self.mode: Mode = mode
        self.requests: list[str] = []
        self._corrupted = False
        self._lock = threading.Lock()
        self.closing = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def body(self, content: bytes) -> bytes:
        """What a `GET` of `content` delivers in the present mode."""
        with self._lock:
            corrupt = self.mode == "corrupt-always" or (self.mode == "corrupt-once" and not self._corrupted)
            self._corrupted = self._corrupted or corrupt
        return content[:-1] + bytes([content[-1] ^ 1]) if corrupt else content


@contextmanager
def serve(files: dict[tuple[str, str, str], bytes], mode: Mode = "ok") -> Iterator[HubServer]:
    """A `HubServer` that runs for the length of a `with` block."""
    server = HubServer(files, mode)
    threading.Thread(target=server.http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.http.shutdown()
        server.http.server_close()


def _handler_for(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if hub.mode == "silent":
                hub.closing.wait(60)
                return
            repository, _, rest = self.path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            content = hub.files.get((repository, revision, file))
            if hub.mode == "503" or (hub.mode == "503-on-get" and self.command == "GET"):
                self.headers_only(503, {})
            elif hub.mode in ERRORS or content is None:
                status, code = ERRORS.get(hub.mode, (404, "RepoNotFound"))
                self.headers_only(status, {"X-Error-Code": code})
            else:
                self.send_file(revision, content)

        def send_file(self, revision: str, content: bytes) -> None:
            etag = hashlib.sha256(content + (b"?" if hub.mode == "other-etag" else b"")).hexdigest()
            headers = {"X-Repo-Commit": revision, "Content-Type": "application/octet-stream"}
            if hub.mode != "no-etag":
                headers["ETag"] = f'"{etag}"'
            self.headers_only(200, headers, len(content))
            if self.command == "GET":
                self.wfile.write(hub.body(content))

        def headers_only(self, status: int, headers: dict[str, str], length: int = 0) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test output free of an access log."""

    return Handler


def refusing_url() -> str:
    """The address of a server that is not there: connections to it are refused at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"

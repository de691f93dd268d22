"""An interpreter for tests that has PyTorch, torchvision and matplotlib imported already, which takes seconds.

``start`` gives a program that is called like Python: ``-c CODE``, ``-m MODULE`` or a file, after ``-I`` if need be. It
hands its arguments, environment, working folder and standard streams to a server, which forks a process for it, and
ends as that process does; signals are passed on. What depends on how Python itself starts is tested with
``sys.executable``.
"""

import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LENGTH = struct.Struct("!I")
ENDED = struct.Struct("!i")

CLIENT = """#!{python} -SE
import json, os, signal, socket, struct, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: connection.send(bytes([number])))
task = json.dumps([sys.argv, dict(os.environ)]).encode()
socket.send_fds(connection, [struct.pack("!I", len(task))], [0, 1, 2, os.open(".", os.O_RDONLY)])
connection.sendall(task)
ended = connection.recv(4, socket.MSG_WAITALL)
code = struct.unpack("!i", ended)[0] if ended else 1
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def start(folder: Path) -> Iterator[str]:
    """A server with its files in a folder; gives the path of the program, or Python's own where there is no Linux."""
    if not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    address, program = folder / "warm", folder / "python"
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["OMP_NUM_THREADS"] = "1"  # a pool of threads would be lost in a fork
    server = subprocess.Popen(
        [sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield str(program)
    finally:
        server.kill()
        server.communicate()


def serve(address: str) -> tuple[list[str], dict[str, str]]:
    """Fork a process for every call; returns in that process alone, with arguments and environment."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchvision  # noqa: F401

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait
    os.write(1, b"ready\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while True:
        if 0 in select.select([listening, 0], [], [])[0]:  # whoever started it is gone, killed perhaps
            os._exit(0)
        connection, _ = listening.accept()
        if os.fork():
            connection.close()
            continue
        listening.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        header, streams, *_ = socket.recv_fds(connection, LENGTH.size, 4)
        argv, environment = json.loads(connection.recv(LENGTH.unpack(header)[0], socket.MSG_WAITALL))
        if child := os.fork():
            for stream in streams:
                os.close(stream)
            wait_for(child, connection)
        connection.close()
        for number, stream in enumerate(streams[:3]):
            os.dup2(stream, number)
        os.fchdir(streams[3])
        for stream in streams:
            os.close(stream)
        return argv, environment


def wait_for(child: int, connection: socket.socket) -> None:
    """Pass signals on until the process ends, or its caller does, and tell the caller how."""
    ended = os.pidfd_open(child)
    while ended not in select.select([ended, connection], [], [])[0]:
        os.kill(child, (connection.recv(1) or bytes([signal.SIGKILL]))[0])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(OSError):  # the caller is gone
        connection.sendall(ENDED.pack(status))
    os._exit(0)


def become(argv: list[str], environment: dict[str, str]) -> None:
    """Run what Python would run with these arguments and this environment."""
    import torch

    program, *argv = argv
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 (for as long as the process lasts)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.executable, sys.orig_argv = program, [program, *argv]
    isolated = argv[0] == "-I"
    kind, *rest = argv[isolated:]
    if kind == "-u":
        kind, *rest = rest
    file = kind not in ("-c", "-m")
    del sys.path[0]  # of this file
    if not isolated:
        first = os.path.dirname(os.path.abspath(kind)) if file else os.getcwd() if kind == "-m" else ""
        sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        sys.modules.pop("sitecustomize", None)
        with suppress(ModuleNotFoundError):
            import sitecustomize  # noqa: F401
    if file:
        sys.argv[:] = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")
    elif kind == "-m":
        sys.argv[:] = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))


if __name__ == "__main__":
    become(*serve(sys.argv[1]))

"""The command's process keeps the memory of freed tensors."""

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Page faults while a tensor of 64 MiB, 16,384 pages or 32 huge ones, is made and freed over and over: before and after.
COUNT_FAULTS = """
import resource
import torch
from conam_zoo.startup import keep_freed_memory

def count():
    for _ in range(3):
        torch.zeros(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10

print(count(), keep_freed_memory(), count())
"""

glibc = pytest.mark.skipif(
    os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt"
)


def faults(**environment: str) -> tuple[int, str, int]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")} | environment
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True, env=env)
    usual, kept, count = done.stdout.split()
    return int(usual), kept, int(count)


@glibc
def test_freed_memory_is_used_again() -> None:
    usual, kept, count = faults()
    assert kept == "True"
    assert count < 8 < usual


@glibc
def test_what_the_environment_decides_is_left_alone() -> None:
    _, kept, count = faults(MALLOC_MMAP_THRESHOLD_="131072")
    assert kept == "False"
    assert count > 8


def test_every_command_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch, conam) -> None:
    called = []
    monkeypatch.setattr("conam_zoo.cli.keep_freed_memory", lambda: called.append(True))
    conam("--version")
    assert called == [True]

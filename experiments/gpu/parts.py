"""Archives cut into parts, for machines that exchange files of limited size only."""

import hashlib
import re
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

from conam_zoo.errors import UserError
from conam_zoo.files import make_folder, write_atomically

MIB = 2**20
NAME = re.compile(r"(?P<archive>[\w-]+)\.(?P<sha256>[0-9a-f]{64})\.(?P<number>\d+)-of-(?P<count>\d+)\.part", re.ASCII)


def write_parts(
    archive: str, members: Iterable[Path], root: Path, output: Path, part_bytes: int, prefix: Path = Path()
) -> list[Path]:
    """Write files as an archive in parts of at most ``part_bytes``, ``NAME.SHA256.00-of-03.part`` and so on.

    ``archive`` is its name, of letters, digits, ``_`` and ``-``. ``members`` are files and folders below ``root``;
    their paths in the archive are those from there, below ``prefix``.
    """
    whole = make_folder(output) / f".{archive}.tar"
    try:
        with tarfile.open(whole, "w") as tar:
            for member in members:
                tar.add(member, (prefix / member.relative_to(root)).as_posix())
        with whole.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            count = -(-whole.stat().st_size // part_bytes)
            parts = []
            for number in range(count):
                part = output / f"{archive}.{sha256}.{number:02d}-of-{count:02d}.part"
                piece = file.read(part_bytes)
                write_atomically(part, lambda temporary, piece=piece: temporary.write_bytes(piece))  # type: ignore[misc]
                parts.append(part)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error}): choose a folder with space and rights.") from error
    finally:
        whole.unlink(missing_ok=True)
    return parts


def join_parts(source: Path, work: Path) -> tuple[list[str], list[str]]:
    """Copy parts to ``work/parts``, and unpack each archive that is complete there under ``work``.

    It gives the names of the archives that were unpacked, and one line for each that is not complete yet. The parts of
    a complete archive are removed, also if it is not the one that was cut, which is refused, as is a ``source`` without
    parts.
    """
    waiting = make_folder(work / "parts")
    found = [path for path in sorted(source.iterdir()) if NAME.fullmatch(path.name)] if source.is_dir() else []
    if not found:
        raise UserError(f"{source} holds no part of an archive: name a folder with files NAME.SHA256.00-of-02.part.")
    for part in found:
        write_atomically(waiting / part.name, lambda temporary, part=part: shutil.copyfile(part, temporary))  # type: ignore[misc]
    archives: dict[tuple[str, str, int], dict[int, Path]] = {}
    for part in sorted(waiting.iterdir()):
        if match := NAME.fullmatch(part.name):
            key = (match["archive"], match["sha256"], int(match["count"]))
            archives.setdefault(key, {})[int(match["number"])] = part
    missing = [f"{name}: {len(parts)} of {n} parts" for (name, _, n), parts in archives.items() if len(parts) < n]
    whole: list[tuple[float, str, Path]] = []
    damaged: list[str] = []
    try:
        for (archive, sha256, count), parts in archives.items():
            if len(parts) == count:
                joined = _join(archive, sha256, [parts[number] for number in range(count)])
                if joined is None:
                    damaged.append(archive)
                    continue
                with tarfile.open(joined) as tar:
                    whole.append((max(member.mtime for member in tar), archive, joined))
        whole.sort()  # of several that bring the same run, the newest comes last
        for _, _, path in whole:
            with tarfile.open(path) as tar:
                tar.extractall(work, filter="data")
    finally:
        for _, _, path in whole:
            path.unlink()
    if damaged:
        raise UserError(f"The parts of {', '.join(damaged)} are damaged: copy all of them again.")
    return [archive for _, archive, _ in whole], missing


def _join(archive: str, sha256: str, parts: list[Path]) -> Path | None:
    """The archive whose parts these are, which are removed; None if they are damaged."""
    whole = parts[0].with_name(f".{archive}.{sha256}.tar")
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, file)
            part.unlink()
    with whole.open("rb") as file:
        right = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    if not right:
        whole.unlink()
    return whole if right else None

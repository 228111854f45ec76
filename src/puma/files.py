"""What reaches the disk reaches it whole: atomic writes, locks, checksums.

A writer writes to a dot-named temporary file beside its target, flushes it to the disk and renames it. A reader
therefore never sees half a file, and a process killed at any moment leaves at most a dot file behind, which every
reader of Parquet folders ignores.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from puma.errors import BusyError, DataError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CANNOT_WRITE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOENT,
    errno.ENAMETOOLONG,
}


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success flush it to disk and rename it to ``target``.

    Nothing is left at either name if the body raises.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def storage_errors(target: Path | str) -> Iterator[None]:
    """Turn the operating system's errors about ``target`` into a `StorageError` that says what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space left for {target}",
                why="the disk or the quota is full; everything written before is intact",
                fix="free some space and run the same command again: it goes on from here",
            ) from error
        if error.errno in _CANNOT_WRITE:
            raise StorageError(f"cannot write {target}", why=str(error), fix="choose another output path") from error
        raise


def prepare_folder(folder: Path | str) -> Path:
    """Create ``folder`` and prove it can be written, before any compute starts.

    Raises:
        StorageError: it is a file, or it cannot be written.
    """
    folder = Path(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.tmp"
        probe.write_bytes(b"x")
        probe.unlink()
    return folder


def write_bytes(target: Path | str, data: bytes) -> None:
    """Write ``data`` to ``target`` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def write_text(target: Path | str, text: str) -> None:
    """Write ``text`` to ``target`` atomically, as UTF-8."""
    write_bytes(target, text.encode())


def write_json(target: Path | str, value: Any) -> None:
    """Write ``value`` to ``target`` atomically, as indented JSON with NaN refused."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {path}", why=str(error)) from None


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes, read in constant memory."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of its keys.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def lock(folder: Path | str, name: str = ".lock") -> Iterator[None]:
    """Hold ``folder`` for this process; a lock whose owner is dead on this host is taken over.

    The operating system holds the lock (``flock``), so that it vanishes with its owner whatever kills it; the file's
    text (pid and host) is only for the message. On file systems shared between hosts, `flock` reaches as far as the
    file system carries it.

    Raises:
        BusyError: another live process holds it; the message names its pid and host.
        StorageError: the folder cannot be written.
    """
    import fcntl

    path = prepare_folder(folder) / name
    with storage_errors(path), path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(
                f"{folder} is being written by another process ({file.read().strip() or 'unknown'})",
                fix="wait for it, or stop it; what it finished is kept",
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: the directory entry has to reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

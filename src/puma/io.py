"""Files: atomic writes, locks, checksums, resumable shards, and the check that a folder was made with these settings.

A writer writes a dot-named temporary file beside its target, flushes it to the disk and renames it. A process killed at
any moment leaves at most that dot file, which readers ignore and the next process that writes there removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from puma.errors import BusyError, DataError, PumaError, ResumeError, StorageError, UsageError

logger = logging.getLogger("puma")
Key = TypeVar("Key", int, str)
REGISTRIES = ("torchvision", "timm", "robustbench", "hf")  # of published models: a name follows after a colon

_FULL = {"ENOSPC", "EDQUOT", "EFBIG"}  # names of error codes
_BAD_PATH = {"EACCES", "EPERM", "EROFS", "ENOTDIR", "EEXIST", "EISDIR", "ENOENT", "ENAMETOOLONG", "ELOOP"}
_NO_LOCKS = {"ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP"}
_NO_FSYNC = {"EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EROFS"}
_NOT_STORAGE = (BlockingIOError, ChildProcessError, ConnectionError, InterruptedError, ProcessLookupError, TimeoutError)
_LEFTOVER, _STALE_S = re.compile(r"\..+\.([0-9a-f]{6})-(\d+)-[0-9a-f]+\.tmp"), 24 * 3600
_MOST_TOML, _MOST_DOTS = 1 << 18, 500  # in a line: the parser's time grows with the square of a dotted key's length
_EXAMPLES = "`puma study run --help` prints a study to begin with, `puma recipe show digits` a recipe"


def _host() -> str:
    """Short name of what a process number is unique in: this boot of this machine, and the container."""
    names = [socket.gethostname()]
    with suppress(OSError):  # Linux; several machines of one name may share a folder
        names += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:6]


_HOST = _host()
_swept: set[tuple[int, str]] = set()


@contextmanager
def atomic_path(target: Path | str, *, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success flush it to disk and rename it to ``target``.

    Nothing is left at either name if the body raises. A link at ``target`` is replaced, never written through; with
    ``folder`` an empty folder is replaced, never one that holds something. `StorageError` where it cannot be written.
    """
    target = Path(target)
    temporary = temporary_path(target)
    with storage_errors(target):
        try:
            if folder and target.is_dir() and any(target.iterdir()):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            if target.exists() and not (target.is_file() or target.is_dir()):  # root could replace /dev/null
                raise FileExistsError(errno.EEXIST, "it is a device or a pipe")
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target.parent)
            # exclusively: no file and no link is written through
            temporary.mkdir() if folder else temporary.touch(exist_ok=False)
            yield temporary
            if not folder:
                _fsync(temporary)
            temporary.replace(target)
            _fsync(target.parent)
        finally:
            with suppress(OSError):
                shutil.rmtree(temporary) if folder else temporary.unlink(missing_ok=True)


@contextmanager
def storage_errors(target: Path | str) -> Iterator[None]:
    """Turn the system's errors about ``target`` into a `StorageError`; those that name a file elsewhere pass."""
    try:
        yield
    except OSError as error:
        place, named = os.path.abspath(target), error.filename
        named = os.path.abspath(named) if isinstance(named, (str, Path)) else place
        elsewhere = not (place.startswith(named) or named.startswith(os.path.dirname(place)))
        if error.errno is None or isinstance(error, (StorageError, *_NOT_STORAGE)) or elsewhere:
            raise
        code, why = errno.errorcode.get(error.errno), str(error)
        what = f"{target} is not empty" if code == "ENOTEMPTY" else f"cannot write {target}"
        fix = "check the disk or the mount and run the same command again; everything written before is kept"
        if code in _FULL:
            what, why = f"no space left for {target}", "the disk or the quota is full; what was written before is kept"
            fix = "free some space and run the same command again: it goes on from here"
        elif code in _BAD_PATH:
            fix = "choose another output path"
        raise StorageError(what, why=why, fix=fix) from error


def prepare_folder(folder: Path | str) -> Path:
    """Create ``folder``, prove that it can be written (else `StorageError`), and remove what killed processes left."""
    folder = Path(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(b"x")
    return folder


def temporary_path(target: Path) -> Path:
    """A name beside ``target`` that goes at the next start where this process is killed."""
    return target.with_name(f".{target.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(3)}.tmp")


def _fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk; file systems that cannot are left alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove temporary files of processes that are gone, and foreign ones of a day ago; once per folder and process."""
    place = (os.getpid(), os.path.abspath(folder))
    if place in _swept:
        return
    _swept.add(place)
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            known = _LEFTOVER.fullmatch(path.name)
            if known is None:
                continue
            gone = path.lstat().st_mtime < time.time() - _STALE_S
            try:
                if known[1] == _HOST:
                    os.kill(int(known[2]), 0)  # only asks whether the process is there
            except ProcessLookupError:
                gone = True
            if gone:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_bytes(target: Path | str, data: bytes) -> None:
    """Write ``data`` to ``target`` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def write_text(target: Path | str, text: str) -> None:
    """Write ``text`` to ``target`` atomically, as UTF-8."""
    write_bytes(target, text.encode())


def write_json(target: Path | str, value: Any, *, checksum: bool = False) -> None:
    """Write indented JSON, NaN refused; ``checksum`` adds one to an object, which `read_json` compares."""
    if checksum:
        plain = json.loads(json.dumps(value, allow_nan=False))
        value = {**plain, "checksum": f"sha256:{fingerprint(plain)}"}
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _read(path: Path | str, kind: type[PumaError], fix: str = "", most: int = -1) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(most)
    except FileNotFoundError:
        raise kind(f"{path} does not exist", fix=fix) from None
    except (UnicodeDecodeError, OSError) as error:
        raise kind(f"cannot read {path}", why=str(error)) from None


def read_json(path: Path | str) -> Any:
    """Read a JSON file; `DataError` if it is missing, no JSON, nested too deeply, or does not match its checksum."""
    value = parse_json(_read(path, DataError), path)
    sealed = isinstance(value, dict) and str(value.get("checksum", "")).startswith("sha256:")
    if sealed and value.pop("checksum") != f"sha256:{fingerprint(value)}":
        why, fix = "its content does not match the checksum inside it", "restore it, or delete it and make it again"
        raise DataError(f"{path} is damaged", why=why, fix=fix)
    return value


def parse_json(text: str | bytes, name: Path | str) -> Any:
    """Parse JSON, or raise a `DataError` that names it ``name``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"cannot read {name}", why=why) from None


def parse_toml(text: str, name: Path | str) -> dict[str, Any]:
    """Parse TOML; `UsageError`, naming it ``name``, if it is not TOML, or larger or deeper than settings can be."""
    if len(text) > _MOST_TOML or any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        why = f"{_MOST_TOML:,} characters and {_MOST_DOTS} dots in a line are the most"
        raise UsageError(f"{name} is too large for settings", why=why)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"{name} is not TOML", why=why, fix=_EXAMPLES) from None


def read_toml(path: Path | str) -> dict[str, Any]:
    """Read a TOML file; `UsageError` if it is missing, cannot be read, or is no settings (`parse_toml`)."""
    return parse_toml(_read(path, UsageError, f"check the path; {_EXAMPLES}", 2 * _MOST_TOML), path)


def read_footer(path: Path | str, schema: str, kind: str, fix: str) -> tuple[dict[str, Any], Any, int]:
    """Metadata, columns and number of rows of ``kind``, a Parquet file of this ``schema`` (else `DataError`)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(path)
        columns = footer.schema.to_arrow_schema()
        meta = dict(json.loads((columns.metadata or {})[b"puma"]))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist", fix=fix) from None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not {kind}", why=str(error), fix="`puma show` says what a file is") from None
    if (version := meta.pop("schema", None)) != schema:
        same = str(version).split("/")[0] == schema.split("/")[0]
        what = f"{kind} of another schema version" if same else f"not {kind}"
        raise DataError(f"{path} is {what} ({version!r})", why=f"this version reads {schema!r}", fix=fix)
    return meta, columns, footer.num_rows


def offline_without_hub() -> None:
    """Tell the Hugging Face packages to use their cache alone if the hub does not answer: they would try for minutes.

    Where there is a proxy it is left to them to find out.
    """
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        if not getproxies():
            port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
            socket.create_connection((endpoint.hostname or "", port), 3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module in ("datasets.config", "huggingface_hub.constants"):
            if module in sys.modules:
                vars(sys.modules[module])["HF_HUB_OFFLINE"] = True


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes, read in constant memory."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def lock(folder: Path | str, name: str = ".lock") -> Iterator[None]:
    """Hold ``folder`` by a lock that ends with this process; `BusyError` names another one that holds it.

    `StorageError` for a lock file that is a link, and on file systems without locks.
    """
    import filelock

    path = prepare_folder(folder) / name
    with storage_errors(path):
        held = filelock.FileLock(path, blocking=False, fallback_to_soft=False)
        try:
            held.acquire()
        except filelock.Timeout:
            holder = path.read_bytes()[:200].decode(errors="replace").strip() or "unknown"
            what = f"{folder} is being written by another process ({holder})"
            raise BusyError(what, fix="wait for it, or stop it; what it finished is kept") from None
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) not in _NO_LOCKS:
                raise
            what, fix = f"{folder} is on a file system without locks", "choose an output folder on another file system"
            raise StorageError(what, why=str(error), fix=fix) from error
        flags = os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(path, flags), "w") as file:
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        with suppress(OSError):  # the lock ends with this process at the latest
            held.release()


def locked(folder: Path | str, name: str = ".lock") -> bool:
    """Whether a process holds a lock. Changes nothing in the folder."""
    import filelock

    path = Path(folder) / name
    try:
        with filelock.FileLock(path, blocking=False, fallback_to_soft=False) if path.is_file() else nullcontext():
            return False
    except OSError as error:  # in a folder that can only be read nobody can say
        return isinstance(error, filelock.Timeout)


def settings_diff(there: Any, now: Any, name: str = "") -> list[str]:
    """Every setting in which two JSON values differ: ``recipe.steps: 50 there, 60 now``."""
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        names = {str(key): (there.get(key), now.get(key)) for key in (*there, *now)}
        lines = (settings_diff(*pair, f"{name}.{key}" if name else key) for key, pair in sorted(names.items()))
        return [line for found in lines for line in found]
    if isinstance(there, (list, tuple)) and isinstance(now, (list, tuple)):
        there, now = list(there), list(now)
    if there == now:
        return []
    texts = ["none" if value is None else repr(value) for value in (there, now)]
    # of a SHA-256, enough to tell two apart
    shown = [re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text) for text in texts]
    return [f"{name}: {shown[0]} there, {shown[1]} now"]


def require_same_settings(path: Path | str, there: Any, now: Any, *, fix: str = "") -> None:
    """Raise a `ResumeError` that names every setting that differs, with both values."""
    if changed := settings_diff(there, now):
        fix = fix or "use those settings, or choose another output folder"
        raise ResumeError(f"{path} was made with other settings", why="; ".join(changed), fix=fix)


def claim_folder(
    folder: Path | str,
    settings: Mapping[str, Any],
    *,
    environment: Mapping[str, Any] | None = None,
    record: str = "settings.json",
    schema: str = "",
    write: bool = True,
) -> list[str]:
    """Record in ``folder`` what its content is made with, or make sure that it was made with that.

    ``settings`` is JSON of everything that decides the content; `ResumeError` names those that differ. ``environment``
    is JSON of what may change its last bits: where it differs, a warning is logged and the differences are returned.
    ``schema`` names what the folder holds. Without ``write`` nothing is changed, and a folder without a record passes.
    """
    path = (prepare_folder(folder) if write else Path(folder)) / record
    if not path.exists():
        if write:
            value = {"schema": schema, "settings": dict(settings), "environment": dict(environment or {})}
            write_json(path, value, checksum=True)
        return []
    there = read_record(path)
    require_same_settings(path, {"schema": there["schema"]}, {"schema": schema})
    require_same_settings(path, there["settings"], json.loads(json.dumps(settings)))
    known, today = there["environment"], environment or {}
    both = known.keys() & today.keys()  # an earlier version may have recorded less
    if "logits" in both:  # what the code of a model does with its weights, within 2 % on any machine
        both.remove("logits")
        then, now = known["logits"], today["logits"]
        apart = max(abs(a - b) for a, b in zip(then, now, strict=False))
        if len(then) != len(now) or apart > 0.02 * max(map(abs, then)):
            what = f"{folder} was made by a model of the same weights that computes something else with them"
            why = f"logits of the first image: {then[:3]}... there, {now[:3]}... now"
            raise ResumeError(what, why=why, fix="choose another output folder")
    changed = settings_diff({key: known[key] for key in both}, {key: today[key] for key in both})
    if changed:
        text = "%s was begun on another machine or with other libraries (%s); the last bits of the result may differ"
        logger.warning(text, folder, "; ".join(changed))
    return changed


def read_record(path: Path | str) -> dict[str, Any]:
    """The record of `claim_folder`, or a `DataError` if it is missing, damaged, or something else."""
    value = read_json(path)
    if not isinstance(value, dict) or not {"schema", "settings", "environment"} <= value.keys():
        raise DataError(f"{path} is no record of settings", why="it does not hold schema, settings and environment")
    return value


def spans(total: int, size: int) -> list[range]:
    """Cut ``total`` rows into consecutive ranges of ``size``; the last may be shorter."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


class Shards:
    """A result that is made in shards, files of one folder; each is whole or absent, so that any process can go on.

    Every shard has its SHA-256 in a dot file beside it, written before the shard appears; a damaged one is made again.
    Shards are named by a number (``part-000003.parquet``) or by a text (``alpha-5.json``).

    ``folder``, ``settings`` and ``claim`` are those of `claim_folder`, ``suffix`` is the ending of the files.
    """

    def __init__(
        self, folder: Path | str, settings: Mapping[str, Any], *, suffix: str = ".parquet", **claim: Any
    ) -> None:
        self.folder, self.suffix = Path(folder), suffix
        claim_folder(folder, settings, **claim)

    def path(self, key: int | str) -> Path:
        """Where a shard lies."""
        return self.folder / ((f"part-{key:06d}" if isinstance(key, int) else key) + self.suffix)

    def finished(self, key: int | str) -> bool:
        """Whether a shard is there and whole; a damaged one is named in the log."""
        path = self.path(key)
        try:
            if not path.exists():
                return False
            whole, why = sha256_file(path) in recorded_sha256(path), "its checksum is not the recorded one"
        except OSError as error:
            whole, why = False, str(error)
        if not whole:
            logger.warning("%s is damaged (%s); it is made again", path, why)
        return whole

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of ``keys`` that are not finished, in the same order."""
        return [key for key in keys if not self.finished(key)]

    @contextmanager
    def writing(self, key: int | str) -> Iterator[Path]:
        """Yield a temporary path that becomes the shard; killed at any moment, the old or the new one is finished."""
        path = self.path(key)
        previous = [sha256_file(path)] if path.exists() and self.finished(key) else []
        with atomic_path(path) as temporary:
            yield temporary
            write_text(digest_path(path), "".join(f"{line}\n" for line in (*previous, sha256_file(temporary))))

    @contextmanager
    def held(self, worker: int = 0, num_workers: int = 1) -> Iterator[None]:
        """Hold the folder as worker ``worker`` of ``num_workers``, each of which makes other shards.

        `BusyError` if another process is the same worker, or divides the shards among another number of workers.
        """
        with lock(self.folder, f".lock-{worker}-of-{num_workers}"):
            for other in self.folder.glob(".lock-*-of-*"):
                if not other.name.endswith(f"-of-{num_workers}"):
                    with lock(self.folder, other.name):
                        pass
            yield


def require_digest(path: Path, fix: str) -> None:
    """Raise a `DataError` if a file has not the SHA-256 that is recorded for it; nothing where none is."""
    if path.is_file() and (stated := recorded_sha256(path)) and (digest := sha256_file(path)) not in stated:
        why = f"sha256 {digest[:12]} now, {stated[-1][:12]} then"
        raise DataError(f"{path} is damaged: its checksum does not fit", why=why, fix=fix)


def recorded_sha256(shard: Path) -> list[str]:
    """The SHA-256 recorded for a shard; two while it is being replaced, none where none is recorded."""
    with suppress(OSError, UnicodeDecodeError):
        return digest_path(shard).read_text().split()
    return []


def digest_path(shard: Path) -> Path:
    """Where the SHA-256 of a shard is recorded."""
    return shard.with_name(f".{shard.name}.sha256")

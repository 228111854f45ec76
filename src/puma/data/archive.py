"""The members of a zip archive by their place in the file, with everything a hostile archive can lie about refused.

Nothing is read but the directory and the members' headers, in constant memory.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from puma.errors import DataError

STORED, DEFLATED = 0, 8
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_ENCRYPTED, _UTF8 = 0x1, 0x800
_MOST_MEMBERS = 1_000
_LARGEST_DIRECTORY = 1 << 20
_END = struct.Struct("<4s4H2LH")


@dataclass(frozen=True)
class Member:
    """One member: its bytes lie at ``offset`` .. ``offset + stored_size`` of ``path``.

    ``size`` is what they unfold to, ``crc`` the CRC-32 of that, both as the archive claims.
    """

    path: Path
    name: str
    offset: int
    stored_size: int
    size: int
    crc: int
    method: int

    @property
    def compressed(self) -> bool:
        """Whether the bytes have to be inflated."""
        return self.method == DEFLATED


def read_members(path: Path | str) -> list[Member]:
    """List the members of the archive at ``path`` in the order in which they lie in the file.

    Raises:
        DataError: not a zip archive, truncated, encrypted, a method other than stored and deflate, two members of one
            name, a local header that contradicts the directory, members that overlap.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            _check_directory_size(file, path)
            with zipfile.ZipFile(file) as archive:
                members = [_located(file, path, info) for info in archive.infolist()]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"cannot read {path}", why=str(error)) from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not a readable .npz file", why=f"truncated or damaged: {error}", fix="copy or download it again"
        ) from None
    seen: set[str] = set()
    for member in members:
        if member.name in seen:
            raise DataError(
                f"{path} holds two members called {member.name!r}", why="which one is meant is anybody's guess"
            )
        seen.add(member.name)
    members.sort(key=lambda member: member.offset)
    for one, two in pairwise(members):
        if one.offset + one.stored_size > two.offset:
            raise DataError(
                f"{path}: members {one.name!r} and {two.name!r} overlap", why="the archive is damaged or hostile"
            )
    return members


def _check_directory_size(file: BinaryIO, path: Path) -> None:
    """Refuse an archive whose directory alone is large: `zipfile` would read all of it into memory."""
    size = file.seek(0, 2)
    tail = min(size, _END.size + 65_535)
    file.seek(size - tail)
    block = file.read(tail)
    at = block.rfind(b"PK\x05\x06")
    if at >= 0 and len(block) - at >= _END.size:
        _, _, _, _, entries, directory, _, _ = _END.unpack_from(block, at)
        if directory != 0xFFFFFFFF and (directory > _LARGEST_DIRECTORY or entries > _MOST_MEMBERS):
            raise DataError(f"{path} claims {entries:,} members", why="an .npz data set has a handful")
        if directory == 0xFFFFFFFF and (zip64 := block.rfind(b"PK\x06\x06")) >= 0:
            directory = int.from_bytes(block[zip64 + 40 : zip64 + 48], "little")
            if directory > _LARGEST_DIRECTORY:
                raise DataError(
                    f"{path} claims a directory of {directory:,} bytes", why="an .npz data set has a handful"
                )
    file.seek(0)


def _located(file: BinaryIO, path: Path, info: zipfile.ZipInfo) -> Member:
    """Find where the member's bytes begin: the local header's extra field differs from the directory's."""
    where = f"{path}: member {info.filename!r}"
    if info.flag_bits & _ENCRYPTED:
        raise DataError(f"{where} is encrypted", fix="save it without a password")
    if info.compress_type not in (STORED, DEFLATED):
        raise DataError(
            f"{where} is compressed by method {info.compress_type}", fix="save with np.savez or np.savez_compressed"
        )
    if info.header_offset < 0:
        raise zipfile.BadZipFile(f"member {info.filename!r} lies before the beginning of the file")
    file.seek(info.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size:
        raise zipfile.BadZipFile(f"member {info.filename!r} lies beyond the end of the file")
    magic, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(header)
    name = file.read(name_length).decode("utf-8" if flags & _UTF8 else "cp437", "replace")
    if magic != b"PK\x03\x04" or method != info.compress_type or flags & _ENCRYPTED or name != info.orig_filename:
        raise zipfile.BadZipFile(f"the header of member {info.filename!r} contradicts the directory")
    offset = info.header_offset + _LOCAL.size + name_length + extra_length
    if offset + info.compress_size > file.seek(0, 2):
        raise zipfile.BadZipFile(f"member {info.filename!r} ends beyond the end of the file")
    if method == STORED and info.compress_size != info.file_size:
        raise zipfile.BadZipFile(f"member {info.filename!r} is stored, yet claims two sizes")
    return Member(path, info.filename, offset, info.compress_size, info.file_size, info.CRC, method)

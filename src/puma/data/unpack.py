"""Any source as an uncompressed EDM ``.npz``, which is mapped instead of decoded or inflated."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puma.data.archive import Member, read_members
from puma.data.edmfile import entry, write_edm
from puma.data.images import blocks
from puma.data.inflate import MemberReader
from puma.data.source import Source
from puma.errors import UsageError
from puma.io import atomic_path
from puma.progress import Progress

_CHUNK = 1 << 22


def unpack_npz(path: Path | str, out: Path | str, *, progress: bool = False) -> Path:
    """Write the members of a compressed ``.npz`` uncompressed, byte for byte, in constant memory.

    The CRC-32 of every member is compared on the way. The bytes are the same, so fingerprints, tables and plans of the
    compressed file stay valid.

    Raises:
        UsageError: nothing in it is compressed, or ``out`` is the file itself.
        DataError: damaged or hostile.
        StorageError: no space, or ``out`` cannot be written.
    """
    path, out = Path(path), Path(out)
    members = read_members(path)
    if not any(member.compressed for member in members):
        raise UsageError(f"{path} is not compressed: it is mapped as it is")
    _check_target(path, out)
    with (
        atomic_path(out) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        zipfile.ZipFile(path) as packed,
        Progress(f"unpacking {path.name}", sum(member.size for member in members), "bytes", show=progress) as bar,
    ):
        archive.comment = packed.comment  # where generated images come from is told there
        for member in members:
            with archive.open(entry(member.name), "w", force_zip64=True) as target, MemberReader(member) as reader:
                for block in _blocks(reader, member):
                    target.write(block)
                    bar.advance(len(block))
    return out


def write_npz(source: Source, out: Path | str, *, progress: bool = False) -> Path:
    """Write a source as an EDM ``.npz`` (``image``, ``label``, ``classes``), uncompressed, in constant memory.

    Raises:
        DataError: an image that cannot be read.
        StorageError: no space, or ``out`` cannot be written.
    """
    chunks = (source.read(rows) for rows in blocks(len(source), source.image_shape))
    with Progress(f"writing {Path(out).name}", len(source), "images", show=progress) as bar:
        write_edm(out, _counted(chunks, bar), source.labels, class_names=source.class_names)
    return Path(out)


def _counted(chunks: Iterable[NDArray[np.uint8]], bar: Progress) -> Iterator[NDArray[np.uint8]]:
    for chunk in chunks:
        yield chunk
        bar.advance(len(chunk))


def _blocks(reader: MemberReader, member: Member) -> Iterator[bytes]:
    while reader.position < member.size:
        yield reader.read(_CHUNK)


def _check_target(path: Path, out: Path) -> None:
    if out.resolve() == path.resolve():
        raise UsageError(f"{out} is the file that is read", fix="choose another --out")

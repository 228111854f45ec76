"""Any source as an uncompressed EDM ``.npz``, which is mapped instead of decoded or inflated."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from puma.data.archive import Member, read_members
from puma.data.inflate import MemberReader
from puma.data.source import Source
from puma.errors import UsageError
from puma.files import atomic_path
from puma.progress import Progress

_CHUNK = 1 << 22
_ROWS = 1024


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
            with archive.open(_entry(member.name), "w", force_zip64=True) as target, MemberReader(member) as reader:
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
    out = Path(out)
    names = np.array(source.class_names)
    with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with (
            archive.open(_entry("image.npy"), "w", force_zip64=True) as target,
            Progress(f"writing {out.name}", len(source), "images", show=progress) as bar,
        ):
            target.write(_header((len(source), *source.image_shape), np.dtype(np.uint8)))
            for start in range(0, len(source), _ROWS):
                images = source.read(slice(start, start + _ROWS))
                target.write(images.tobytes())
                bar.advance(len(images))
        for name, array in (("label.npy", source.labels.astype("<i8")), ("classes.npy", names)):
            with archive.open(_entry(name), "w", force_zip64=True) as target:
                target.write(_header(array.shape, array.dtype))
                target.write(array.tobytes())
    return out


def _blocks(reader: MemberReader, member: Member) -> Iterator[bytes]:
    while reader.position < member.size:
        yield reader.read(_CHUNK)


def _entry(name: str) -> zipfile.ZipInfo:
    """A directory entry without the time of day: equal data give equal files."""
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _check_target(path: Path, out: Path) -> None:
    if out.resolve() == path.resolve():
        raise UsageError(f"{out} is the file that is read", fix="choose another --out")

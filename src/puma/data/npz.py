"""EDM-layout ``.npz`` files (Wang et al. 2023, arXiv 2302.04638): uint8 NHWC ``image``, integer ``label``, ``classes``.

An uncompressed ``image`` is read in place, so that a file of 154 GB opens in milliseconds. Compressed ones of up to
256 MiB are read into memory, larger ones are refused with the command that unpacks them.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from puma.data.checks import check_image_layout, check_labels, check_unfolding, chosen_label, chosen_split
from puma.data.source import Images, Mapped, Options, Pixels, Source, in_memory
from puma.errors import DataError, PumaError, UsageError, first_line
from puma.io import atomic_path, fingerprint
from puma.progress import Progress

IN_MEMORY = 256 << 20
_IMAGE_NAMES, _CLASS_NAMES = ("image", "images", "img"), ("classes", "class_names")
_LONGEST_HEADER, _LARGEST_NAMES = 16_384, 1 << 20
_MOST_MEMBERS, _LARGEST_DIRECTORY, _LOCAL_HEADER = 1_000, 1 << 20, 30
_CHUNK = 4 << 20
_BAD_HEADER = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, OverflowError, tokenize.TokenError)
# of zipfile and zlib, also for compression (NotImplementedError) and encryption (RuntimeError) that they cannot read
_DAMAGE = (zipfile.BadZipFile, zlib.error, NotImplementedError, struct.error, ValueError, EOFError, RuntimeError)


class _Header(NamedTuple):
    """An ``.npy`` header; the values begin ``length`` bytes after its first byte and take ``data_size`` bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    length: int
    data_size: int


def _read_header(file: IO[bytes], size: int, where: str) -> _Header:
    """The header at the beginning of ``file``, where header and values must take ``size`` bytes."""
    start = io.BytesIO(file.read(_LONGEST_HEADER))  # numpy would read a header of any announced length
    try:
        version = np.lib.format.read_magic(start)
        if version not in ((1, 0), (2, 0), (3, 0)):  # 3.0 is 2.0 in UTF-8: the same for arrays of numbers
            raise ValueError(f".npy version {version[0]}.{version[1]}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(start, max_header_size=_LONGEST_HEADER)
    except _BAD_HEADER as error:
        raise DataError(f"{where} has an .npy header that cannot be read", why=first_line(error)) from None
    if dtype.hasobject:
        why = "reading them would run code from the file, so PUMA never does"
        fix = "save plain arrays: uint8 images, int64 labels"
        raise DataError(f"{where} holds Python objects (pickle)", why=why, fix=fix)
    if dtype.kind not in "biufcUS" or dtype.subdtype is not None or not dtype.itemsize or any(n < 0 for n in shape):
        raise DataError(f"{where} is {dtype} of shape {shape}", why="a plain array of numbers is expected")
    header = _Header(shape, dtype, start.tell(), math.prod(shape) * dtype.itemsize)
    if header.length + header.data_size != size:
        claim = f"{dtype}[{', '.join(map(str, shape))}], {header.data_size:,} bytes, but holds {size - header.length:,}"
        why = "the header is wrong or the file is truncated"
        raise DataError(f"{where} claims {claim}", why=why, fix="write it again")
    if fortran_order and len(shape) > 1:
        raise DataError(f"{where} is in Fortran order", fix="save np.ascontiguousarray(images)")
    return header


def load_npz(path: Path, options: Options) -> Source:
    """Open an EDM ``.npz``; ``arr_0`` and ``arr_1``, or by split ``train_images``, ``train_labels`` (MedMNIST).

    The fingerprint is of the shape and of the CRC-32s in the archive's directory; ``verify="full"`` compares them.
    """
    options.only(path, "split", "label")
    split = options.split
    with _opened(path) as members:
        named = {member.info.filename.removesuffix(".npy"): member for member in members}
        image, truth = _arrays_of(path, named, split, options.label)
        header, label_header = image.header(), truth.header()
        if split is not None and len(header.shape) == 3:
            header = header._replace(shape=(*header.shape, 1))
        if split is not None and label_header.shape == (header.shape[0], 1):
            label_header = label_header._replace(shape=header.shape[:1])
        where, where_labels = (f"{path}: {member.info.filename.removesuffix('.npy')}" for member in (image, truth))
        sample = None
        if header.dtype != np.uint8:  # say in which range the values lie
            with image.open() as file:
                data = file.read(header.length + (1 << 19))[header.length :]
            sample = np.frombuffer(data, header.dtype, len(data) // header.dtype.itemsize)
        check_image_layout(header.shape, header.dtype, sample, where)
        if label_header.shape != header.shape[:1] or label_header.dtype.kind not in "iu":  # before any label is read
            empty = np.broadcast_to(np.zeros((), label_header.dtype), label_header.shape)
            check_labels(empty, header.shape[0], where_labels)
        names = next((named[name] for name in _CLASS_NAMES if name in named), None)
        texts = names.array() if names is not None and names.info.file_size <= _LARGEST_NAMES else np.empty(0)
        class_names = tuple(map(str, texts)) if texts.dtype.kind == "U" and texts.ndim == 1 else None
        labels = check_labels(truth.array().reshape(label_header.shape), header.shape[0], where_labels, class_names)
        if not image.compressed:
            images: Images = Mapped(path, image.offset + header.length, header.shape)
        elif header.data_size <= IN_MEMORY:
            images = in_memory(image.array().reshape(header.shape))
        else:
            why = f"its {header.data_size / 1e9:,.1f} GB of images cannot be read in place"
            raise DataError(f"{path} is compressed", why=why, fix=f"puma data unpack {path}")
        if options.verify == "full":
            for _ in image.blocks():  # at the end its CRC-32 is compared
                pass
    name = f"{path.stem}-{split}" if split else path.stem
    arrays = [["image", image.info.file_size, image.info.CRC], ["label", truth.info.file_size, truth.info.CRC]]
    content = {"format": "npz", "shape": header.shape, "members": arrays, "classes": class_names}
    return Source(images, labels, name=name, fingerprint=fingerprint(content), class_names=class_names)


@dataclass(frozen=True)
class _Member:
    """One member of an open archive; its bytes lie at ``offset`` of the file."""

    path: Path
    archive: zipfile.ZipFile
    info: zipfile.ZipInfo
    offset: int

    def __str__(self) -> str:
        return f"{self.path}: member {self.info.filename!r}"

    @property
    def compressed(self) -> bool:
        return self.info.compress_type != zipfile.ZIP_STORED

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Its bytes, inflated; at their end `zipfile` compares the CRC-32."""
        with self.archive.open(self.info) as file:
            try:
                yield file
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise DataError(f"{self} is damaged", why=str(error), fix="copy or download the file again") from None

    def header(self) -> _Header:
        with self.open() as file:
            return _read_header(file, self.info.file_size, str(self))

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, 4 MiB at a time."""
        with self.open() as file:
            missing = self.info.file_size
            while block := file.read(_CHUNK):
                missing -= len(block)
                yield block
            if missing:
                raise zipfile.BadZipFile(f"{missing:,} of {self.info.file_size:,} bytes are missing")

    def array(self) -> NDArray[Any]:
        """All of its values, for small ones."""
        header = self.header()
        return np.frombuffer(b"".join(self.blocks()), header.dtype, offset=header.length).reshape(header.shape)


@contextmanager
def _opened(path: Path) -> Iterator[list[_Member]]:
    """The members of a zip archive in the order in which they lie in it; only the directory is read so far."""
    try:
        with path.open("rb") as file:
            _check_directory_size(file, path)
            with zipfile.ZipFile(file) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
                members = [_Member(path, archive, info, _data_offset(file, info)) for info in infos]
                _check_members(members, file.seek(0, 2))
                yield members
    except PumaError:
        raise
    except _DAMAGE as error:
        why = f"truncated or damaged: {error}"
        raise DataError(f"{path} is not a readable .npz file", why=why, fix="copy or download it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}", why=str(error)) from None


def _check_directory_size(file: IO[bytes], path: Path) -> None:
    """Refuse an archive whose directory alone is large: `zipfile` would read all of it into memory."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # its own reader of the end, also of zip64
    if end and (end[5] > _LARGEST_DIRECTORY or end[4] > _MOST_MEMBERS):
        claim = f"{end[4]:,} members in a directory of {end[5]:,} bytes"
        raise DataError(f"{path} claims {claim}", why="an .npz data set has a handful")
    file.seek(0)


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: the extra field of its local header may differ from the directory's."""
    file.seek(max(info.header_offset, 0))
    header = file.read(_LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04" or len(header) < _LOCAL_HEADER:
        raise zipfile.BadZipFile(f"member {info.filename!r} has no header where the directory says")
    name, extra = struct.unpack_from("<HH", header, 26)
    return int(info.header_offset + _LOCAL_HEADER + name + extra)


def _check_members(members: list[_Member], size: int) -> None:
    names = [member.info.filename for member in members]
    limits = [*[member.info.header_offset for member in members], size][1:]
    for member, limit in zip(members, limits, strict=False):
        info, name = member.info, member.info.filename
        if info.flag_bits & 1:
            raise DataError(f"{member} is encrypted", fix="save it without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            fix = "save with np.savez or np.savez_compressed"
            raise DataError(f"{member} is compressed by method {info.compress_type}", fix=fix)
        if names.count(name) > 1:
            raise DataError(f"{member.path} holds two members called {name!r}")
        if not member.compressed and info.compress_size != info.file_size:
            raise zipfile.BadZipFile(f"member {name!r} is stored, yet claims two sizes")
        if member.offset + info.compress_size > limit:
            raise zipfile.BadZipFile(f"member {name!r} overlaps the next one or ends beyond the end of the file")
        check_unfolding(str(member), info.compress_size, info.file_size)


def _arrays_of(path: Path, members: dict[str, _Member], split: str | None, label: str | None) -> list[_Member]:
    """The members with the images and the labels."""
    splits = {name[:-7] for name in members if name.endswith("_images") and f"{name[:-7]}_labels" in members}
    image = next((name for name in (*_IMAGE_NAMES, "arr_0") if name in members), None)
    if split is not None or (splits and image is None):
        if not splits:
            raise UsageError(f"{path} holds one split, not {split!r}", fix="leave ?split= out")
        split = chosen_split(path, split, sorted(splits))
        truth = chosen_label([f"{split}_labels"], [f"{split}_labels"], label, f"{path}?split={split}")
        return [members[f"{split}_images"], members[truth]]
    if image is None:
        why = f"it holds: {', '.join(sorted(members)) or 'nothing'}"
        fix = "np.savez(path, image=<uint8 [N, H, W, C]>, label=<int64 [N]>)"
        raise DataError(f"{path} has no member 'image'", why=why, fix=fix)
    also = ["arr_1"] if image == "arr_0" else [name for name in members if name.endswith(("label", "labels"))]
    return [members[image], members[chosen_label(list(members), also, label, str(path))]]


# --- writing -------------------------------------------------------------------------------------------------------


def write_npz(
    path: Path | str,
    chunks: Iterable[Pixels],
    labels: NDArray[np.int64],
    *,
    class_names: Sequence[str] = (),
    comment: dict[str, Any] | None = None,
) -> None:
    """Write an uncompressed EDM ``.npz`` atomically and in constant memory; equal contents give equal bytes.

    ``chunks``: uint8 ``[n, H, W, C]`` each, ``len(labels)`` rows in all (else `ValueError`). ``comment``: where the
    images come from; JSON that the archive carries as its comment (at most 65,535 bytes).
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = b"" if comment is None else json.dumps(comment, sort_keys=True).encode()
        rows = 0
        with archive.open(_entry("image.npy"), "w", force_zip64=True) as member:
            for chunk in chunks:
                if rows == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *chunk.shape[1:])}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(np.ascontiguousarray(chunk).data)
                rows += len(chunk)
        if rows != len(labels):
            raise ValueError(f"{rows} images but {len(labels)} labels")
        arrays: dict[str, NDArray[Any]] = {"label.npy": labels.astype("<i8")}
        if class_names:
            arrays["classes.npy"] = np.array(class_names)
        for name, array in arrays.items():
            with archive.open(_entry(name), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # the earliest that a zip can hold


def read_comment(path: Path | str) -> dict[str, Any]:
    """The JSON object in an archive's comment; empty for any other or broken file."""
    try:
        with zipfile.ZipFile(path) as archive:
            comment = json.loads(archive.comment or b"{}")
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError):
        return {}
    return comment if isinstance(comment, dict) else {}


def unpack_npz(path: Path | str, out: Path | str, *, progress: bool = False) -> Path:
    """Write the members of a compressed ``.npz`` uncompressed, byte for byte, in constant memory; CRC-32s are compared.

    Fingerprints, tables and plans stay valid. `UsageError` where nothing is compressed, or ``out`` is the file itself.
    """
    path, out = Path(path), Path(out)
    with _opened(path) as members:
        if not any(member.compressed for member in members):
            raise UsageError(f"{path} is not compressed", fix="use it as it is: it is read in place")
        if out.resolve() == path.resolve():
            raise UsageError(f"{out} is the file that is read", fix="choose another --out")
        total = sum(member.info.file_size for member in members)
        with (
            atomic_path(out) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            Progress(f"unpacking {path.name}", total, "bytes", show=progress) as bar,
        ):
            archive.comment = members[0].archive.comment  # says where generated images come from
            for member in members:
                with archive.open(_entry(member.info.filename), "w", force_zip64=True) as target:
                    for block in member.blocks():
                        target.write(block)
                        bar.advance(len(block))
    return out

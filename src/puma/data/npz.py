"""EDM-layout ``.npz`` files: uint8 NHWC ``image`` and integer ``label``, mapped at the member's place in the file.

``np.load(mmap_mode=...)`` silently ignores the mapping for ``.npz``; here the uncompressed member is mapped, so that a
file of 154 GB opens in milliseconds. Compressed members are inflated as they are read (`puma.data.compressed`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.archive import Member, read_members
from puma.data.compressed import compressed_images
from puma.data.images import Images, Shape
from puma.data.inflate import MemberReader
from puma.data.layout import LABEL_NAMES, check_image_layout, check_labels
from puma.data.mapped import MappedImages
from puma.data.npy import Header, read_header
from puma.data.source import ImageSource
from puma.errors import DataError
from puma.io import fingerprint

IMAGE_NAMES = ("image", "images", "img")
_CLASS_NAMES = ("classes", "class_names")
_LARGEST_NAMES = 1 << 20
_BOMB_RATIO, _BOMB_SIZE = 100, 64 << 20
_CHUNK = 1 << 24


def load_npz(path: Path | str, *, verify: str = "free") -> ImageSource:
    """Open an EDM ``.npz``; images stay in the file.

    Args:
        path: the file.
        verify: ``"full"`` reads everything once and compares the CRC-32 that the archive holds of each member.

    Raises:
        DataError: damaged or hostile archive, missing member, wrong dtype, layout or labels.
    """
    path = Path(path)
    members = {member.name.removesuffix(".npy"): member for member in read_members(path)}
    image, label = _member(path, members, IMAGE_NAMES), _member(path, members, LABEL_NAMES)
    header = member_header(image)
    where = f"{path}: {image.name.removesuffix('.npy')}"
    check_not_bomb(image)
    sample = None if header.dtype == np.uint8 else _sample(image, header)
    check_image_layout(header.shape, header.dtype, sample, where)
    class_names = _class_names(members)
    labels = _labels(label, header.shape[0], class_names)
    if verify == "full":
        check_crc(image)
    n, height, width, channels = header.shape
    return ImageSource(
        _images(image, header, (n, height, width, channels)),
        labels,
        name=path.stem,
        fingerprint=_fingerprint(image, header, label, class_names),
        class_names=class_names,
    )


def member_header(member: Member) -> Header:
    """The ``.npy`` header of a member.

    Raises:
        DataError: as `puma.data.npy.read_header`.
    """
    with MemberReader(member) as reader:
        return read_header(reader, member.size, f"{member.path}: member {member.name!r}")


def check_not_bomb(member: Member) -> None:
    """Refuse a deflated member that claims to unfold to over 100 times its size, from the directory alone.

    Raises:
        DataError: names both sizes. An uncompressed member is as large as it is, so it is never refused.
    """
    if member.compressed and member.size > _BOMB_SIZE and member.size > _BOMB_RATIO * member.stored_size:
        raise DataError(
            f"{member.path}: member {member.name!r} claims to unfold {member.stored_size:,} bytes into {member.size:,}",
            why=f"more than {_BOMB_RATIO} times: no real images compress like that, so it is refused as a bomb",
            fix="save it uncompressed (np.savez) where you trust it",
        )


def check_crc(member: Member) -> None:
    """Read a whole member and compare its CRC-32.

    Raises:
        DataError: it differs.
    """
    with MemberReader(member) as reader:
        while reader.read(_CHUNK):
            pass


def read_array(member: Member, header: Header) -> NDArray[Any]:
    """The whole array of a member, for small ones.

    Raises:
        DataError: damaged, or another CRC-32 than the archive holds.
    """
    with MemberReader(member) as reader:
        reader.read(header.length)
        data = reader.read(header.data_size)
    return np.frombuffer(data, header.dtype).reshape(header.shape, order="F" if header.fortran_order else "C")


def _images(member: Member, header: Header, shape: Shape) -> Images:
    if member.compressed:
        return compressed_images(member, header, shape)
    return MappedImages(member.path, member.offset + header.length, shape, fortran_order=header.fortran_order)


def _labels(member: Member, images: int, class_names: tuple[str, ...] | None) -> NDArray[np.int64]:
    header = member_header(member)
    where = f"{member.path}: {member.name.removesuffix('.npy')}"
    if header.shape[:1] != (images,) or len(header.shape) != 1 or header.dtype.kind not in "iu":
        count = header.shape[0] if header.shape else 0
        check_labels(np.broadcast_to(np.zeros((), header.dtype), header.shape), images, where)
        raise DataError(f"{where}: {count:,} labels for {images:,} images")
    return check_labels(read_array(member, header), images, where, class_names)


def _class_names(members: dict[str, Member]) -> tuple[str, ...] | None:
    for name in _CLASS_NAMES:
        if name in members and members[name].size <= _LARGEST_NAMES:
            header = member_header(members[name])
            if header.dtype.kind == "U" and len(header.shape) == 1 and header.shape[0]:
                return tuple(str(text) for text in read_array(members[name], header))
    return None


def _member(path: Path, members: dict[str, Member], names: tuple[str, ...]) -> Member:
    found = [name for name in names if name in members]
    if not found:
        raise DataError(
            f"{path} has no member {names[0]!r}",
            why=f"it holds: {', '.join(sorted(members)) or 'nothing'}",
            fix="np.savez(path, image=<uint8 [N, H, W, C]>, label=<int64 [N]>)",
        )
    return members[found[0]]


def _sample(member: Member, header: Header) -> NDArray[Any]:
    """The first values of an array of a wrong dtype, to say in which range they lie."""
    count = min(1 << 16, header.data_size // header.dtype.itemsize)
    with MemberReader(member) as reader:
        reader.read(header.length)
        return np.frombuffer(reader.read(count * header.dtype.itemsize), header.dtype)


def _fingerprint(image: Member, header: Header, label: Member, names: tuple[str, ...] | None) -> str:
    """From what the archive's directory says: shapes, dtypes and the CRC-32 of every byte, so it costs nothing."""
    arrays = [[kind, member.size, member.crc] for kind, member in (("image", image), ("label", label))]
    return fingerprint(
        {"format": "npz", "shape": header.shape, "order": header.fortran_order, "members": arrays, "classes": names}
    )

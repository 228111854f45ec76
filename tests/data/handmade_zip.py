"""Zip archives written by hand, so that a test can make each field of them lie."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def npy_bytes(array: np.ndarray, *, version: tuple[int, int] = (1, 0), allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=allow_pickle)
    return buffer.getvalue()


def npy_header(shape: tuple[int, ...], descr: str = "|u1", fortran: bool = False, pad: int = 0) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    text += b" " * (pad + -(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@dataclass
class Entry:
    name: str
    data: bytes
    deflate: bool = False
    zip64: bool = False
    local_extra: bytes = b""
    central_extra: bytes = b""
    flags: int = 0
    lies: dict[str, Any] = field(default_factory=dict)
    """Fields that are written other than they are: size, stored_size, crc, method, local_name, offset, raw."""


def write_zip(entries: Iterable[Entry], comment: bytes = b"", members: int | None = None) -> bytes:
    body, directory, count = bytearray(), bytearray(), 0
    for entry in entries:
        count += 1
        squeeze = zlib.compressobj(6, zlib.DEFLATED, -15)
        raw = squeeze.compress(entry.data) + squeeze.flush() if entry.deflate else entry.data
        raw = entry.lies.get("raw", raw)
        size = entry.lies.get("size", len(entry.data))
        stored = entry.lies.get("stored_size", len(raw))
        crc = entry.lies.get("crc", zlib.crc32(entry.data))
        method = entry.lies.get("method", 8 if entry.deflate else 0)
        wide = entry.zip64 or max(size, stored) >= 2**32 - 1
        extra = struct.pack("<HHQQ", 1, 16, size, stored) if wide else b""
        sizes = (2**32 - 1, 2**32 - 1) if wide else (stored, size)
        offset = entry.lies.get("offset", len(body))
        local_name = entry.lies.get("local_name", entry.name).encode()
        common = (45 if wide else 20, entry.flags, method, 0, 33, crc, *sizes)
        local_extra = extra + entry.local_extra
        body += struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *common, len(local_name), len(local_extra))
        body += local_name + local_extra + raw
        name = entry.name.encode()
        central_extra = extra + entry.central_extra
        directory += struct.pack(
            "<4s2B5H3I5H2I", b"PK\x01\x02", 45, 3, *common, len(name), len(central_extra), 0, 0, 0, 0, offset
        )
        directory += name + central_extra
    count = count if members is None else members
    end = struct.pack(
        "<4s4H2IH", b"PK\x05\x06", 0, 0, min(count, 65535), min(count, 65535), len(directory), len(body), len(comment)
    )
    return bytes(body + directory) + end + comment


def edm_arrays(rows: int = 12, classes: int = 3, shape: tuple[int, ...] = (4, 4, 3), seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, *shape), dtype=np.uint8)
    return {"image": images, "label": np.sort(np.arange(rows) % classes).astype(np.int64)}

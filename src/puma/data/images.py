"""Encoded images (PNG, JPEG, ...), in Parquet too: decoded to uint8, once each, in memory or in the cache folder."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from puma.data.checks import check_labels, check_unfolding, chosen_label
from puma.data.source import Images, ImageShape, Mapped, Options, Pixels, Rows, Source, blocks
from puma.errors import BusyError, DataError, PumaError, StorageError
from puma.io import atomic_path, fingerprint, lock, sha256_file

logger = logging.getLogger("puma")

# Pillow is told these by name: its other readers start programs (PostScript) or read what nobody meant as an image.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MODES = {"L": "L", "RGB": "RGB", "1": "L", "P": "RGB"}
_LARGEST_SIDE, _MOST_PIXELS = 4096, 50_000_000
_IMAGE_COLUMNS = ("img", "image", "images")
IN_MEMORY = 1 << 30
_shared = ContextVar("shared", default=False)


def picture_pixels(image: Image.Image, where: str) -> Pixels:
    """The pixels of a Pillow image as uint8 ``[H, W, C]`` (grey: C = 1); `DataError` for a mode that has to be cast."""
    mode = _MODES.get(image.mode)  # palettes and bitmaps unfold without loss
    if mode is None or "transparency" in image.info:
        why = "8-bit grey and RGB are understood; nothing is cast silently"
        what = f"{where} has mode {image.mode}{' with transparency' if mode else ''}"
        deep = "scale it: Image.fromarray((np.asarray(image) / 65535 * 255).round().astype(np.uint8)) for 16 bits"
        raise DataError(what, why=why, fix=deep if image.mode[0] in "IF" else "convert it to RGB or L")
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def fitted(pixels: Pixels, options: Options) -> Pixels:
    """One image ``[H, W, C]`` as ``resize`` and ``channels`` ask; colour is never thrown away."""
    pixels = resized(pixels[None], options.resize)[0] if options.resize else pixels
    return np.repeat(pixels, 3, axis=2) if options.channels == 3 and pixels.shape[2] == 1 else pixels


def decoded(data: bytes | memoryview, where: str, options: Options, expected: ImageShape | None = None) -> Pixels:
    """Decode one image file to uint8 ``[H, W, C]``; `DataError` from its header where it is too large, or of a shape
    other than ``expected``, and for damage and other formats and modes.
    """
    size = options.resize
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS or (size is None and max(width, height) > _LARGEST_SIDE):
                limit = f"a side above {_LARGEST_SIDE:,}" if size is None else f"more than {_MOST_PIXELS:,} pixels"
                raise DataError(f"{where} has {width}x{height} pixels", why=limit, fix="scale it, or use ?resize=32")
            shape = (height, width, len(image.getbands()))
            if expected is None or size is not None or shape[:2] == expected[:2]:
                pixels = fitted(picture_pixels(image, where), options)
                shape = pixels.shape
    except DataError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = str(error)[:200].partition("<_io.BytesIO")[0]
        raise DataError(f"{where} cannot be decoded", why=why, fix="write the file again") from None
    if expected is not None and shape != expected:
        texts = ["x".join(map(str, sizes)) for sizes in (shape, expected)]
        fix = "give all images one shape with ?resize=32 and ?channels=3"
        raise DataError(f"{where}: an image of {texts[0]} among {texts[1]}", fix=fix)
    return pixels


def resized(images: Pixels, size: int) -> Pixels:
    """Scale uint8 ``[B, H, W, C]`` to ``size`` x ``size``: a box filter (the mean) to shrink, bicubic to enlarge."""
    count, height, width, channels = images.shape
    if (height, width) == (size, size):
        return images
    method = Image.Resampling.BOX if size <= min(height, width) else Image.Resampling.BICUBIC
    out = np.empty((count, size, size, channels), np.uint8)
    for place, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if channels == 1 else image)
        out[place] = np.asarray(picture.resize((size, size), method)).reshape(size, size, channels)
    return out


class EncodedImages(Images):
    """``count`` images, decoded when read; ``fetch`` gives the bytes of a row's file, and its name for messages."""

    def __init__(self, fetch: Callable[[int], tuple[Any, str]], count: int, options: Options) -> None:
        self._fetch, self._options = fetch, options
        super().__init__((count, *decoded(*fetch(0), options).shape), slow=True)

    def read(self, rows: Rows) -> Pixels:
        """See `puma.data.source.Images.read`."""
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, row in enumerate(rows.tolist()):
            out[place] = decoded(*self._fetch(row), self._options, self.shape[1:])
        return out


@contextmanager
def shared_copies() -> Iterator[None]:
    """Sources opened inside are decoded into the cache folder whatever their size, for all processes to read."""
    token = _shared.set(True)
    try:
        yield
    finally:
        _shared.reset(token)


def kept(images: Images, key: str) -> Images:
    """``images``, decoded once: up to 1 GiB in memory, more in a file of the cache folder, named by ``key``."""
    in_memory = math.prod(images.shape) <= (0 if _shared.get() else IN_MEMORY)
    return _Kept(images) if in_memory else _Cached(images, key)


class _Kept(Images):
    """Images made when they are first asked for and kept in memory."""

    def __init__(self, images: Images) -> None:
        super().__init__(images.shape)
        self._images = images
        self._known = np.zeros(self.shape[0], dtype=bool)
        self._array = np.empty(self.shape, np.uint8)  # the system hands out its pages only as images arrive

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, (self._images,)  # another process makes its own

    def read(self, rows: Rows) -> Pixels:
        fresh = np.unique(rows[~self._known[rows]])
        if len(fresh):
            self._array[fresh] = self._images.read(fresh)
            self._known[fresh] = True
        out: Pixels = np.take(self._array, rows, axis=0)
        return out


class _Cached(Images):
    """Images decoded on the first read into ``$PUMA_CACHE/images`` (``~/.cache/puma/images``), then read from there."""

    def __init__(self, images: Images, key: str) -> None:
        super().__init__(images.shape)
        self._images = images
        self._mapped: Mapped | None = None
        folder = os.environ.get("PUMA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "puma")
        name = f"{fingerprint([key, list(images.shape)])[:32]}.raw"
        self._path = Path(folder).expanduser().absolute() / "images" / name

    def read(self, rows: Rows) -> Pixels:
        if self._mapped is None:
            while not self._path.is_file():
                try:
                    with lock(self._path.parent, f".{self._path.stem}.lock"):
                        if not self._path.is_file():
                            self._decode()
                except BusyError:
                    time.sleep(1)
                except StorageError as error:  # of a folder that the user has not named
                    raise StorageError(error.what, why=error.why, fix="export PUMA_CACHE=/folder/with/space") from error
            self._mapped = Mapped(self._path, 0, self.shape)
        return self._mapped.read(rows)

    def _decode(self) -> None:
        size, free = math.prod(self.shape), shutil.disk_usage(self._path.parent).free
        text = f"{self.shape[0]:,} images ({size / 1e9:,.1f} GB)"
        if free < size + (64 << 20):
            why = f"{free / 1e9:,.1f} GB are free in {self._path.parent}"
            raise StorageError(f"no space to decode {text}", why=why)
        logger.warning("decoding %s once into %s", text, self._path)
        with atomic_path(self._path) as temporary, temporary.open("wb") as file:
            for block in blocks(self.shape[0], self.shape[1:]):
                file.write(self._images.read(np.arange(block.start, block.stop)).data)


# --- Parquet -------------------------------------------------------------------------------------------------------


def load_parquet(path: Path, options: Options) -> Source:
    """Open one Parquet file in the Hugging Face layout: ``label``, and ``img`` or ``image`` with encoded files.

    The fingerprint is of the footer; ``verify="full"`` compares page checksums and fingerprints every byte.
    """
    options.only(path, "label")
    full = options.verify == "full"
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema, metadata = file.schema_arrow, file.metadata
            image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
            if image is None:
                fix = "`puma show` says what it is; images are encoded files in a column img or image"
                raise DataError(f"{path} has no column 'img'", why=f"it has: {', '.join(schema.names)}", fix=fix)
            class_names = _class_names(schema.metadata or {})
            whole = (field.name for field in schema if pa.types.is_integer(field.type) and "label" in field.name)
            label = chosen_label(schema.names, {*whole, *class_names}, options.label, str(path))
            unfolded = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
            check_unfolding(str(path), path.stat().st_size, max(unfolded, metadata.num_rows * 8))
            labels = file.read(columns=[label]).column(0).combine_chunks()
        files = _ColumnBytes(path, image, full)
    except PumaError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable Parquet file", why=str(error)[:200]) from None
    if not len(labels):
        raise DataError(f"{path} holds no rows")
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{path}: {image} is {kind}", why="images are encoded files: binary, or a struct with bytes")
    names = class_names.get(label) or class_names.get("")
    values = check_labels(labels.to_numpy(zero_copy_only=False), metadata.num_rows, f"{path}: {label}", names)
    if full:
        digest = sha256_file(path)
    else:  # of the footer: sizes, places and statistics of every column chunk
        with path.open("rb") as raw:
            raw.seek(-8 - metadata.serialized_size, 2)
            digest = hashlib.sha256(raw.read()).hexdigest()
    images = EncodedImages(files, len(values), options)
    return Source(images, values, name=path.stem, fingerprint=digest, class_names=names)


class _ColumnBytes:
    """The values of a binary column (or of a struct's ``bytes``); the row group that was read last stays in memory."""

    def __init__(self, path: Path, column: str, checksums: bool) -> None:
        self._settings = (path, column, checksums)
        self._file = pq.ParquetFile(path, page_checksum_verification=checksums)
        groups = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        self._held: tuple[int, pa.Array] = (-1, None)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _ColumnBytes, self._settings

    def __call__(self, row: int) -> tuple[Any, str]:
        """The bytes of a row, and what to call it in messages; `DataError` for a damaged row group or no bytes."""
        path, column, _ = self._settings
        number = int(np.searchsorted(self._ends, row, side="right"))
        group = self._group(number)
        value, where = group[row - int(self._ends[number]) + len(group)], f"{path}: {column}, row {row:,}"
        if not value.is_valid:
            raise DataError(f"{where} holds no bytes")
        return value.as_buffer(), where

    def _group(self, number: int) -> pa.Array:
        path, name, _ = self._settings
        with self._lock:
            if number != self._held[0]:
                try:
                    column = self._file.read_row_group(number, columns=[name]).column(0).combine_chunks()
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise DataError(f"{path} is damaged in row group {number}", why=str(error)[:200]) from None
                if len(column) != self._file.metadata.row_group(number).num_rows:
                    why = f"it holds {len(column):,} rows, not what its footer says"
                    raise DataError(f"{path} is damaged in row group {number}", why=why)
                self._held = number, column.field("bytes") if pa.types.is_struct(column.type) else column
            return self._held[1]


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Class names by column, from Hugging Face's features; under ``""`` those of the entry ``classes``, if any."""
    text = metadata.get(b"classes", b"").decode("utf-8", "replace")
    found: dict[str, list[str]] = {"": text.split(",")} if text else {}
    with suppress(KeyError, TypeError, ValueError, AttributeError, RecursionError):
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found |= {str(name): list(map(str, kind["names"])) for name, kind in features.items() if "names" in kind}
    return {name: tuple(text.strip() for text in texts) for name, texts in found.items()}

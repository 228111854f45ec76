"""Images as PNG, JPEG and the like: decoded one by one to uint8, once each, in memory or in the cache folder."""

from __future__ import annotations

import io
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from puma.data.source import Images, ImageShape, Mapped, Options, Pixels, Rows, blocks
from puma.errors import BusyError, DataError, StorageError
from puma.io import atomic_path, fingerprint, lock

logger = logging.getLogger("puma")

# Pillow is told these by name: its other readers start programs (PostScript) or read what nobody meant as an image.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MODES = {"L": "L", "RGB": "RGB", "1": "L", "P": "RGB"}
_LARGEST_SIDE, _MOST_PIXELS = 4096, 50_000_000
IN_MEMORY = 1 << 30
_shared = ContextVar("shared", default=False)


def picture_pixels(image: Image.Image, where: str) -> Pixels:
    """The pixels of a Pillow image as uint8 ``[H, W, C]`` (grey: C = 1). Palettes and bitmaps unfold without loss.

    Raises:
        DataError: 16-bit, with alpha, CMYK or another mode that would have to be cast.
    """
    mode = _MODES.get(image.mode)
    if mode is None or "transparency" in image.info:
        raise DataError(
            f"{where} has mode {image.mode}{' with transparency' if mode else ''}",
            why="8-bit grey and RGB are understood; nothing is cast silently",
            fix="convert it to RGB or L",
        )
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def fitted(pixels: Pixels, options: Options) -> Pixels:
    """One image ``[H, W, C]`` as ``resize`` and ``channels`` ask; colour is never thrown away."""
    pixels = resized(pixels[None], options.resize)[0] if options.resize else pixels
    return np.repeat(pixels, 3, axis=2) if options.channels == 3 and pixels.shape[2] == 1 else pixels


def decoded(data: bytes | memoryview, where: str, options: Options, expected: ImageShape | None = None) -> Pixels:
    """Decode one image file to uint8 ``[H, W, C]``; its size is compared before any pixel is decoded.

    Refused: unknown or damaged formats, modes that would have to be cast, a side above 4,096 without ``resize``, over
    50 million pixels, another shape than ``expected``.
    """
    size = options.resize
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS or (size is None and max(width, height) > _LARGEST_SIDE):
                limit = f"a side above {_LARGEST_SIDE:,}" if size is None else f"more than {_MOST_PIXELS:,} pixels"
                raise DataError(f"{where} has {width}x{height} pixels", why=limit, fix="scale it, or use ?resize=32")
            if expected is not None and size is None and (height, width) != expected[:2]:
                raise _other_shape(where, (height, width, len(image.getbands())), expected)
            pixels = fitted(picture_pixels(image, where), options)
    except DataError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = str(error)[:200].partition("<_io.BytesIO")[0]
        raise DataError(f"{where} cannot be decoded", why=why, fix="write the file again") from None
    if expected is not None and pixels.shape != expected:
        raise _other_shape(where, pixels.shape, expected)
    return pixels


def _other_shape(where: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> DataError:
    texts = ["x".join(map(str, sizes)) for sizes in (shape, expected)]
    fix = "give all images one shape with ?resize=32 and ?channels=3"
    return DataError(f"{where}: an image of {texts[0]} among {texts[1]}", fix=fix)


def resized(images: Pixels, size: int) -> Pixels:
    """Scale uint8 ``[B, H, W, C]`` to ``size`` x ``size``: a box filter to shrink, bicubic to enlarge.

    The box is the mean, rounded once per axis, where the side shrinks by a whole factor.
    """
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
    """Images that are decoded when they are read.

    Args:
        fetch: row -> the bytes of its image file, and what to call it in messages; picklable.
        count: how many there are.
        options: without ``resize`` all have the shape of the first.
    """

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
            self._mapped = Mapped(self._path, 0, self.shape)
        return self._mapped.read(rows)

    def _decode(self) -> None:
        size = math.prod(self.shape)
        free = shutil.disk_usage(self._path.parent).free
        text = f"{self.shape[0]:,} images ({size / 1e9:,.1f} GB)"
        if free < size + (64 << 20):
            why = f"{free / 1e9:,.1f} GB are free in {self._path.parent}"
            raise StorageError(f"no space to decode {text}", why=why, fix="export PUMA_CACHE=/folder/with/space")
        logger.warning("decoding %s once into %s", text, self._path)
        with atomic_path(self._path) as temporary, temporary.open("wb") as file:
            for block in blocks(self.shape[0], self.shape[1:]):
                file.write(self._images.read(np.arange(block.start, block.stop)).data)

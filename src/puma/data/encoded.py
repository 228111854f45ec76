"""Images as PNG, JPEG and the like: decoded one by one, or as plain bytes of a stated shape."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from puma.data.images import Rows, Shape
from puma.errors import DataError

Encoded = bytes | memoryview
_LARGEST = 50_000_000
_MODES = {"L": "L", "RGB": "RGB", "1": "L", "P": "RGB"}


def decoded(data: Encoded, where: str) -> NDArray[np.uint8]:
    """Decode one image file to uint8 ``[H, W, C]`` (grey: C = 1). Palettes and bitmaps unfold without loss.

    Raises:
        DataError: not an image, damaged, over 50 million pixels, 16-bit, with alpha, or CMYK.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > _LARGEST:
                raise DataError(f"{where} has {image.width}x{image.height} pixels", why="more than 50 million")
            mode = _MODES.get(image.mode)
            if mode is None or "transparency" in image.info:
                raise DataError(
                    f"{where} has mode {image.mode}",
                    why="8-bit grey and RGB are understood; nothing is cast silently",
                    fix="convert it to RGB or L",
                )
            pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except DataError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be decoded", why=str(error)[:200], fix="write the file again") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def resized(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale uint8 ``[H, W, C]`` to ``size`` x ``size``: a box filter to shrink, bicubic to enlarge.

    The box is the mean, rounded once per axis, where the side shrinks by a whole factor.
    """
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    shrink = size <= min(height, width)
    method = Image.Resampling.BOX if shrink else Image.Resampling.BICUBIC
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    return np.asarray(picture.resize((size, size), method)).reshape(size, size, channels)


def fitted(data: Encoded, where: str, size: int | None = None, channels: int | None = None) -> NDArray[np.uint8]:
    """Decode one image file and bring it to a side of ``size`` pixels; ``channels=3`` repeats a grey channel.

    Colour is never thrown away, so ``channels=1`` changes nothing.

    Raises:
        DataError: as `decoded`.
    """
    image = decoded(data, where)
    image = image if size is None else resized(image, size)
    return np.repeat(image, 3, axis=2) if channels == 3 and image.shape[2] == 1 else image


class EncodedImages:
    """Images that a function delivers as encoded files.

    Args:
        fetch: rows -> their bytes, in the same order.
        shape: ``(N, H, W, C)`` after scaling and repeating channels.
        where: what to call the data in messages.
        size: scale each image to this side; None: images have to be of ``shape`` already.
        channels: 3 makes RGB of the grey ones among them.
    """

    def __init__(
        self,
        fetch: Callable[[Rows], Sequence[Encoded]],
        shape: Shape,
        where: str,
        size: int | None = None,
        channels: int | None = None,
    ) -> None:
        self.shape = shape
        self._fetch, self._where, self._size, self._channels = fetch, where, size, channels

    def read(self, rows: Rows) -> NDArray[np.uint8]:
        """See `puma.data.images.Images.read`."""
        out = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, (row, data) in enumerate(zip(rows, self._fetch(rows), strict=True)):
            image = fitted(data, f"{self._where}, row {row:,}", self._size, self._channels)
            if image.shape != self.shape[1:]:
                raise DataError(
                    f"{self._where}, row {row:,}: an image of {_text(image.shape)} among {_text(self.shape[1:])}",
                    fix="give all images one shape with ?resize=32 and ?channels=3",
                )
            out[place] = image
        return out


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))

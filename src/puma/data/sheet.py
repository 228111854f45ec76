"""A contact sheet: some images of each class of a source, one class a row, as a PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from puma.data.source import Source
from puma.rng import mixed_key, permuted

_SHOWN, _GAP, _TITLE = 64, 4, 22
_PAPER, _INK = (255, 255, 255), (30, 30, 30)


def contact_sheet(source: Source, per_class: int = 10, seed: int = 0, most_classes: int = 40) -> bytes:
    """Draw ``per_class`` images of each class, chosen at random by ``seed``, as the bytes of a PNG.

    Small images are enlarged by a whole factor, pixel by pixel, so that nothing is smoothed away. Beyond
    ``most_classes`` the classes shown are spread evenly over all of them.
    """
    classes = np.arange(source.num_classes)
    if len(classes) > most_classes:
        classes = classes[np.linspace(0, len(classes) - 1, most_classes).astype(int)]
    height, width, _ = source.image_shape
    factor = max(1, _SHOWN // max(height, width))
    font = ImageFont.load_default(13)
    texts = [f"{_short(source.class_names[number])}  {int((source.labels == number).sum()):,}" for number in classes]
    side = max(int(font.getlength(text)) for text in texts) + 2 * _GAP
    step_x, step_y = width * factor + _GAP, height * factor + _GAP
    title = f"{source.name}: {len(source):,} images {width}x{height}, {source.num_classes} classes"
    sheet_width = max(side + per_class * step_x, int(font.getlength(title)) + _GAP) + _GAP
    sheet = Image.new("RGB", (sheet_width, _TITLE + len(classes) * step_y + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, fill=_INK, font=font)
    for line, (number, text) in enumerate(zip(classes, texts, strict=True)):
        top = _TITLE + line * step_y
        pen.text((_GAP, top + step_y / 2), text, fill=_INK, font=font, anchor="lm")
        rows = np.flatnonzero(source.labels == number)
        places = permuted(np.arange(min(per_class, len(rows))), len(rows), mixed_key(seed, int(number)))
        for column, image in enumerate(source.read(rows[places])):
            tile = np.repeat(np.repeat(image, factor, 0), factor, 1)
            sheet.paste(Image.fromarray(tile[..., 0] if tile.shape[2] == 1 else tile), (side + column * step_x, top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"

"""Matplotlib figures as SVG: equal figures give equal bytes, and colours follow the page into dark mode."""

from __future__ import annotations

import io
import re

from matplotlib.figure import Figure

from puma.report.style import DARK, house_style

_FONTS = "'DejaVu Sans', Verdana, sans-serif"
_DECLARATION = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>", re.DOTALL)
_STYLE_BLOCK = re.compile(r"<style[^>]*>.*?</style>", re.DOTALL)
_COLOUR = re.compile(r"(fill|stroke|stop-color): ?(#[0-9a-fA-F]{6})")


def svg_text(figure: Figure) -> str:
    """The figure as a complete SVG file: text stays text, no date, ids that depend on content alone."""
    buffer = io.StringIO()
    with house_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    lines = [line.rstrip().replace("'DejaVu Sans'", _FONTS) for line in buffer.getvalue().splitlines()]
    return "\n".join(lines) + "\n"


def inline_svg(figure: Figure | str, prefix: str, alt: str) -> str:
    """An SVG element for a page: ids made unique by ``prefix``, house colours as CSS variables, ``alt`` for readers.

    Args:
        figure: a figure, or the text of an SVG from a trusted source (it is not cleaned).
        prefix: letters and digits, one per figure of the page.
        alt: what the figure shows, for those who cannot see it; must already be escaped.
    """
    text = svg_text(figure) if isinstance(figure, Figure) else figure
    text = _STYLE_BLOCK.sub("", _DECLARATION.sub("", text)).strip()
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = _COLOUR.sub(_variable, text)
    width = re.search(r'viewBox="[\d.\-]+ [\d.\-]+ ([\d.]+)', text)
    size = f' style="max-width: {float(width[1]) * 1.45:.0f}px"' if width else ""
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height|version|xmlns)="[^"]*"', "", head)
    return f'{head} xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{alt}"{size}>{body}'


def variable(colour: str) -> str:
    """The name of the CSS variable of a house colour.

    >>> variable("#0072b2")
    '--c-0072b2'
    """
    return f"--c-{colour[1:]}"


def _variable(match: re.Match[str]) -> str:
    kind, colour = match[1], match[2].lower()
    if colour == "#000000":
        return f"{kind}: currentColor"
    return f"{kind}: var({variable(colour)}, {colour})" if colour in DARK else match[0]

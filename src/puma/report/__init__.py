"""Reports: one self-contained HTML page for a study or a run, and its figures and tables as files.

`Page` builds a page, `write_report` the one of a study or run folder; each is imported when first used, so that a
program which draws nothing never loads matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puma.report.folder import write_report as write_report
    from puma.report.page import Page as Page

_PLACES = {"Page": "puma.report.page", "write_report": "puma.report.folder"}
__all__ = ["Page", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'puma.report' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)

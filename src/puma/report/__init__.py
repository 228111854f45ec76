"""Reports: one self-contained HTML page for a study or a run, its verdict in words, its figures and tables as files.

Each name is imported when first used, so that a program that draws nothing never loads matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from puma.report.conclusion import verdict as verdict
    from puma.report.files import export as export
    from puma.report.files import make_report as make_report
    from puma.report.files import write_report as write_report

_MODULES = {"export": "files", "make_report": "files", "write_report": "files", "verdict": "conclusion"}
__all__ = ["export", "make_report", "verdict", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'puma.report' has no attribute {name!r}")
    return getattr(import_module(f"puma.report.{_MODULES[name]}"), name)

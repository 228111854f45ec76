"""A made-up study for the tests of reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_study import write_study


@pytest.fixture
def make_study() -> Callable[..., Path]:
    """Writes a small made-up study: ``make_study(folder, seeds=2, name="made up", companions=True)``."""
    return write_study

"""How a margin came about."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """How a margin came about. The margin of the last three is NaN."""

    CROSSED = 0
    """The boundary was crossed, confirmed in float32 by the unmodified model."""
    MISCLASSIFIED = 1
    """Wrong from the start: the margin is minus the distance back to the label, -inf where no way back was found."""
    ESTIMATED = 2
    """A linearised estimate (mode fast); no crossing was claimed."""
    UNCONVERGED = 3
    NO_GRADIENT = 4
    NAN = 5

    @property
    def text(self) -> str:
        """The name in tables and on screens, as in ``no-gradient``."""
        return self.name.lower().replace("_", "-")


STATUS_NAMES = tuple(status.text for status in Status)

"""`verify`: every file of a folder read, every checksum compared, every bad file listed."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puma.errors import DataError, PumaError
from puma.progress import Progress
from puma.provenance.artefacts import Artefact, check
from puma.provenance.links import contradictions, unresolved
from puma.provenance.tables import check_table

_LISTED = 20


@dataclass
class Verification:
    """What `verify` found.

    Args:
        folder: what was looked at.
        counts: how many files of each kind were found whole.
        problems: every bad file and every contradiction.
        notes: what could not be checked, or not from this folder alone.
    """

    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[PumaError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Do nothing where all is well.

        Raises:
            DataError: names every bad file.
        """
        if not self.problems:
            return
        lines = [error.what + (f" ({error.why})" if error.why else "") for error in self.problems]
        more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise DataError(
            f"{self.folder}: {len(lines)} of its artefacts {'is' if len(lines) == 1 else 'are'} bad\n  "
            + "\n  ".join(lines[:_LISTED])
            + more,
            fix="restore them from a copy, or delete them and run what made them: it redoes only what is missing",
        )


def verify(folder: Path | str, *, progress: bool = False) -> Verification:
    """Read everything under ``folder`` (a table, run or study folder, or one file) and check it.

    Checksums: page checksums of Parquet, CRC-32 of ``.npz`` members, SHA-256 of weights. Form: schema versions, JSON,
    TOML and CSV, completeness of margin tables. Origin: run and recipe, run and plan, evaluation and flags, evaluation
    and weights, plan and table. Nothing is written.

    Raises:
        DataError: there is no such folder. (What is wrong inside is in ``problems``.)
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(f"{folder} does not exist")
    paths = _files(folder)
    found = Verification(folder)
    artefacts: dict[Path, Artefact] = {}
    parts: set[Path] = set()
    sizes = [path.stat().st_size for path in paths]
    with Progress(f"verifying {folder.name}", sum(sizes), "bytes", show=progress) as bar:
        for path, size in zip(paths, sizes, strict=True):
            try:
                artefact = check(path)
            except PumaError as error:
                found.problems.append(error)
            except OSError as error:
                found.problems.append(DataError(f"{path} cannot be read", why=str(error)))
            else:
                artefacts[path] = artefact
                found.counts[artefact.kind] += 1
                if artefact.kind == "margin part":
                    parts.add(path.parent)
                elif artefact.unchecked and artefact.kind == "weights":
                    found.notes.append(f"{path}: {artefact.unchecked}")
            bar.advance(size)
    tables: dict[Path, dict[str, Any]] = {}
    for place in sorted(parts):
        problems, tables[place] = check_table(place, [path for path in paths if path not in artefacts])
        found.problems += problems
    found.problems += contradictions(artefacts, tables)
    found.notes += unresolved(artefacts, tables)
    return found


def _files(folder: Path) -> list[Path]:
    """All files but hidden ones (locks, and what a killed writer left), in order of their names."""
    if folder.is_file():
        return [folder]
    out: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        out += [Path(root) / name for name in sorted(files) if not name.startswith(".")]
    return out

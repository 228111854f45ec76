"""The folder of a table while it grows: which parts are there, which are broken, who is writing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puma.errors import DataError, ResumeError
from puma.io import lock, prepare_folder, read_json, write_json
from puma.margins import differences, part_path, read_meta, read_part, write_part
from puma.scoring.stream import Columns

logger = logging.getLogger("puma")
TABLE_FILE = "table.json"


class PartFolder:
    """A table on its way: parts of ``part_rows`` rows, each whole or absent.

    Args:
        folder: where the parts lie; made if need be.
        meta: the table's metadata.
        environment: the machine, recorded once and compared later.
        create: False only looks at what is there, and writes nothing.

    Raises:
        ResumeError: the folder holds a table made with other settings; both values are named.
        StorageError: it cannot be written.
    """

    def __init__(
        self, folder: Path | str, meta: Mapping[str, Any], environment: Mapping[str, Any], create: bool = True
    ) -> None:
        self.folder = prepare_folder(folder) if create else Path(folder)
        self.meta = dict(meta)
        self.rows = int(sum(source["rows"] for source in meta["pool"]["sources"]))
        self.part_rows = int(meta["settings"]["part_rows"])
        record = self.folder / TABLE_FILE
        if record.exists():
            known = read_json(record)
            self._refuse_other(known["meta"], record)
            if create and (changed := list(differences(known["environment"], environment))):
                logger.warning(
                    "%s was begun on another machine or with other libraries (%s); its last bits may differ",
                    self.folder,
                    "; ".join(changed),
                )
        else:
            for path in sorted(self.folder.glob("part-*.parquet"))[:1]:
                self._refuse_other(read_meta(path), path)
            if create:
                write_json(record, {"meta": self.meta, "environment": dict(environment)})

    @property
    def count(self) -> int:
        """How many parts the whole table has."""
        return -(-self.rows // self.part_rows)

    def bounds(self, part: int) -> tuple[int, int]:
        """First row of a part and the row after its last."""
        return part * self.part_rows, min((part + 1) * self.part_rows, self.rows)

    def finished(self, part: int) -> bool:
        """Whether a part is there, whole, and of this table; a broken one is named in the log.

        Raises:
            ResumeError: a part of another table lies at its place.
        """
        path = part_path(self.folder, part)
        if not path.exists():
            return False
        try:
            meta = read_meta(path)
            columns = read_part(path, meta)
        except DataError as error:
            logger.warning("%s; it is made again", error.what)
            return False
        self._refuse_other(meta, path)
        start, stop = self.bounds(part)
        index = columns["index"]
        if len(index) != stop - start or index[0] != start or index[-1] != stop - 1:
            logger.warning("%s does not hold rows %d to %d; it is made again", path, start, stop - 1)
            return False
        return True

    def write(self, part: int, columns: Columns) -> None:
        """Write a part; it appears whole or not at all."""
        write_part(self.folder, part, columns, self.meta)

    @contextmanager
    def held(self, worker: int, workers: int) -> Iterator[None]:
        """Hold this worker's place in the folder.

        Raises:
            ResumeError: another live process is at the same place, or divides the work among other workers.
        """
        with lock(self.folder, f".lock-{worker}-of-{workers}"):
            for other in self.folder.glob(".lock-*-of-*"):
                if not other.name.endswith(f"-of-{workers}"):
                    with lock(self.folder, other.name):
                        pass
            yield

    def _refuse_other(self, known: Mapping[str, Any], path: Path) -> None:
        if changed := list(differences(known, self.meta)):
            raise ResumeError(
                f"{path} was made with other settings",
                why="(there and now) " + "; ".join(changed),
                fix="use those settings, or another output folder",
            )

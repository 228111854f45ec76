"""The margin table on disk: what is damaged, forged or misplaced is refused by name; what people see of it is short."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import puma
from puma.errors import DataError
from puma.margins import MarginTable, part_path, read_header, read_part


@pytest.fixture(scope="module")
def table() -> MarginTable:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, 500)
    predicted = np.where(rng.random(500) < 0.1, (label + 1) % 10, label)
    margin = np.where(predicted == label, 1, -1) * rng.random(500) * 0.1
    margin[:3] = np.nan
    pool = {"fingerprint": "0" * 64, "num_classes": 10, "sources": [{"name": "made", "role": "real", "rows": 500}]}
    return MarginTable(
        label=label,
        predicted=predicted,
        margin=margin,
        status=np.where(np.isnan(margin), 3, np.where(margin < 0, 1, 0)),
        steps=np.ones(500),
        source=np.zeros(500),
        meta={"norm": "Linf", "mode": "refined", "settings": {"steps": 50}, "model": {}, "pool": pool},
    )


@pytest.fixture
def folder(table, tmp_path) -> Path:
    return table.write(tmp_path / "table", part_rows=200)


def rewrite(path: Path, change: Callable[[pa.Table, dict[str, Any]], pa.Table]) -> None:
    """Write a part again as another program would, its metadata kept where ``change`` leaves them alone."""
    found = pq.read_table(path)
    meta = json.loads(found.schema.metadata[b"puma"])
    changed = change(found, meta)
    pq.write_table(changed.replace_schema_metadata({b"puma": json.dumps(meta).encode()}), path)


def test_a_table_is_read_as_it_was_written(table, folder) -> None:
    assert MarginTable.read(folder).fingerprint == table.fingerprint
    assert [read_header(part_path(folder, part))[1] for part in range(3)] == [200, 200, 100]
    one = replace(table, scores={"el2n-adv": np.arange(500, dtype=np.float32)})
    assert MarginTable.read(one.write(folder.with_name("one"))).fingerprint == one.fingerprint


@pytest.mark.parametrize("name", ["margin", "label", "predicted", "status", "steps", "source", "index"])
def test_a_part_without_a_column_is_refused(folder, name) -> None:
    rewrite(part_path(folder, 1), lambda found, _: found.drop_columns([name]))
    with pytest.raises(DataError, match=rf"part-000001.parquet lacks column {name}"):
        MarginTable.read(folder)


def test_a_score_in_place_of_the_margin_is_no_margin(table, folder) -> None:
    """A part whose margin column is gone is not taken for a table of other scores."""
    whole = replace(table, scores={"el2n-adv": np.zeros(500, np.float32)}).write(folder, part_rows=200)
    rewrite(part_path(whole, 0), lambda found, _: found.drop_columns(["margin"]))
    with pytest.raises(DataError, match=r"is damaged\n.*checksum"):
        MarginTable.read(whole)


@pytest.mark.parametrize("name", ["index", "margin", "label", "steps"])
@pytest.mark.parametrize("kind", [pa.float64(), pa.string()])
def test_columns_of_another_type_are_refused(folder, name, kind) -> None:
    rewrite(
        part_path(folder, 0),
        lambda found, _: found.set_column(found.column_names.index(name), name, found[name].cast(kind)),
    )
    with pytest.raises(DataError, match=rf"column {name} of .*part-000000.parquet is {kind}, not"):
        MarginTable.read(folder)


@pytest.mark.parametrize("name", ["index", "margin", "status"])
def test_rows_without_a_value_are_refused(folder, name) -> None:
    def without(found: pa.Table, _: dict[str, Any]) -> pa.Table:
        gap = pa.array([True] + [False] * (found.num_rows - 1))
        column = pa.compute.if_else(gap, None, found[name].cast(pa.string()) if name == "status" else found[name])
        return found.set_column(found.column_names.index(name), name, column)

    import pyarrow.compute  # noqa: F401

    rewrite(part_path(folder, 0), without)
    with pytest.raises(DataError, match=f"has no value in some rows of column {name}"):
        MarginTable.read(folder)


def test_a_changed_number_is_seen(folder) -> None:
    def changed(found: pa.Table, _: dict[str, Any]) -> pa.Table:
        margin = found["margin"].to_numpy().copy()
        margin[7] += np.float32(1e-3)
        return found.set_column(found.column_names.index("margin"), "margin", pa.array(margin))

    rewrite(part_path(folder, 2), changed)
    with pytest.raises(DataError, match=r"part-000002.parquet is damaged\n.*checksum"):
        MarginTable.read(folder)


def test_settings_changed_afterwards_are_seen(folder) -> None:
    for part in range(3):
        rewrite(part_path(folder, part), lambda found, meta: meta["settings"].update(steps=51) or found)
    with pytest.raises(DataError, match="checksum"):
        MarginTable.read(folder)


def test_every_flipped_bit_is_seen_or_changes_nothing(table, tmp_path) -> None:
    """Any bit of a part, its footer included: an error of ours that names the file, or the same table."""
    part = part_path(table.write(tmp_path / "t"), 0)
    data = part.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for place in rng.choice(len(data) * 8, 300, replace=False):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << (place % 8)
        part.write_bytes(flipped)
        try:
            assert MarginTable.read(part).fingerprint == table.fingerprint, f"bit {place}"
        except DataError as error:
            assert str(part) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 200


def test_parts_under_other_numbers_are_refused(folder) -> None:
    one, two, three = (part_path(folder, part) for part in range(3))
    shutil.copy(one, folder / "kept")
    one.replace(folder / "moved")
    two.replace(one)
    (folder / "moved").replace(two)
    with pytest.raises(DataError, match=r"part-000000.parquet does not hold rows 0 to 199.*\n.*begin with 200"):
        MarginTable.read(folder)
    two.replace(folder / "moved")
    one.replace(two)
    (folder / "moved").replace(one)
    three.replace(part_path(folder, 7))
    with pytest.raises(DataError, match=r"part-000007.parquet does not hold rows 400 to 499, as part 2"):
        MarginTable.read(folder)
    part_path(folder, 7).replace(three)
    shutil.copy(three, part_path(folder, 3))
    with pytest.raises(DataError, match=r"part-000003.parquet does not hold rows 500 to 599"):
        MarginTable.read(folder)
    part_path(folder, 3).unlink()
    two.unlink()
    with pytest.raises(DataError, match="lacks 200 of 500 rows, the first is 200"):
        MarginTable.read(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rows", 10**14), ("rows", -1), ("rows", 1.5), ("rows", True), ("num_classes", 10**12), ("num_classes", 0)],
)
def test_absurd_claims_are_refused_from_the_header(folder, key, value) -> None:
    def forged(found: pa.Table, meta: dict[str, Any]) -> pa.Table:
        place = meta["pool"] if key == "num_classes" else meta["pool"]["sources"][0]
        place[key] = value
        return found

    for part in range(3):
        rewrite(part_path(folder, part), forged)
    began = time.process_time()
    tracemalloc.start()
    with pytest.raises(DataError):
        MarginTable.read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    assert time.process_time() - began < 1


def test_a_part_of_endless_rows_is_refused_before_it_is_decoded(tmp_path, table) -> None:
    """Run-length encoding holds any number of equal rows in a few bytes."""
    rows = 50_000_000
    path = tmp_path / "part-000000.parquet"
    with pq.ParquetWriter(path, pa.schema([("index", pa.int64())])) as writer:
        writer.write_table(pa.table({"index": pa.nulls(rows, pa.int64())}))
    meta = {"schema": "puma.margins/2", **table.meta}
    meta["pool"] = {**meta["pool"], "sources": [{"name": "made", "role": "real", "rows": rows}]}
    stored = pq.read_table(path).replace_schema_metadata({b"puma": json.dumps(meta).encode()})
    pq.write_table(stored, path)
    assert path.stat().st_size < 500_000
    with pytest.raises(DataError, match="claims 50,000,000 rows"):
        read_header(path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", '{"schema": "puma.margins/2"}', '{"schema": "puma.margins/1"}', "3"]
)
def test_metadata_that_say_nothing_are_refused(folder, text) -> None:
    path = part_path(folder, 0)
    found = pq.read_table(path)
    pq.write_table(found.replace_schema_metadata({b"puma": text.encode()}), path)
    with pytest.raises(DataError, match=r"part-000000\.parquet"):
        MarginTable.read(folder)


def test_a_text_that_no_status_has_is_refused(folder) -> None:
    def other(found: pa.Table, _: dict[str, Any]) -> pa.Table:
        return found.set_column(found.column_names.index("status"), "status", pa.array(["fine"] * found.num_rows))

    rewrite(part_path(folder, 0), other)
    with pytest.raises(DataError, match="unknown value 'fine'"):
        read_part(part_path(folder, 0))


def test_labels_outside_the_classes_are_refused(table) -> None:
    with pytest.raises(DataError, match="labels of the table reach from 0 to 10, not 0 to 9"):
        replace(table, label=np.where(np.arange(500) == 3, 10, table.label))


def test_a_table_shows_itself_briefly(table) -> None:
    joined = replace(table, scores={"el2n-adv": np.zeros(500, np.float32)})
    text = repr(joined)
    assert len(text) < 300
    wrong = int((table.status == 1).sum())
    assert f"500 images, Linf, refined: {497 - wrong} crossed; {wrong} misclassified; 3 unconverged" in text
    assert "scores el2n-adv" in text
    page = joined._repr_html_()
    assert f"<td>misclassified</td><td>{wrong}</td>" in page
    assert any(bar in page for bar in "▁▂▃▄▅▆▇█")
    assert len(page) < 1500
    hostile = replace(table, scores={"<script>": np.zeros(500, np.float32)})
    assert "<script>" not in hostile._repr_html_()


def test_a_table_plots_its_margins(table) -> None:
    axes = table.plot("Linf:8/255")
    steps = [patch.get_data() for patch in axes.patches]
    share = sum((step.values - step.baseline).sum() for step in steps)
    assert share == pytest.approx(100 * 497 / 500)  # all finite ones
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([0, 8])
    assert axes.get_xlabel() == "margin (Linf, in 1/255); higher is easier"
    assert table.plot(puma.ThreatModel("Linf", 0.1), ax=axes) is axes
    with pytest.raises(DataError, match="margins are in Linf"):
        table.plot("L2:0.5")
    with pytest.raises(DataError, match="no finite margins"):
        replace(table, margin=np.full(500, np.nan)).plot()

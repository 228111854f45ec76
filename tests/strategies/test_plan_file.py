"""The plan's file: readable without PUMA, refused when it is not what it says, old versions stay readable."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_tables import make_table

from puma.errors import DataError
from puma.margins import METADATA_KEY
from puma.plan import Plan
from puma.strategies import STRATEGIES, make_plan

GOLDEN = Path(__file__).parent / "golden" / "plan-1.parquet"


def made() -> Plan:
    margin = [0.05, 0.2, -0.02, 0.01, 0.3, 0.04, np.nan, 0.08]
    return make_plan(make_table(margin, [0, 0, 1, 1] * 2, real=2), "puma", 0.34, threat="Linf:0.08")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made().write(tmp_path / "plan.parquet")


def test_golden_plan_of_version_1() -> None:
    plan = Plan.read(GOLDEN)
    assert plan.keep.tolist() == [True, True, True, True, False, True, True, False]
    np.testing.assert_allclose(plan.eps, [0.025, 0.08, 0, 0.005, 0, 0.02, 0.08, 0], rtol=1e-6)
    assert plan.strategy == "puma"
    assert plan.threat.eps == 0.08
    assert plan.meta["derived"] == {"c": 0.5}
    assert [source["name"] for source in plan.meta["pool"]["sources"]] == ["real", "made"]


def test_a_plan_shows_itself_briefly() -> None:
    plan = made()
    assert repr(plan) == f"<Plan puma, Linf:0.08: 6 of 8 images kept, mean eps {plan.mean_eps:.4g}>"
    page = plan._repr_html_()
    assert "6 of 8 images" in page
    assert any(bar in page for bar in "▁▂▃▄▅▆▇█")
    assert len(page) < 1500
    axes = plan.plot()
    assert [text.get_text() for text in axes.texts] == [f" mean {255 * plan.mean_eps:.3g}"]  # in the unit of the axis


def test_equal_plans_are_equal_bytes(tmp_path: Path, path: Path) -> None:
    assert made().write(tmp_path / "again.parquet").read_bytes() == path.read_bytes()


def test_readable_without_puma(path: Path) -> None:
    plan = made()
    frame = pd.read_parquet(path)
    pd.testing.assert_frame_equal(frame, plan.to_pandas())
    kept, mean = duckdb.sql(f"select count(*), avg(eps) from '{path}' where keep").fetchall()[0]
    assert kept == plan.kept == 6
    assert mean == pytest.approx(plan.mean_eps)
    meta = json.loads(pq.read_schema(path).metadata[b"puma"])
    assert (meta["schema"], meta["threat"]) == ("puma.plan/1", {"norm": "Linf", "eps": 0.08})


def rewrite(path: Path, table: pa.Table, **meta: object) -> None:
    old = json.loads(pq.read_schema(path).metadata[b"puma"])
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps({**old, **meta}).encode()}), path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, 1, 2, 3, 4, 5, 6], "7 rows; its pool has 8"),
        ([0, 1, 2, 3, 4, 5, 6, 6], "repeats"),
        ([1, 0, 2, 3, 4, 5, 6, 7], "order"),
    ],
)
def test_missing_and_repeated_rows_are_refused(path: Path, rows: list[int], words: str) -> None:
    rewrite(path, pq.read_table(path).take(rows))
    with pytest.raises(DataError, match=words):
        Plan.read(path)


def test_foreign_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Plan.read(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no plan")
    with pytest.raises(DataError, match="is not a plan"):
        Plan.read(tmp_path / "text.parquet")
    pq.write_table(pa.table({"index": [0]}), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="is not a plan"):
        Plan.read(tmp_path / "bare.parquet")
    table = pq.read_table(path)
    rewrite(path, table, schema="puma.plan/9")
    with pytest.raises(DataError, match=r"another schema version \('puma.plan/9'\)"):
        Plan.read(path)
    rewrite(path, table, schema="puma.margins/1")
    with pytest.raises(DataError, match="is not a plan"):
        Plan.read(path)
    rewrite(path, table.drop_columns("eps"), schema="puma.plan/1")
    with pytest.raises(DataError, match="other columns"):
        Plan.read(path)


def test_a_flipped_byte_is_noticed_or_harmless(path: Path) -> None:
    whole, plan = path.read_bytes(), Plan.read(path)
    refused = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ (0xFF if place % 2 else 1 << place % 8)]) + whole[place + 1 :]
        )
        try:
            again = Plan.read(path)
        except DataError:
            refused += 1
            continue
        assert np.array_equal(again.keep, plan.keep)
        assert np.array_equal(again.eps, plan.eps)
        assert again.beta == plan.beta
        assert again.meta == {**again.meta, **plan.meta}  # the name of the checksum may have changed
    assert refused > 20


def test_a_plan_whose_pool_is_not_described_is_refused(path: Path) -> None:
    for pool in ({}, None, {"sources": [{}]}, {"sources": 3}):
        rewrite(path, pq.read_table(path), pool=pool)
        with pytest.raises(DataError, match="description does not fit"):
            Plan.read(path)


def test_changed_rows_are_refused(path: Path) -> None:
    table = pq.read_table(path)
    rewrite(path, table.set_column(1, "keep", pa.array([True] * 8)))
    with pytest.raises(DataError, match="checksum"):
        Plan.read(path)


@pytest.mark.parametrize(
    ("keep", "eps", "words"),
    [
        ([True, False], [0.1, 0.1], "rows that it drops"),
        ([True, True], [0.1, np.nan], "negative, NaN or infinite"),
        ([True, True], [0.1, -0.1], "negative, NaN or infinite"),
        ([True, True], [np.inf, 0.1], "negative, NaN or infinite"),
        ([True, True], [0.1], "shape"),
    ],
)
def test_contradictory_plans_are_refused(keep: list[bool], eps: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Plan(np.array(keep), np.array(eps, np.float32), {})


def test_fingerprint_sees_every_bit() -> None:
    plan = made()
    eps = plan.eps.copy()
    eps[0] = np.nextafter(eps[0], np.float32(1))
    others = [
        Plan(plan.keep, eps, plan.meta),
        Plan(plan.keep, plan.eps, {**plan.meta, "seed": 1}),
        Plan(plan.keep, plan.eps, plan.meta, beta=2.0),
    ]
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_every_strategy_is_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()
    assert [name for name in STRATEGIES if f"\n| `{name}`" not in text] == []
    for name, strategy in STRATEGIES.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        if not strategy.control:
            assert [parameter for parameter in strategy.parameters if f"`{parameter}" not in line] == []

from __future__ import annotations

import logging
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from handmade_zip import edm_arrays, npy_bytes

from puma.data import compressed
from puma.data.load import load_dataset
from puma.errors import DataError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    arrays = edm_arrays(8000, 4, (32, 32, 3))
    arrays["image"][:, 12:] = 7
    path = tmp_path_factory.mktemp("compressed") / "edm.npz"
    np.savez_compressed(path, **arrays)
    return path, arrays["image"]


@pytest.fixture
def large(written: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A compressed file that counts as too large for memory: 25 MB of images, restarts every 250 kB."""
    monkeypatch.setattr(compressed, "IN_MEMORY", 1 << 16)
    monkeypatch.setattr(compressed, "_PROBE", 250_000)
    monkeypatch.setattr(compressed, "_SKIP", 50_000)
    path = tmp_path / "edm.npz"
    path.write_bytes(written[0].read_bytes())
    return path, written[1]


def test_any_order_of_rows_reads_right(large: tuple[Path, np.ndarray]) -> None:
    path, images = large
    source = load_dataset(path)
    rng = np.random.default_rng(0)
    for rows in (
        np.array([7999]),
        np.array([0, 1, 2]),
        rng.integers(0, 8000, 50),
        np.array([7, 7, 3, 7999, 0]),
        np.arange(3000, 2990, -1),
        np.empty(0, np.int64),
    ):
        np.testing.assert_array_equal(source.read(rows), images[rows])
    np.testing.assert_array_equal(source.read(slice(None)), images)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.read(rows[:3]), images[rows[:3]])


def test_memory_stays_constant(large: tuple[Path, np.ndarray]) -> None:
    path, images = large
    tracemalloc.start()
    source = load_dataset(path)
    total = 0
    for start in range(0, 8000, 100):
        total += int(source.read(slice(start, start + 100)).sum())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == images.sum()
    assert peak < 9 << 20


def test_restarts_spare_inflating_from_the_beginning(large: tuple[Path, np.ndarray]) -> None:
    reader = load_dataset(large[0]).images
    reader.read(np.array([7999]))
    positions = [restart.position for restart in reader._restarts]
    assert len(positions) > 50
    assert max(np.diff(positions)) < 2 * 250_000


def test_the_warning_says_the_cost_and_the_way_out(
    large: tuple[Path, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="puma"):
        load_dataset(large[0])
    assert "MB/s here" in caplog.text
    assert "one pass costs" in caplog.text
    assert f"puma data unpack {large[0]}" in caplog.text


def test_damage_deep_inside_is_found_when_it_is_reached(large: tuple[Path, np.ndarray]) -> None:
    path, images = large
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    source = load_dataset(path)
    np.testing.assert_array_equal(source.read(np.arange(10)), images[:10])
    with pytest.raises(DataError, match="is damaged"):
        source.read(slice(None))
    with pytest.raises(DataError, match="is damaged"):
        load_dataset(path, verify="full")


def test_fortran_order_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "IN_MEMORY", 100)
    arrays = edm_arrays()
    np.savez_compressed(tmp_path / "edm.npz", image=np.asfortranarray(arrays["image"]), label=arrays["label"])
    assert b"'fortran_order': True" in npy_bytes(np.asfortranarray(arrays["image"]))
    with pytest.raises(DataError, match="in Fortran order"):
        load_dataset(tmp_path / "edm.npz")

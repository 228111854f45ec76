from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from handmade_zip import edm_arrays, npy_bytes

from puma.data.load import load_dataset
from puma.errors import DataError


def test_small_compressed_files_are_read_into_memory(tmp_path: Path) -> None:
    arrays = edm_arrays(800, 4, (16, 16, 3))
    np.savez_compressed(tmp_path / "edm.npz", **arrays)
    source = load_dataset(tmp_path / "edm.npz")
    (tmp_path / "edm.npz").unlink()
    rows = np.array([799, 0, 7, 7])
    np.testing.assert_array_equal(source.read(rows), arrays["image"][rows])


def test_large_compressed_files_are_refused_with_the_command_that_unpacks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("puma.data.npz.IN_MEMORY", 1000)
    np.savez_compressed(tmp_path / "edm.npz", **edm_arrays(800, 4, (16, 16, 3)))
    with pytest.raises(DataError, match="is compressed") as caught:
        load_dataset(tmp_path / "edm.npz")
    assert caught.value.fix == f"puma data unpack {tmp_path / 'edm.npz'}"


def test_damage_deep_inside_is_found(tmp_path: Path) -> None:
    path = tmp_path / "edm.npz"
    np.savez_compressed(path, **edm_arrays(800, 4, (16, 16, 3)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="is damaged"):
        load_dataset(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_fortran_order_is_refused(tmp_path: Path, save: object) -> None:
    arrays = edm_arrays()
    images = np.asfortranarray(arrays["image"])
    assert b"'fortran_order': True" in npy_bytes(images)
    save(tmp_path / "edm.npz", image=images, label=arrays["label"])  # type: ignore[operator]
    with pytest.raises(DataError, match="in Fortran order") as caught:
        load_dataset(tmp_path / "edm.npz")
    assert "ascontiguousarray" in caught.value.fix

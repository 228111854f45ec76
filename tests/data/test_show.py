from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from handmade_zip import edm_arrays
from typer.testing import CliRunner

from puma.cli.data import data_app
from puma.data.checks import equal_images, image_hashes, label_runs
from puma.data.load import load_dataset
from puma.data.npz import unpack_npz
from puma.data.pool import Pool
from puma.errors import DataError, UsageError

runner = CliRunner()


def saved(path: Path, images: np.ndarray, labels: np.ndarray) -> str:
    np.savez(path, image=images, label=labels)
    return str(path)


def test_longest_run_of_one_label() -> None:
    labels = np.repeat([0, 1, 2], 100)
    assert label_runs(labels)[0] == 100
    longest, expected = label_runs(np.random.default_rng(0).permutation(labels))
    assert longest < 12
    assert 4 < expected < 6
    assert label_runs(np.zeros(7, np.int64)) == (7, 7)


def test_duplicates_are_found_and_only_those(tmp_path: Path) -> None:
    arrays = edm_arrays(30, 3)
    images, labels = arrays["image"].copy(), arrays["label"]
    images[20], images[25] = images[3], images[3]
    one = image_hashes(load_dataset(saved(tmp_path / "a.npz", images, labels)))
    assert [rows.tolist() for rows in equal_images(one)] == [[20, 25], [3, 3]]
    fresh = edm_arrays(12, 3, seed=1)
    fresh["image"][[2, 9]] = images[[3, 29]]
    test = image_hashes(load_dataset(saved(tmp_path / "t.npz", fresh["image"], fresh["label"])))
    assert [rows.tolist() for rows in equal_images(one, test)] == [[3, 20, 25, 29], [2, 2, 2, 9]]


def test_puma_data_show(tmp_path: Path) -> None:
    arrays = edm_arrays(300, 3)
    path = saved(tmp_path / "edm.npz", arrays["image"], arrays["label"])
    arrays["image"][:5] = edm_arrays(300, 3, seed=1)["image"][:5]
    test = saved(tmp_path / "held.npz", arrays["image"][::-1][:100], arrays["label"][::-1][:100] * 0)
    with pytest.raises(DataError, match="no image of class"):
        load_dataset(saved(tmp_path / "c.npz", arrays["image"], arrays["label"] * 2))
    result = runner.invoke(data_app, ["show", path, "--test", test], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for text in (
        "300 of 4x4, RGB",
        "longest 100 (shuffled: about 5)",
        "first rows are no sample",
        "0: 100, 1: 100, 2: 100",
    ):
        assert text in result.output
    assert "100 of 300 images of edm occur in the test set held, 100 with another label" in result.output


def test_puma_data_show_verifies_when_asked(tmp_path: Path) -> None:
    arrays = edm_arrays(600, 3)
    path = Path(saved(tmp_path / "edm.npz", arrays["image"], arrays["label"]))
    data = bytearray(path.read_bytes())
    data[data.find(arrays["image"].tobytes()) + 27_000] ^= 1
    path.write_bytes(data)
    assert runner.invoke(data_app, ["show", str(path), "--quiet"]).exit_code == 0
    assert "CRC-32" in str(runner.invoke(data_app, ["show", f"{path}?verify=full", "--quiet"]).exception)
    assert isinstance(runner.invoke(data_app, ["show", f"{path}?verify=fast"]).exception, UsageError)


def test_unpacked_npz_is_the_same_data_mapped(tmp_path: Path) -> None:
    arrays = edm_arrays(500, 3)
    np.savez_compressed(tmp_path / "edm.npz", **arrays, classes=np.array(["a", "b", "c"]))
    result = runner.invoke(data_app, ["unpack", str(tmp_path / "edm.npz"), "--quiet"])
    assert result.exit_code == 0, result.output
    packed, unpacked = (load_dataset(tmp_path / name, verify="full") for name in ("edm.npz", "edm-unpacked.npz"))
    assert len(pickle.dumps(unpacked)) < 10_000 < len(pickle.dumps(packed))  # its pixels stay in the file
    np.testing.assert_array_equal(unpacked.read(slice(None)), packed.read(slice(None)))
    assert Pool([unpacked]).fingerprint == Pool([packed]).fingerprint
    assert unpacked.class_names == ("a", "b", "c")
    with np.load(tmp_path / "edm-unpacked.npz") as plain:
        np.testing.assert_array_equal(plain["image"], arrays["image"])
    with pytest.raises(UsageError, match="is not compressed"):
        unpack_npz(tmp_path / "edm-unpacked.npz", tmp_path / "x.npz")
    with pytest.raises(UsageError, match="is the file that is read"):
        unpack_npz(tmp_path / "edm.npz", tmp_path / "edm.npz")


def test_damage_found_while_unpacking_leaves_nothing(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "edm.npz", **edm_arrays(200, 3))
    data = bytearray((tmp_path / "edm.npz").read_bytes())
    data[2000] ^= 0x55
    (tmp_path / "edm.npz").write_bytes(bytes(data))
    with pytest.raises(DataError, match="is damaged"):
        unpack_npz(tmp_path / "edm.npz", tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["edm.npz"]

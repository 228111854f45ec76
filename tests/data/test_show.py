from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from handmade_zip import edm_arrays
from PIL import Image
from typer.testing import CliRunner

from puma.cli.data import data_app
from puma.data.checks import contact_sheet, image_hashes, repeated, shared, summarize
from puma.data.load import load_dataset
from puma.data.npz import save_source, unpack_npz
from puma.data.pool import Pool
from puma.errors import DataError, UsageError

runner = CliRunner()


def saved(path: Path, images: np.ndarray, labels: np.ndarray) -> str:
    np.savez(path, image=images, label=labels)
    return str(path)


def test_summary_against_plain_numpy(tmp_path: Path) -> None:
    arrays = edm_arrays(300, 3)
    arrays["image"][7] = 99
    facts = summarize(load_dataset(saved(tmp_path / "a.npz", arrays["image"], arrays["label"])))
    pixels = arrays["image"] / 255
    np.testing.assert_allclose(facts.mean, pixels.mean((0, 1, 2)))
    np.testing.assert_allclose(facts.std, pixels.std((0, 1, 2)))
    assert facts.counts.tolist() == [100, 100, 100]
    assert (facts.longest_run, facts.flat, facts.ordered) == (100, 1, True)
    order = np.random.default_rng(0).permutation(300)
    mixed = summarize(load_dataset(saved(tmp_path / "b.npz", arrays["image"][order], arrays["label"][order])))
    assert not mixed.ordered
    assert mixed.longest_run < 12


def test_duplicates_are_found_and_only_those(tmp_path: Path) -> None:
    arrays = edm_arrays(30, 3)
    images, labels = arrays["image"].copy(), arrays["label"].copy()
    images[20], images[25] = images[3], images[3]
    labels[25] = labels[3]
    one = load_dataset(saved(tmp_path / "a.npz", images, labels))
    inside = repeated(one, image_hashes(one))
    assert (inside.rows.tolist(), inside.twins.tolist(), inside.conflicts) == ([20, 25], [3, 3], 1)
    fresh = edm_arrays(12, 3, seed=1)
    fresh["image"][[2, 9]] = images[[3, 29]]
    test = load_dataset(saved(tmp_path / "t.npz", fresh["image"], fresh["label"]))
    across = shared(one, image_hashes(one), test, image_hashes(test))
    assert across.rows.tolist() == [3, 20, 25, 29]
    assert across.twins.tolist() == [2, 2, 2, 9]
    assert len(shared(test, np.zeros(12, np.uint64), one, np.zeros(30, np.uint64))) == 0  # equal hashes, other pixels


def test_contact_sheet_shows_the_images_of_each_class() -> None:
    white = np.full((6, 4, 4, 3), 255, np.uint8)
    white[1] = (200, 0, 0)
    source = load_dataset((white, np.array([0, 1, 0, 2, 2, 2])))
    data = contact_sheet(source, per_class=2)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    red = (pixels == (200, 0, 0)).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert red[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.9  # one image, in the middle row
    assert abs(rows.mean() / len(pixels) - 0.5) < 0.1
    assert contact_sheet(source, per_class=2) == data
    digits = load_dataset("digits")
    assert contact_sheet(digits, per_class=3) != contact_sheet(digits, per_class=3, seed=1)


def test_puma_data_show(tmp_path: Path) -> None:
    arrays = edm_arrays(300, 3)
    path = saved(tmp_path / "edm.npz", arrays["image"], arrays["label"])
    arrays["image"][:5] = edm_arrays(300, 3, seed=1)["image"][:5]
    test = saved(tmp_path / "held.npz", arrays["image"][::-1][:100], arrays["label"][::-1][:100] * 0)
    with pytest.raises(DataError, match="no image of class"):
        load_dataset(saved(tmp_path / "c.npz", arrays["image"], arrays["label"] * 2))
    result = runner.invoke(
        data_app, ["show", path, "--test", test, "--sheet", str(tmp_path / "s.png")], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    for text in (
        "300 of 4x4, RGB",
        "longest 100 (shuffled: about 5)",
        "first rows are no sample",
        "0 100, 1 100, 2 100",
    ):
        assert text in result.output
    assert "100 of 300 images of edm occur in the test set held, 100 with another label" in result.output
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_puma_data_show_verifies_when_asked(tmp_path: Path) -> None:
    arrays = edm_arrays(600, 3)
    path = Path(saved(tmp_path / "edm.npz", arrays["image"], arrays["label"]))
    data = bytearray(path.read_bytes())
    data[data.find(arrays["image"].tobytes()) + 27_000] ^= 1
    path.write_bytes(data)
    assert runner.invoke(data_app, ["show", str(path), "--quiet"]).exit_code == 0
    for command in ([str(path), "--verify", "full"], [f"{path}?verify=full"]):
        assert "CRC-32" in str(runner.invoke(data_app, ["show", *command, "--quiet"]).exception)
    assert isinstance(runner.invoke(data_app, ["show", str(path), "--verify", "fast"]).exception, UsageError)


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


def test_any_source_is_written_as_npz(tmp_path: Path) -> None:
    source = load_dataset("digits?classes=3,1&subset=40")
    save_source(source, tmp_path / "out.npz")
    again = load_dataset(tmp_path / "out.npz", verify="full")
    np.testing.assert_array_equal(again.read(slice(None)), source.read(slice(None)))
    np.testing.assert_array_equal(again.labels, source.labels)
    assert again.class_names == ("3", "1")
    first = (tmp_path / "out.npz").read_bytes()
    assert save_source(source, tmp_path / "out.npz").read_bytes() == first


def test_damage_found_while_unpacking_leaves_nothing(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "edm.npz", **edm_arrays(200, 3))
    data = bytearray((tmp_path / "edm.npz").read_bytes())
    data[2000] ^= 0x55
    (tmp_path / "edm.npz").write_bytes(bytes(data))
    with pytest.raises(DataError, match="is damaged"):
        unpack_npz(tmp_path / "edm.npz", tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["edm.npz"]

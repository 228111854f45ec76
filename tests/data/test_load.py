from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.source import Source
from puma.errors import DataError, UsageError


def write_edm(path: Path, rows: int = 40, classes: int = 4, shape: tuple[int, ...] = (8, 8, 3), seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    arrays = {
        "image": rng.integers(0, 256, (rows, *shape), dtype=np.uint8),
        "label": np.sort(np.arange(rows) % classes).astype(np.int64),
    }
    np.savez(path, **arrays)
    return arrays


def test_digits_split_is_a_stratified_partition() -> None:
    train, test, both = (load_dataset(f"digits:{split}") for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (898, 899, 1797)
    counts = np.bincount(both.labels)
    for part in (train, test):
        assert np.abs(np.bincount(part.labels) - counts / 2).max() <= 0.5
    rows = {image.tobytes() for image in both.read(slice(None))}
    halves = [{image.tobytes() for image in part.read(slice(None))} for part in (train, test)]
    assert halves[0] | halves[1] == rows
    assert train.fingerprint != test.fingerprint
    assert load_dataset("digits").fingerprint == train.fingerprint
    assert train.read(slice(None)).max() == 255


def test_source_items_and_reads_agree(tmp_path: Path) -> None:
    arrays = write_edm(tmp_path / "edm.npz")
    source = load_dataset(tmp_path / "edm.npz")
    assert isinstance(source, Source)
    assert source.name == "edm"
    assert source.image_shape == (8, 8, 3)
    assert source.num_classes == 4
    rows = np.array([3, 39, 3, 0, -1])
    np.testing.assert_array_equal(source.read(rows), arrays["image"][rows])
    np.testing.assert_array_equal(source.read(slice(5, 20, 3)), arrays["image"][5:20:3])
    image, label = source[7]
    np.testing.assert_array_equal(image, arrays["image"][7])
    assert (label, source.labels.dtype, image.dtype) == (arrays["label"][7], np.int64, np.uint8)
    assert len(list(source)) == 40
    with pytest.raises(IndexError):
        source.read(np.array([40]))
    with pytest.raises(IndexError, match="not whole numbers"):
        source.read(np.array([1.0]))
    with pytest.raises(TypeError):
        source[1.0]
    assert source.read([]).shape == (0, 8, 8, 3)


def test_options_in_the_text_and_in_the_call_open_the_same_source(tmp_path: Path) -> None:
    write_edm(tmp_path / "edm.npz", shape=(8, 8, 1))
    one = load_dataset(f"{tmp_path}/edm.npz?subset=12&seed=3&classes=2,0&resize=4&channels=3")
    two = load_dataset(tmp_path / "edm.npz", subset=12, seed=3, classes=[2, 0], resize=4, channels=3)
    again = load_dataset(two.spec)
    for other in (two, again):
        assert other.fingerprint == one.fingerprint
        np.testing.assert_array_equal(other.read(slice(None)), one.read(slice(None)))
        np.testing.assert_array_equal(other.labels, one.labels)
    assert one.class_names == ("2", "0")
    assert np.bincount(one.labels).tolist() == [6, 6]
    assert one.image_shape == (4, 4, 3)
    assert load_dataset(tmp_path / "edm.npz", subset=12, seed=4).fingerprint != one.fingerprint


def test_shrinking_by_a_whole_factor_is_the_mean(tmp_path: Path) -> None:
    arrays = write_edm(tmp_path / "edm.npz")
    small = load_dataset(tmp_path / "edm.npz", resize=4).read(slice(None))
    mean = arrays["image"].reshape(40, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    assert np.abs(small - mean).max() <= 1  # Pillow rounds once per axis


def test_parquet_of_the_hugging_face_layout(cifar10_dir: Path) -> None:
    source = load_dataset(cifar10_dir / "test-00000-of-00001.parquet")
    assert (len(source), source.image_shape, source.num_classes) == (10_000, (32, 32, 3), 10)
    assert source.class_names[:2] == ("airplane", "automobile")
    rows = np.array([5, 1, 5])
    images = source.read(rows)
    np.testing.assert_array_equal(images[0], images[2])
    np.testing.assert_array_equal(images[1], source[1][0])
    assert images.std() > 20


def test_part_files_become_one_source(tmp_path: Path) -> None:
    parts = [write_edm(tmp_path / f"edm-part{number}.npz", rows=8 * number, seed=number) for number in (1, 2, 3)]
    joined = load_dataset(str(tmp_path / "edm-part*.npz"))
    images = np.concatenate([part["image"] for part in parts])
    np.testing.assert_array_equal(joined.read(slice(None)), images)
    rows = np.random.default_rng(0).integers(0, len(images), 100)
    np.testing.assert_array_equal(joined.read(rows), images[rows])
    listed = load_dataset([tmp_path / f"edm-part{number}.npz" for number in (1, 2, 3)])
    assert listed.fingerprint == joined.fingerprint
    assert load_dataset(listed.spec).fingerprint == joined.fingerprint


def test_mistakes_in_the_spec(tmp_path: Path) -> None:
    write_edm(tmp_path / "edm.npz")
    with pytest.raises(UsageError, match="unknown option of a data source 'reszie'") as caught:
        load_dataset(f"{tmp_path}/edm.npz?reszie=16")
    assert "did you mean 'resize'" in str(caught.value)
    with pytest.raises(UsageError, match="whole number"):
        load_dataset(f"{tmp_path}/edm.npz?subset=many")
    with pytest.raises(DataError, match="does not exist"):
        load_dataset(tmp_path / "other.npz")
    with pytest.raises(UsageError, match="split of digits"):
        load_dataset("digits:tset")
    with pytest.raises(UsageError, match="subset of 41"):
        load_dataset(tmp_path / "edm.npz", subset=41)
    with pytest.raises(UsageError, match="5 is no source"):
        load_dataset(5)
    with pytest.raises(UsageError, match="no source is named"):
        load_dataset([])
    with pytest.raises(UsageError, match="unknown class"):
        load_dataset(tmp_path / "edm.npz", classes="cat")


def test_pool_reads_across_its_sources(tmp_path: Path) -> None:
    arrays = [
        write_edm(tmp_path / f"{name}.npz", rows=rows, seed=rows) for name, rows in (("a", 8), ("b", 20), ("c", 12))
    ]
    sources = [load_dataset(tmp_path / f"{name}.npz") for name in "abc"]
    pool = Pool(sources)
    images = np.concatenate([part["image"] for part in arrays])
    labels = np.concatenate([part["label"] for part in arrays])
    assert isinstance(pool, Source)
    rows = np.random.default_rng(0).integers(0, 40, 200)
    np.testing.assert_array_equal(pool.read(rows), images[rows])
    np.testing.assert_array_equal(pool.labels, labels)
    for row in (0, 7, 8, 27, 28, 39, -1):
        image, label = pool[row]
        np.testing.assert_array_equal(image, images[row])
        assert label == labels[row]
    assert list(pool.source) == ["a"] * 8 + ["b"] * 20 + ["c"] * 12
    assert [pool.source[row] for row in (7, 8, -1)] == ["a", "b", "c"]
    assert np.bincount(pool.source_number).tolist() == [8, 20, 12]
    assert pool.synthetic.sum() == 32
    assert pool.describe()["sources"][1] == {"name": "b", "role": "synthetic", "rows": 20}
    assert Pool(sources, ["real", "real", "synthetic"]).fingerprint != pool.fingerprint
    assert Pool(sources).fingerprint == pool.fingerprint


def test_a_mapped_source_survives_pickling_and_threads(tmp_path: Path) -> None:
    arrays = write_edm(tmp_path / "edm.npz", rows=500)
    source = load_dataset(tmp_path / "edm.npz")
    copy = pickle.loads(pickle.dumps(source))
    rows = np.random.default_rng(0).integers(0, 500, (20, 64))
    with ThreadPoolExecutor(4) as threads:
        for one, two in zip(threads.map(copy.read, rows), rows, strict=True):
            np.testing.assert_array_equal(one, arrays["image"][two])
    assert len(pickle.dumps(source)) < arrays["image"].nbytes / 10  # the pixels stay in the file


def test_a_file_that_is_changed_while_it_is_in_use_is_an_error_and_no_signal(tmp_path: Path) -> None:
    arrays = write_edm(tmp_path / "edm.npz", rows=500)
    source = load_dataset(tmp_path / "edm.npz")
    for rows in (np.array([3]), np.arange(100, 200), np.array([499, 0, 7, 7]), np.arange(9, 3, -1), np.empty(0, int)):
        np.testing.assert_array_equal(source.read(rows), arrays["image"][rows])
    np.testing.assert_array_equal(source.read(slice(None)), arrays["image"])
    stored = pickle.dumps(source)
    os.rename(tmp_path / "edm.npz", tmp_path / "old.npz")
    np.testing.assert_array_equal(source.read(slice(None)), arrays["image"])  # replaced: the old file stays open
    os.truncate(tmp_path / "old.npz", 5000)
    for read in (lambda: source.read(slice(None)), lambda: source.read(np.array([499, 4])), lambda: source[0]):
        with pytest.raises(DataError, match="has been changed since it was opened"):
            read()
    os.rename(tmp_path / "old.npz", tmp_path / "edm.npz")
    with pytest.raises(DataError, match="has been changed since it was opened"):
        pickle.loads(stored)
    written = write_edm(tmp_path / "edm.npz", rows=500, seed=1)
    source = load_dataset(tmp_path / "edm.npz")
    write_edm(tmp_path / "edm.npz", rows=500, seed=2)  # in place, of the same size
    os.utime(tmp_path / "edm.npz", ns=(1, 1))
    with pytest.raises(DataError, match="has been changed since it was opened"):
        source.read(np.arange(len(written)))


def test_options_on_top_of_a_source_have_no_text_of_their_own() -> None:
    source = load_dataset("digits?classes=3,8")
    assert load_dataset(source).spec == source.spec
    assert load_dataset(source, subset=10).spec is None
    assert Pool("digits").fingerprint == Pool(["digits"]).fingerprint == Pool(load_dataset("digits")).fingerprint


def test_decoded_images_are_not_pickled() -> None:
    source = load_dataset("digits?resize=32&channels=3")
    images = source.read(slice(None))
    stored = pickle.dumps(source)
    assert len(stored) < images.nbytes / 20
    np.testing.assert_array_equal(pickle.loads(stored).read(slice(None)), images)


def test_objects_are_short_in_a_notebook(tmp_path: Path) -> None:
    pool = Pool(["digits", "digits:test"])
    assert repr(pool) == "<Pool 1,797: digits (real, 898), digits-test (synthetic, 899)>"
    assert "898 images 8x8x1, 10 classes" in repr(pool.sources[0])
    np.savez(
        tmp_path / "d.npz", image=np.zeros((30, 2, 2, 1), np.uint8), label=np.arange(30), classes=["<b>"] + ["x"] * 29
    )
    page = load_dataset(tmp_path / "d.npz")._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "and 10 more classes" in page
    assert len(pool._repr_html_()) < 5000


def test_reading_data_needs_no_torch() -> None:
    code = "import sys, puma.data.pool; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_pools_that_do_not_fit(tmp_path: Path) -> None:
    write_edm(tmp_path / "a.npz")
    write_edm(tmp_path / "b.npz", shape=(4, 4, 3))
    write_edm(tmp_path / "c.npz", classes=5)
    a, b, c = (load_dataset(tmp_path / f"{name}.npz") for name in "abc")
    with pytest.raises(DataError, match="b has images 4x4x3, a has 8x8x3"):
        Pool([a, b])
    with pytest.raises(DataError, match="c has 5 classes, a has 4"):
        Pool([a, c])
    np.savez(tmp_path / "d.npz", **write_edm(tmp_path / "x.npz"), classes=np.array(["cat", "dog", "ship", "frog"]))
    named = load_dataset(tmp_path / "d.npz")
    assert len(Pool([named, a])) == 80  # numbers say nothing about names
    with pytest.raises(UsageError, match="real source stands after"):
        Pool([a, a], ["synthetic", "real"])
    with pytest.raises(UsageError, match="unknown role"):
        Pool([a], ["fake"])
    with pytest.raises(UsageError, match="1 roles for 2"):
        Pool([a, a], ["real"])

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade_zip import edm_arrays
from PIL import Image

from puma.data.images import decoded
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.source import Options
from puma.errors import DataError, StorageError, UsageError

NAMES = ("cat", "dog", "ship")


def png(image: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, arrays: dict[str, Any], kind: str = "struct", **options: Any) -> Path:
    encoded = [png(image) for image in arrays["image"]]
    column = {
        "struct": lambda: pa.array([{"bytes": data, "path": None} for data in encoded]),
        "binary": lambda: pa.array(encoded, pa.binary()),
    }[kind]()
    features = {"info": {"features": {"label": {"names": list(NAMES), "_type": "ClassLabel"}}}}
    table = pa.table({"img": column, "label": pa.array(arrays["label"])})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=5, write_page_checksum=True, **options)
    return path


def write_folder(path: Path, arrays: dict[str, Any]) -> Path:
    for row, (image, label) in enumerate(zip(arrays["image"], arrays["label"], strict=True)):
        (path / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (path / NAMES[label] / f"{row:03d}.png").write_bytes(png(image))
    return path


def write_npz(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


WRITERS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "npz": lambda folder, arrays: write_npz(folder / "d.npz", arrays),
    "parquet-struct": lambda folder, arrays: write_parquet(folder / "d.parquet", arrays),
    "parquet-binary": lambda folder, arrays: write_parquet(folder / "d.parquet", arrays, "binary"),
    "folder": lambda folder, arrays: write_folder(folder / "d", arrays),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_back_what_was_written(tmp_path: Path, kind: str, channels: int) -> None:
    arrays = edm_arrays(23, 3, (6, 6, channels))
    path = WRITERS[kind](tmp_path, arrays)
    source = load_dataset(path)
    np.testing.assert_array_equal(source.read(slice(None)), arrays["image"])
    np.testing.assert_array_equal(source.labels, arrays["label"])
    rows = np.array([22, 0, 7, 7, 11])
    np.testing.assert_array_equal(load_dataset(path).read(rows), arrays["image"][rows])
    full = load_dataset(path, verify="full")
    again = load_dataset(str(full.spec))
    assert again.fingerprint == full.fingerprint
    np.testing.assert_array_equal(again.read(rows), arrays["image"][rows])
    if kind.startswith(("parquet", "folder")):
        assert source.class_names == NAMES


@pytest.mark.parametrize("kind", WRITERS)
def test_one_changed_pixel_changes_the_fully_verified_fingerprint(tmp_path: Path, kind: str) -> None:
    found = []
    for number in range(2):
        arrays = edm_arrays(23, 3, (6, 6, 3))
        arrays["image"][11, 2, 3, 1] ^= number
        (folder := tmp_path / str(number)).mkdir()
        found.append(load_dataset(WRITERS[kind](folder, arrays), verify="full").fingerprint)
    assert found[0] != found[1]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_under_another_name_keeps_its_fingerprint(tmp_path: Path, kind: str) -> None:
    arrays = edm_arrays(23, 3, (6, 6, 3))
    found = []
    for name in ("a", "b"):
        (folder := tmp_path / name).mkdir()
        found.append(load_dataset(WRITERS[kind](folder, arrays)).fingerprint)
    assert found[0] == found[1]


def test_parquet_larger_than_memory_is_decoded_once_into_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("puma.data.images.IN_MEMORY", 10)
    monkeypatch.setenv("PUMA_CACHE", str(tmp_path / "cache"))
    arrays = edm_arrays(33, 3, (6, 6, 3))
    path = write_parquet(tmp_path / "d.parquet", arrays)
    for spec, images in ((path, arrays["image"]), (f"{path}?classes=ship", arrays["image"][22:])):
        for _ in range(2):
            source = load_dataset(spec)
            for seed in range(3):
                rows = np.random.default_rng(seed).integers(0, len(images), 20)
                np.testing.assert_array_equal(source.read(rows), images[rows])
    assert caplog.text.count("decoding") == 2
    assert len(list((tmp_path / "cache" / "images").glob("*.raw"))) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StorageError, match="no space to decode 11 images") as caught:
        load_dataset(f"{path}?classes=cat").read(slice(None))
    assert "PUMA_CACHE" in caught.value.fix
    monkeypatch.setenv("PUMA_CACHE", "/proc/none")
    with pytest.raises(StorageError, match="cannot write /proc/none/images") as caught:
        load_dataset(f"{path}?classes=cat").read(slice(None))
    assert "PUMA_CACHE" in caught.value.fix


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", edm_arrays(23, 3, (6, 6, 3)), compression="none")
    good = path.read_bytes()
    at = good.find(b"IDAT") + 10
    path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(DataError, match=r"damaged|cannot be decoded"):
        load_dataset(path, verify="full")
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load_dataset(path)
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), path)
    with pytest.raises(DataError, match="no column 'img'"):
        load_dataset(path)
    pq.write_table(pa.table({"img": [b"x"], "label": [0.5]}), path)
    with pytest.raises(DataError, match="label is float64"):
        load_dataset(path)
    pq.write_table(pa.table({"img": [b"not an image"], "label": [0]}), path)
    with pytest.raises(DataError, match="row 0 cannot be decoded"):
        load_dataset(path)


def test_corrupted_parquet_is_read_right_or_refused(tmp_path: Path) -> None:
    arrays = edm_arrays(23, 3, (6, 6, 3))
    path = write_parquet(tmp_path / "d.parquet", arrays)
    good = path.read_bytes()
    pages = pq.ParquetFile(path).metadata.serialized_size + 8  # the footer has no checksum, the pages before it have
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(120):
        damaged = bytearray(good)
        place = int(rng.integers(len(good)))
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged[: rng.integers(len(good))] if number % 5 == 0 else damaged))
        try:
            source = load_dataset(path, verify="full")
            images = source.read(slice(None))
        except DataError:
            refused += 1
            continue
        if place < len(good) - pages:
            np.testing.assert_array_equal(images, arrays["image"])
            np.testing.assert_array_equal(source.labels, arrays["label"])
    assert refused > 60


def test_images_that_cannot_be_taken(tmp_path: Path) -> None:
    cases = {
        "16.png": (Image.fromarray(np.zeros((4, 4), np.uint16)), "mode I;16"),
        "alpha.png": (Image.fromarray(np.zeros((4, 4, 4), np.uint8)), "mode RGBA"),
        "cmyk.jpg": (Image.new("CMYK", (4, 4)), "mode CMYK"),
    }
    for name, (image, message) in cases.items():
        image.save(tmp_path / name)
        with pytest.raises(DataError, match=message):
            decoded((tmp_path / name).read_bytes(), name, Options())
    with pytest.raises(DataError) as caught:  # Pillow's own conversion of 16 bits cuts everything above 255
        decoded((tmp_path / "16.png").read_bytes(), "", Options())
    image = Image.fromarray(np.array([[0, 300], [32_768, 65_535]], np.uint16))
    line = str(caught.value.fix).removeprefix("scale it: ").removesuffix(" for 16 bits")
    np.testing.assert_array_equal(eval(line, {"Image": Image, "np": np, "image": image}), [[0, 1], [128, 255]])
    palette = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert("P")
    palette.save(tmp_path / "p.png")
    pixels = decoded((tmp_path / "p.png").read_bytes(), "", Options())
    np.testing.assert_array_equal(pixels, np.asarray(palette.convert("RGB")))


def test_folder_of_images_of_several_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path / "d", edm_arrays(6, 3, (6, 6, 3)))
    (tmp_path / "d" / "dog" / "large.png").write_bytes(png(np.full((12, 12, 3), 9, np.uint8)))
    with pytest.raises(DataError, match="12x12x3 among 6x6x3") as caught:
        load_dataset(tmp_path / "d").read(slice(None))
    assert "?resize=" in caught.value.fix
    assert load_dataset(tmp_path / "d", resize=3).read(slice(None)).shape == (7, 3, 3, 3)
    (tmp_path / "d" / "loose.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"loose\.png outside any class folder"):
        load_dataset(tmp_path / "d")


@pytest.mark.parametrize("grey", [0, 4], ids=["grey first", "grey later"])
@pytest.mark.parametrize("kind", ["folder", "parquet", "hub"])
def test_grey_among_rgb_opens_with_three_channels(tmp_path: Path, kind: str, grey: int) -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    images = list(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    images[grey] = images[grey][..., :1]
    arrays = {"image": images, "label": labels}
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
        rows = {"img": [{"bytes": png(image), "path": None} for image in images], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "d"))
        place = f"hf:{tmp_path}/d:train"
    else:
        place = str((write_folder if kind == "folder" else write_parquet)(tmp_path / f"d.{kind}", arrays))
    with pytest.raises(DataError, match=r"8x8x[13] among 8x8x[13]") as caught:
        load_dataset(f"{place}?resize=8").read(slice(None))
    assert "?channels=3" in caught.value.fix
    read = load_dataset(f"{place}?resize=8&channels=3").read(slice(None))
    assert read.shape == (6, 8, 8, 3)
    assert (read[grey] == read[grey, ..., :1]).all()
    alike = [np.broadcast_to(image, (16, 16, 3)).reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)) for image in images]
    assert np.abs(read - np.stack(alike)).max() <= 1
    if kind != "hub":
        assert load_dataset(f"{place}?resize=8&channels=3", verify="full").image_shape == (8, 8, 3)
    with pytest.raises((DataError, UsageError)):  # colour is never thrown away
        load_dataset(f"{place}?resize=8&channels=1").read(slice(None))


def test_folder_of_parquet_splits(tmp_path: Path) -> None:
    for name, seed in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 2)):
        write_parquet(tmp_path / f"{name}.parquet", edm_arrays(12, 3, (6, 6, 3), seed))
    with pytest.raises(UsageError, match="holds the splits test, train"):
        load_dataset(tmp_path)
    train = load_dataset(f"{tmp_path}?split=train")
    assert (len(train), train.name) == (24, f"{tmp_path.name}-train")
    assert load_dataset(train.spec).fingerprint == train.fingerprint
    assert len(load_dataset(tmp_path, split="test")) == 12


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "part 1 of .* is missing"),
        (["edm-part1", "edm-part3"], "part 2 of .* is missing"),
        (["edm_part2", "edm_part3"], "part 1 of .* is missing"),
    ],
)
def test_missing_parts_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    for seed, name in enumerate(names):
        np.savez(tmp_path / f"{name}.npz", **edm_arrays(seed=seed))
    with pytest.raises(DataError, match=message):
        load_dataset([tmp_path / f"{name}.npz" for name in names])
    with pytest.raises(DataError, match=message):
        load_dataset(str(tmp_path / "*.npz"))


def test_parts_that_overlap(tmp_path: Path) -> None:
    for name in ("edm-part1", "edm-part2"):
        np.savez(tmp_path / f"{name}.npz", **edm_arrays())
    with pytest.raises(DataError, match="edm-part2 and edm-part1 hold the same data"):
        load_dataset(str(tmp_path / "*.npz"))
    with pytest.raises(DataError, match="hold the same data"):
        load_dataset([tmp_path / "edm-part1.npz", tmp_path / "edm-part1.npz"])


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["train-00000-of-00002"], True),
        (["edm-part2"], True),
        (["edm-part1"], False),
        (["1m"], False),
    ],
)
def test_one_part_alone_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], warned: bool
) -> None:
    for name in names:
        np.savez(tmp_path / f"{name}.npz", **edm_arrays())
    with caplog.at_level(logging.WARNING, logger="puma"):
        assert len(load_dataset(tmp_path / f"{names[0]}.npz")) == 12
    assert ("one part of several" in caplog.text) == warned


def test_class_sorted_parts_may_lack_classes_that_the_whole_has(tmp_path: Path) -> None:
    arrays = edm_arrays(12, 3)
    for number, rows in enumerate((slice(0, 5), slice(5, 12)), start=1):
        np.savez(tmp_path / f"edm-part{number}.npz", image=arrays["image"][rows], label=arrays["label"][rows])
    assert load_dataset(str(tmp_path / "*.npz")).num_classes == 3
    with pytest.raises(DataError, match="no image of class 0") as caught:
        load_dataset(tmp_path / "edm-part2.npz")
    assert "?classes=1,2" in caught.value.fix
    assert load_dataset(f"{tmp_path}/edm-part2.npz?classes=1,2").class_names == ("1", "2")


IMAGES = edm_arrays()["image"]
WRONG_IMAGES = {
    "float 0-1": (IMAGES / np.float32(255), r"float32 in 0\.\.1", "images * 255"),
    "float 0-255": (IMAGES.astype(np.float64), r"float64 in 0\.\.255", "images.round()"),
    "float -1..1": (IMAGES / np.float32(127.5) - 1, r"in -1\.\.1", "127.5"),
    "normalised": (IMAGES / np.float32(50) - 2, "normalised", "before normalisation"),
    "nan": (np.full(IMAGES.shape, np.nan, np.float32), "not finite", ""),
    "NCHW": (np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)), "which is NCHW", "transpose(0, 2, 3, 1)"),
    "16-bit": (IMAGES.astype(np.uint16) * 257, "16-bit", ">> 8"),
    "int64": (IMAGES.astype(np.int64), "is int64", "astype(np.uint8)"),
    "bool": (IMAGES > 9, "is bool", "astype"),
    "no channel axis": (IMAGES[..., 0], "without a channel axis", "images[..., None]"),
    "flat": (IMAGES.reshape(12, -1), r"shape \[12, 48\]", ""),
    "four channels": (np.zeros((12, 4, 4, 4), np.uint8), "4 channels", ""),
    "no image": (IMAGES[:0], "there is no image", ""),
}


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_wrong_images_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    images, message, fix = WRONG_IMAGES[name]
    np.savez(tmp_path / "d.npz", image=images, label=np.arange(len(images)) % 3)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(tmp_path / "d.npz")
    assert fix in caught.value.fix
    assert "d.npz" in caught.value.what
    np.save(tmp_path / "d.npy", images)
    with pytest.raises(UsageError, match="no known kind") as caught:
        load_dataset(tmp_path / "d.npy")
    assert "np.savez" in caught.value.fix


LABELS = edm_arrays()["label"]
WRONG_LABELS = {
    "negative": (LABELS - 1, "label -1 at row 0 is out of range"),
    "too large": (np.where(np.arange(12) == 5, 40_000, LABELS), "label 40000 at row 5 is out of range"),
    "another length": (LABELS[:-1], "11 labels for 12 images"),
    "float": (LABELS.astype(np.float64), "is float64"),
    "one-hot": (np.eye(3, dtype=np.int64)[LABELS], "one-hot"),
    "column": (LABELS[:, None], r"shape \[12, 1\]"),
    "huge": (np.full(12, 2**64 - 1, np.uint64), "out of range"),
    "empty class": (LABELS * 2, "no image of class 1, 3"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_are_refused(tmp_path: Path, name: str) -> None:
    labels, message = WRONG_LABELS[name]
    np.savez(tmp_path / "d.npz", image=IMAGES, label=labels)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path / "d.npz")


@pytest.mark.parametrize("texts", [np.array(["cat", "a", "ox"]), np.array(["cat", "a", "ox"], dtype=object)])
def test_labels_that_are_texts_get_the_lines_that_number_them(tmp_path: Path, texts: np.ndarray) -> None:
    labels = texts[LABELS]
    with pytest.raises(DataError, match="labels is") as caught:
        load_dataset((IMAGES, labels))
    found: dict[str, Any] = {"np": np, "labels": labels}
    exec(str(caught.value.fix).removeprefix("save ").partition(" as ")[0], found)
    np.savez(tmp_path / "d.npz", image=IMAGES, label=found["labels"], class_names=found["names"])
    source = load_dataset(tmp_path / "d.npz")
    assert [source.class_names[label] for label in source.labels] == labels.tolist()


def test_labels_beyond_the_class_names(tmp_path: Path) -> None:
    arrays = edm_arrays()
    arrays["label"][3] = 3
    with pytest.raises(DataError, match=r"label 3 at row 3 is out of range") as caught:
        load_dataset(write_parquet(tmp_path / "d.parquet", arrays))
    assert "0..2" in caught.value.why


class Listed:
    """The smallest dataset there is."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.items = list(zip(images, labels, strict=True))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def test_any_python_dataset_is_a_source() -> None:
    arrays = edm_arrays()
    dataset = Listed(arrays["image"], arrays["label"].tolist())
    source = load_dataset(dataset)
    np.testing.assert_array_equal(source.read(slice(None)), arrays["image"])
    assert source.fingerprint == load_dataset(Listed(arrays["image"], arrays["label"])).fingerprint
    pictures = Listed([Image.fromarray(image) for image in arrays["image"]], arrays["label"])
    np.testing.assert_array_equal(load_dataset(pictures)[3][0], arrays["image"][3])
    assert load_dataset(dataset, resize=2, subset=6).image_shape == (2, 2, 3)
    pool = Pool([dataset, dataset])
    np.testing.assert_array_equal(pool[13][0], arrays["image"][1])
    assert source.spec is None  # another process cannot open it


def test_python_datasets_that_cannot_be_taken() -> None:
    arrays = edm_arrays()
    image, label = arrays["image"][0], 1
    wrong = {
        "in 0..255": Listed([image * 1.0], [label]),
        "in -1..1": Listed([image / 127.5 - 1], [label]),
        "8 channels": Listed([np.zeros((4, 8, 8), np.uint8)], [label]),
        "16-bit": Listed([image.astype(np.uint16)], [label]),
        "the label is 1.5": Listed([image], [1.5]),
        "is a ndarray": [image],
    }
    for message, dataset in wrong.items():
        with pytest.raises(DataError, match=message):
            Pool([dataset])
    noisy = Listed(arrays["image"], arrays["label"])
    rng = np.random.default_rng(0)

    def random_item(self: Any, index: int) -> Any:
        return rng.integers(0, 9, (4, 4, 3), np.uint8), index % 2

    noisy.__class__ = type("Noisy", (Listed,), {"__getitem__": random_item})
    with pytest.raises(DataError, match="another image each time"):
        load_dataset(noisy)
    other = Listed(arrays["image"], arrays["label"])
    other.targets = arrays["label"][::-1]
    with pytest.raises(DataError, match="targets says"):
        load_dataset(other)


def test_hugging_face_data_set_saved_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    arrays = edm_arrays(12, 3, (6, 6, 3))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"img": [Image.fromarray(image) for image in arrays["image"]], "label": arrays["label"]}
    train = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": train, "test": train.select([5, 0, 11])}).save_to_disk(str(tmp_path / "saved"))
    source = load_dataset(f"hf:{tmp_path}/saved:train")
    np.testing.assert_array_equal(source.read(slice(None)), arrays["image"])
    assert source.class_names == NAMES
    test = load_dataset(f"hf:{tmp_path}/saved:test")
    np.testing.assert_array_equal(test.read(slice(None)), arrays["image"][[5, 0, 11]])
    assert test.labels.tolist() == arrays["label"][[5, 0, 11]].tolist()
    assert load_dataset(source.spec).fingerprint == source.fingerprint != test.fingerprint
    with pytest.raises(UsageError, match=r"unknown split of .* 'val'"):
        load_dataset(f"hf:{tmp_path}/saved:val")
    assert load_dataset(f"hf:{tmp_path}/saved:train?resize=3&channels=3").image_shape == (3, 3, 3)


def test_the_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package datasets") as caught:
        load_dataset("hf:uoft-cs/cifar10:train")
    assert "puma-robust[hub]" in caught.value.fix

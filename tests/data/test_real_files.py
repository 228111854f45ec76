"""What people's own folders, files and objects look like: the right labels, or a refusal that names the option."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from handmade_zip import edm_arrays
from PIL import Image

from puma.data.checks import match_classes
from puma.data.load import load_dataset
from puma.data.pool import Pool
from puma.data.source import Source, in_memory
from puma.errors import DataError, UsageError


def picture(value: int, size: int = 6) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, np.uint8))


def folder(root: Path, names: list[str], each: int = 2, inside: str = "") -> Path:
    """Class folders; the pixels of class ``names[k]`` are k + 1."""
    for number, name in enumerate(names):
        (root / name / inside).mkdir(parents=True, exist_ok=True)
        for copy in range(each):
            picture(number + 1).save(root / name / inside / f"{copy}.png")
    return root


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Train", "Test"),
        ("training", "validation", "annotations"),
        ("train",),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("train_images", "test_images"),
        ("Training Set", "Test Set"),
        ("Training", "PublicTest", "PrivateTest"),
        ("trainA", "trainB", "testA", "testB"),
        ("my_train", "my_test"),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        folder(tmp_path / "d" / name, ["cat", "dog"])
    with pytest.raises(UsageError, match="holds the splits") as caught:
        load_dataset(tmp_path / "d")
    assert f"?split={names[0]}" in caught.value.fix
    source = load_dataset(f"{tmp_path}/d?split={names[0]}")
    assert source.class_names == ("cat", "dog")
    assert source.name in (f"d-{names[0]}", "my_train")
    assert load_dataset(source.spec).fingerprint == source.fingerprint
    with pytest.raises(UsageError, match="unknown split") as caught:
        load_dataset(f"{tmp_path}/d?split=trian")
    assert names[0] in caught.value.fix


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    for number, names in enumerate([["bus", "car", "train"], ["freight train", "passenger train"]]):
        assert load_dataset(folder(tmp_path / str(number), names)).class_names == tuple(names)


def test_whole_numbers_are_classes_in_the_order_of_numbers(tmp_path: Path) -> None:
    names = [str(number) for number in range(11)]
    source = load_dataset(folder(tmp_path / "d", names))
    assert source.class_names == tuple(names)
    assert (source.read(slice(None))[:, 0, 0, 0] == source.labels + 1).all()
    padded = load_dataset(folder(tmp_path / "p", [f"{number:02d}" for number in range(11)]))
    np.savez(tmp_path / "d.npz", image=np.zeros((11, 6, 6, 3), np.uint8), label=np.arange(11))
    pool = Pool([source, load_dataset(tmp_path / "d.npz"), padded])
    assert pool.labels.tolist() == [*source.labels, *range(11), *source.labels]


def test_numbered_names_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"class_{number}" for number in range(11)]
    source = load_dataset(folder(tmp_path / "d", names))
    assert source.class_names == tuple(names)
    assert (source.read(slice(None))[:, 0, 0, 0] == source.labels + 1).all()


def test_images_that_cannot_be_reached_are_an_error_and_not_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", ["cat", "dog"])
    (root / "dog" / "2.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"cannot read .*2\.png"):
        load_dataset(root)


def test_numbers_that_do_not_begin_at_0_are_names(tmp_path: Path) -> None:
    from_one = load_dataset(folder(tmp_path / "d", [str(number) for number in range(1, 11)]))
    np.savez(tmp_path / "d.npz", image=np.zeros((10, 6, 6, 3), np.uint8), label=np.arange(10))
    for sources in ([from_one, tmp_path / "d.npz"], [tmp_path / "d.npz", from_one]):
        with pytest.raises(DataError, match="has classes that"):
            Pool(sources)
    some = load_dataset(folder(tmp_path / "s", ["2", "9"]))
    assert Pool([from_one, some]).labels[-4:].tolist() == [1, 1, 8, 8]


@pytest.mark.parametrize(
    "names",
    [["1.0", "2.0", "10.0"], ["-1", "0", "1"], ["0", "2", "x"], ["0x0", "0x2", "0x10"]],
    ids=["decimal", "negative", "mixed", "hexadecimal"],
)
def test_numbers_of_any_form_are_never_taken_by_place(tmp_path: Path, names: list[str]) -> None:
    source = load_dataset(folder(tmp_path / "d", names))
    assert source.class_names == tuple(names)
    np.savez(tmp_path / "d.npz", image=np.zeros((3, 6, 6, 3), np.uint8), label=np.arange(3))
    with pytest.raises(DataError, match="has classes that"):
        Pool([source, load_dataset(tmp_path / "d.npz")])


@pytest.mark.parametrize("asked", ["1", "²", "१"])
def test_classes_that_are_numbers_are_chosen_by_name(tmp_path: Path, asked: str) -> None:
    root = folder(tmp_path / "d", ["10", "20", "30"])
    assert load_dataset(f"{root}?classes=30,10").class_names == ("30", "10")
    with pytest.raises(UsageError, match="unknown class"):
        load_dataset(f"{root}?classes={asked}")


def test_what_is_no_regular_file_is_refused_and_linked_folders_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path / "d", ["cat", "dog"])
    (root / "cat" / "more").symlink_to(root / "dog")
    assert len(load_dataset(root)) == 4
    assert "linked folders are not followed, as more" in caplog.text
    os.mkfifo(root / "cat" / "pipe.png")
    (tmp_path / "d.npz").symlink_to("/dev/zero")  # as long as memory lasts
    for place in (root, tmp_path / "d.npz"):
        with pytest.raises(DataError, match="is no regular file"):
            load_dataset(place)
    with pytest.raises(DataError, match=r"cannot read a+\n.*too long"):
        load_dataset("a" * 5000)


def test_one_class_and_annotations_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path / "val", ["images"])
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png n01")
    assert load_dataset(tmp_path / "val").num_classes == 1
    assert "single class" in caplog.text
    assert "val_annotations.txt" in caplog.text


def test_what_systems_leave_behind_is_skipped_and_other_pictures_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = folder(tmp_path / "d", ["cat", "dog"], inside="images")
    for place in ("__MACOSX/cat", ".ipynb_checkpoints", "cat/.ipynb_checkpoints", "dog/__MACOSX"):
        (root / place).mkdir(parents=True)
        picture(99).save(root / place / "x.png")
    (root / "cat" / "._0.png").write_bytes(b"junk")
    (root / "dog" / "notes.txt").write_text("boxes")
    source = load_dataset(root)
    assert (source.class_names, source.labels.tolist()) == (("cat", "dog"), [0, 0, 1, 1])
    assert caplog.text == ""
    (root / "dog" / "3.avif").write_bytes(b"?")
    load_dataset(root)
    assert "1 images of other kinds are left out, as 3.avif" in caplog.text


def test_a_damaged_image_is_named_by_its_path(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", ["cat", "dog"])
    (root / "dog" / "1.png").write_bytes((root / "dog" / "1.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"dog/1\.png cannot be decoded"):
        load_dataset(root).read(slice(None))


def test_only_formats_that_are_images_are_opened(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", ["cat", "dog"])
    proof = tmp_path / "proof"
    program = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n({proof}) (w) file closefile\nshowpage\n"
    (root / "cat" / "0.png").write_text(program)
    with pytest.raises(DataError, match="cannot be decoded"):
        load_dataset(root)
    table = pa.table({"img": [program.encode()], "label": [0]})
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="cannot be decoded"):
        load_dataset(tmp_path / "d.parquet")
    assert not proof.exists()


def forged_png(side: int) -> bytes:
    """A PNG of a few bytes whose header claims ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [7000, 5000, 100_000, 2**31 - 1])
def test_images_of_millions_of_pixels_are_refused_from_their_headers(tmp_path: Path, side: int) -> None:
    root = folder(tmp_path / "d", ["cat", "dog"], each=20)
    for spec, first in (("d", False), ("d", True)):
        for place in sorted((root / "cat").iterdir())[not first :]:
            place.write_bytes(forged_png(side))
        tracemalloc.start()
        started = time.process_time()
        with pytest.raises(DataError, match=rf"{side}x{side} pixels|an image of {side}x{side}|cannot be decoded"):
            load_dataset(tmp_path / spec).read(slice(None))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()
        assert time.process_time() - started < 1


# --- options ---------------------------------------------------------------------------------------------------------


def test_every_option_is_used_or_refused(tmp_path: Path) -> None:
    assert load_dataset("digits?split=test").fingerprint == load_dataset("digits:test").fingerprint
    np.savez(tmp_path / "d.npz", **edm_arrays())
    pq.write_table(pa.table({"img": [png(picture(1))], "label": [0]}), tmp_path / "d.parquet")
    folder(tmp_path / "d", ["cat", "dog"])
    for spec in (
        "digits:test?split=train",
        "digits?label=fine_label",
        f"{tmp_path}/d.npz?split=train",
        f"{tmp_path}/d.parquet?split=train",
        f"{tmp_path}/d?label=x",
        f"{tmp_path}/d?split=train",
        f"{tmp_path}/d.npz?seed=3",
        "cifar10:train?split=test",
    ):
        with pytest.raises(UsageError, match=r"not used|two splits|one split|unknown split"):
            load_dataset(spec)
    with pytest.raises(UsageError, match="not used"):
        load_dataset((np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1]), split="train")
    arrays = {
        "train_images": np.zeros((4, 8, 8, 3), np.uint8),
        "train_labels": [0, 1, 0, 1],
        "fine_labels": [1, 0, 1, 0],
    }
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UsageError, match="unknown label column"):
        load_dataset(f"{tmp_path}/s.npz?split=train&label=fine_labels")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("subset", np.float32(20.5), "not a whole number"),
        ("subset", Fraction(41, 2), "not a whole number"),
        ("subset", True, "not a whole number"),
        ("split", 3, "not a text"),
        ("verify", True, "not a text"),
        ("classes", 12, "unknown class '12'"),
    ],
)
def test_values_of_options_that_mean_nothing_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_dataset("digits", **{name: value})


def test_values_of_options_of_every_type() -> None:
    assert load_dataset("digits", classes=None, split=None).class_names == tuple("0123456789")
    assert load_dataset("digits", classes=np.array([7, 3]), subset=np.int16(20)).class_names == ("7", "3")
    assert load_dataset("digits", subset=Fraction(40, 2)).fingerprint == load_dataset("digits?subset=20").fingerprint


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_one_of_one_is_complete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("test-00000-of-00001", "train-00001-of-00001", "data-0-of-1", "a-00000-of-00001-0123456789abcdef"):
        pq.write_table(pa.table({"img": [png(picture(1))] * 2, "label": [0, 1]}), tmp_path / f"{name}.parquet")
        assert len(load_dataset(tmp_path / f"{name}.parquet")) == 2
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["parquet", "hub", "npz"])
def test_two_label_columns_have_to_be_chosen(tmp_path: Path, kind: str) -> None:
    fine, coarse = np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])
    images = [png(picture(value)) for value in range(4)]
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {
                "img": datasets.Image(),
                "fine_label": datasets.ClassLabel(names=list("abcd")),
                "coarse_label": datasets.ClassLabel(names=list("xy")),
            }
        )
        rows = {"img": [{"bytes": data, "path": None} for data in images], "fine_label": fine, "coarse_label": coarse}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "d"))
        place = f"hf:{tmp_path}/d:train"
    elif kind == "parquet":
        place = str(tmp_path / "d.parquet")
        pq.write_table(pa.table({"img": images, "fine_label": fine, "coarse_label": coarse}), place)
    else:
        place = str(tmp_path / "d.npz")
        np.savez(place, image=np.zeros((4, 6, 6, 3), np.uint8), label=fine, y=coarse)
    first, second = ("label", "y") if kind == "npz" else ("fine_label", "coarse_label")
    with pytest.raises(UsageError, match="several label columns") as caught:
        load_dataset(place)
    assert "?label=" in caught.value.fix
    assert load_dataset(f"{place}?label={first}").labels.tolist() == fine.tolist()
    source = load_dataset(f"{place}?label={second}")
    assert source.labels.tolist() == coarse.tolist()
    assert load_dataset(source.spec).labels.tolist() == coarse.tolist()
    with pytest.raises(UsageError, match="unknown label column"):
        load_dataset(f"{place}?label=finelabel")


# --- classes by name -------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = load_dataset(folder(tmp_path / "train", ["bird", "cat", "dog"]))
    part = load_dataset(folder(tmp_path / "test", ["cat", "dog"]))
    assert match_classes(part, ("cat", "dog", "emu"), "the model") is part
    assert caplog.text == ""
    matched = match_classes(part, whole.class_names, "the model")
    assert (matched.labels.tolist(), matched.class_names) == ([1, 1, 2, 2], ("bird", "cat", "dog"))
    assert "cat 0 -> 1, dog 1 -> 2" in caplog.text
    assert matched.fingerprint not in (part.fingerprint, whole.fingerprint)
    assert Pool([whole, part]).labels.tolist() == [0, 0, 1, 1, 2, 2, 1, 1, 2, 2]
    with pytest.raises(DataError, match="test has classes that the model does not have: dog") as caught:
        match_classes(part, ("bird", "cat"), "the model")
    assert "?classes=cat" in caught.value.fix
    np.savez(tmp_path / "d.npz", image=np.zeros((3, 6, 6, 3), np.uint8), label=[0, 1, 2])
    anonymous = load_dataset(tmp_path / "d.npz")
    assert match_classes(anonymous, whole.class_names, "the model") is anonymous
    pool = Pool([anonymous, whole, part])
    assert (pool.class_names, pool.labels[-1]) == (("bird", "cat", "dog"), 2)
    with pytest.raises(DataError, match="d has 3 classes, the model has 2"):
        match_classes(anonymous, ("cat", "dog"), "the model")


@pytest.mark.parametrize(
    ("wanted", "own", "labels"),
    [
        (["cat", "dog", "frog"], ["cat", "dog", "frog"], [0, 1, 2]),
        (["cat", "dog", "frog"], ["cat", "dog"], [0, 1]),
        (["cat", "dog", "frog"], ["dog", "frog"], [1, 2]),
        (["cat", "dog", "frog"], ["frog", "cat"], [2, 0]),
        (["cat", "dog"], ["0", "1"], [0, 1]),
        (["0", "1"], ["cat", "dog"], [0, 1]),
        (list("0123456789"), ["0", "1", "7"], [0, 1, 7]),
        (list("123456789"), ["1", "07"], [0, 6]),
        (list("123456789"), ["1.0", "7.0"], [0, 6]),
    ],
)
def test_labels_after_classes_were_matched(wanted: list[str], own: list[str], labels: list[int]) -> None:
    images = in_memory(np.zeros((len(own), 2, 2, 1), np.uint8))
    source = Source(images, np.arange(len(own)), name="own", fingerprint="0", class_names=own)
    assert match_classes(source, wanted, "the model").labels.tolist() == labels


# --- Python objects --------------------------------------------------------------------------------------------------

ARRAYS = edm_arrays(12, 3, (5, 7, 3))
IMAGES, LABELS = ARRAYS["image"], ARRAYS["label"]
NCHW = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "images",
    [IMAGES, NCHW, torch.from_numpy(IMAGES), torch.from_numpy(NCHW), torch.from_numpy(NCHW) / 255, NCHW / 255],
    ids=["NHWC", "NCHW", "tensor NHWC", "tensor NCHW", "float tensor", "float64 NCHW"],
)
@pytest.mark.parametrize("labels", [LABELS, LABELS.tolist(), torch.from_numpy(LABELS)], ids=["array", "list", "tensor"])
def test_arrays_and_tensors(images: Any, labels: Any, caplog: pytest.LogCaptureFixture) -> None:
    source = load_dataset((images, labels))
    np.testing.assert_array_equal(source.read(slice(None)), IMAGES)
    assert source.labels.tolist() == LABELS.tolist()
    assert source.fingerprint == load_dataset((IMAGES, LABELS)).fingerprint
    assert caplog.text == ""
    pairs = load_dataset(list(zip(images, labels, strict=True)))
    np.testing.assert_array_equal(pairs.read(slice(None)), IMAGES)


def test_arrays_that_cannot_be_taken(caplog: pytest.LogCaptureFixture) -> None:
    rounded = load_dataset((torch.full((4, 3, 5, 5), 0.31), [0, 1, 0, 1]))
    assert rounded[0][0].max() == round(0.31 * 255)
    assert "rounded" in caplog.text
    grey = load_dataset((IMAGES[..., 0], LABELS))
    assert grey.image_shape == (5, 7, 1)
    for images, message in (
        (torch.randn(12, 3, 5, 5), "normalised|-1"),
        (NCHW.astype(np.float32), r"0\.\.255"),
        (np.full((12, 5, 5, 3), np.nan), "not finite"),
        (IMAGES.astype(np.int64), "int64"),
        (IMAGES[:3], "12 labels for 3 images"),
    ):
        with pytest.raises(DataError, match=message):
            load_dataset((images, LABELS))
    with pytest.raises(UsageError, match="is no source"):
        load_dataset(iter([(IMAGES[0], 1)]))


class ToTensorLike:
    """What a torchvision dataset with ``ToTensor`` gives: float32 CHW in [0, 1], and ``targets`` and ``classes``."""

    classes = ("cat", "dog", "ship")

    def __init__(self) -> None:
        self.targets = LABELS.tolist()

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(IMAGES[index]).permute(2, 0, 1).float().div(255), self.targets[index]


def test_a_torchvision_dataset_with_to_tensor() -> None:
    source = load_dataset(ToTensorLike())
    np.testing.assert_array_equal(source.read(slice(None)), IMAGES)
    assert source.class_names == ("cat", "dog", "ship")
    subset = load_dataset(torch.utils.data.Subset(ToTensorLike(), [11, 5, 0]))  # type: ignore[arg-type]
    np.testing.assert_array_equal(subset.read(slice(None)), IMAGES[[11, 5, 0]])
    assert subset.class_names == source.class_names
    parts = [torch.utils.data.Subset(ToTensorLike(), rows) for rows in (range(6), range(6, 12))]  # type: ignore[arg-type,var-annotated]
    assert load_dataset(torch.utils.data.ConcatDataset(parts)).class_names == source.class_names
    other = ToTensorLike()
    other.classes = ("dog", "cat", "ship")  # type: ignore[misc]
    with pytest.raises(DataError, match="number their classes differently") as caught:
        load_dataset(torch.utils.data.ConcatDataset([parts[0], other]))  # type: ignore[list-item]
    assert "puma.Pool" in caught.value.fix


@pytest.mark.parametrize("mode", ["P", "1", "L"])
def test_pillow_modes_are_converted_as_those_of_files(tmp_path: Path, mode: str) -> None:
    pictures = [Image.fromarray(image).convert(mode) for image in IMAGES[:4]]
    for number, image in enumerate(pictures):
        (tmp_path / "d" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "d" / "ab"[number % 2] / f"{number}.png")
    source = load_dataset([(image, number % 2) for number, image in enumerate(pictures)])
    np.testing.assert_array_equal(source.read(np.array([0, 2, 1, 3])), load_dataset(tmp_path / "d").read(slice(None)))
    with pytest.raises(DataError, match="mode RGBA"):
        load_dataset([(pictures[0].convert("RGBA"), 0)])


def test_augmentation_that_was_left_in_is_found() -> None:
    class Augmented(ToTensorLike):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = super().__getitem__(index)
            return image.flip(2) if index > 0 and torch.rand(()) < 0.5 else image, label

    torch.manual_seed(0)
    with pytest.raises(DataError, match="each time it is read"):
        load_dataset(Augmented())

    class EveryEpoch(ToTensorLike):
        reads = 0

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            self.reads += 1
            image, label = super().__getitem__(index)
            return image.flip(2) if self.reads > 2 * len(self) + 1 else image, label

    with pytest.raises(DataError, match="each time it is read"):
        load_dataset(EveryEpoch())


def test_an_item_that_cannot_be_read_is_named() -> None:
    class Broken(ToTensorLike):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            raise ZeroDivisionError("own")

    with pytest.raises(DataError, match=r"item 0 cannot be read\n.*ZeroDivisionError: own"):
        load_dataset(Broken())


def test_hugging_face_objects() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [Image.fromarray(image) for image in IMAGES], "label": LABELS}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.set_transform(lambda batch: {**batch, "label": [0] * len(batch["label"])})
    source = load_dataset(table)
    np.testing.assert_array_equal(source.read(slice(None)), IMAGES)
    assert (source.labels.tolist(), source.class_names) == (LABELS.tolist(), ("a", "b", "c"))
    assert len(Pool([table, table.select(range(6))])) == 18
    plain = {"img": [{"bytes": png(image), "path": ""} for image in rows["image"]], "label": LABELS}
    np.testing.assert_array_equal(load_dataset(datasets.Dataset.from_dict(plain)).read(slice(None)), IMAGES)
    with pytest.raises(DataError, match="has no image column") as none:
        load_dataset(datasets.Dataset.from_dict({"img": [png(image) for image in rows["image"]], "label": LABELS}))
    assert "cast_column(NAME, datasets.Image())" in none.value.fix
    both = datasets.DatasetDict({"train": table, "test": table})
    with pytest.raises(UsageError, match="holds the splits train, test") as several:
        load_dataset(both)
    assert 'split="train"' in several.value.fix
    assert len(load_dataset(both, split="test")) == 12
    with pytest.raises(UsageError, match="is a stream"):
        load_dataset(table.with_format(None).to_iterable_dataset())
    with pytest.raises(UsageError, match="DataLoader object") as loader:
        load_dataset(torch.utils.data.DataLoader([(IMAGES[0], 0)]))
    assert loader.value.fix == "give loader.dataset"


# --- the files that authors publish ----------------------------------------------------------------------------------

CIFAR = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
CHW = CIFAR.transpose(0, 3, 1, 2).reshape(20, 3072)
TEN, FINE = np.arange(20) % 10, np.arange(20)


def cifar_python(root: Path, fine: bool) -> Path:
    root = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    root.mkdir()
    names = {f"{FINE[k]}": k for k in range(20)}
    if fine:
        content: dict[str, Any] = {
            "train": {"data": CHW, "fine_labels": FINE.tolist(), "coarse_labels": (FINE // 5).tolist()},
            "meta": {"fine_label_names": [f"f{k}" for k in names.values()], "coarse_label_names": list("wxyz")},
        }
    else:
        content = {f"data_batch_{k + 1}": {"data": CHW[k::5], "labels": TEN[k::5].tolist()} for k in range(5)}
        content["batches.meta"] = {"label_names": list("abcdefghij")}
        content["test_batch"] = {"data": CHW[:10], "labels": TEN[:10].tolist()}
    for name, value in content.items():
        (root / name).write_bytes(pickle.dumps(value, protocol=2))
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_python_archives(tmp_path: Path, packed: bool) -> None:
    place = cifar_python(tmp_path, fine=False)
    hundred = cifar_python(tmp_path, fine=True)
    if packed:
        with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.add(place, place.name)
        place = tmp_path / "cifar-10-python.tar.gz"
    order = np.concatenate([np.arange(20)[k::5] for k in range(5)])
    train = load_dataset(f"{place}?split=train")
    np.testing.assert_array_equal(train.read(slice(None)), CIFAR[order])
    assert (train.labels.tolist(), train.class_names) == (TEN[order].tolist(), tuple("abcdefghij"))
    assert len(load_dataset(f"{place}?split=test")) == 10
    with pytest.raises(UsageError, match="splits train, test"):
        load_dataset(place)
    with pytest.raises(UsageError, match="several label columns"):
        load_dataset(f"{hundred}?split=train")
    assert load_dataset(f"{hundred}?split=train&label=fine_label").class_names[3] == "f3"
    assert load_dataset(f"{hundred}?split=train&label=coarse_label").labels.tolist() == (FINE // 5).tolist()


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_no_pickle_runs_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = cifar_python(tmp_path, fine=False)
    (place / "test_batch").write_bytes(pickle.dumps({"data": Harmful(), "labels": [0]}))
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_dataset(f"{place}?split=test")
    assert "which is not run" in caught.value.why
    assert not (tmp_path / "harm").exists()


def test_cifar_binary_archives(tmp_path: Path) -> None:
    (ten := tmp_path / "cifar-10-batches-bin").mkdir()
    (ten / "test_batch.bin").write_bytes(np.column_stack([TEN.astype(np.uint8), CHW]).tobytes())
    (ten / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    source = load_dataset(f"{ten}?split=test")
    np.testing.assert_array_equal(source.read(slice(None)), CIFAR)
    assert (source.labels.tolist(), source.class_names[9]) == (TEN.tolist(), "j")
    (hundred := tmp_path / "cifar-100-binary").mkdir()
    records = np.column_stack([(FINE // 5).astype(np.uint8), FINE.astype(np.uint8), CHW])
    (hundred / "train.bin").write_bytes(records.tobytes())
    assert load_dataset(f"{hundred}?split=train&label=fine_label").labels.tolist() == FINE.tolist()
    (ten / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(f"{ten}?split=test")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path: Path, ending: str) -> None:
    grey = CIFAR[..., 0]
    for name in ("train", "t10k"):
        for kind, array in (("images-idx3", grey), ("labels-idx1", TEN.astype(np.uint8))):
            data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            path = tmp_path / f"{name}-{kind}-ubyte{ending}"
            path.write_bytes(gzip.compress(data) if ending else data)
    source = load_dataset(tmp_path / f"train-images-idx3-ubyte{ending}")
    np.testing.assert_array_equal(source.read(slice(None))[..., 0], grey)
    assert source.labels.tolist() == TEN.tolist()
    assert load_dataset(f"{tmp_path}?split=test").name.endswith("-test")
    with pytest.raises(UsageError, match="splits test, train"):
        load_dataset(tmp_path)
    path = tmp_path / f"train-labels-idx1-ubyte{ending}"
    path.write_bytes((gzip.compress if ending else bytes)(b"\0\0\x08\1\x7f\xff\xff\xff" + bytes(1 << 20)))
    with pytest.raises(DataError, match="no idx file"):
        load_dataset(tmp_path / f"train-images-idx3-ubyte{ending}")
    path.write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\x20abc") if ending else b"\0\0\x08\1\0\0\0\x20abc")
    with pytest.raises(DataError, match="is damaged"):
        load_dataset(tmp_path / f"train-images-idx3-ubyte{ending}")


def test_names_of_idx_files(tmp_path: Path) -> None:
    """EMNIST's, whose split stands inside the name; of two data sets in one folder none is taken silently."""
    for name, count in (("emnist-letters-train", 20), ("emnist-letters-test", 5), ("emnist-digits-test", 3)):
        for kind, array in (("images-idx3", CIFAR[:count, ..., 0]), ("labels-idx1", np.zeros(count, np.uint8))):
            data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            (tmp_path / f"{name}-{kind}-ubyte").write_bytes(data)
        if count == 5:
            assert [len(load_dataset(f"{tmp_path}?split={split}")) for split in ("train", "test")] == [20, 5]
    with pytest.raises(UsageError, match="holds several data sets"):
        load_dataset(f"{tmp_path}?split=test")


def test_svhn(tmp_path: Path) -> None:
    from scipy.io import savemat

    labels = np.arange(1, 21) % 10
    savemat(
        tmp_path / "train_32x32.mat", {"X": CIFAR.transpose(1, 2, 3, 0), "y": np.where(labels, labels, 10)[:, None]}
    )
    source = load_dataset(tmp_path / "train_32x32.mat")
    np.testing.assert_array_equal(source.read(slice(None)), CIFAR)
    assert (source.labels.tolist(), source.name) == (labels.tolist(), "svhn-train")
    for wrong in (np.arange(1, 21)[:, None], labels + 0.5):
        savemat(tmp_path / "test_32x32.mat", {"X": CIFAR.transpose(1, 2, 3, 0), "y": wrong})
        with pytest.raises(DataError, match="the labels reach from"):
            load_dataset(tmp_path / "test_32x32.mat")
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB 5.0 not")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(tmp_path / "test_32x32.mat")


def test_medmnist_npz(tmp_path: Path) -> None:
    arrays = {"train_images": CIFAR[..., 0], "train_labels": TEN[:, None].astype(np.uint8)}
    arrays |= {name.replace("train", "test"): array[:10] for name, array in arrays.items()}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "d.npz", **arrays)
        source = load_dataset(f"{tmp_path}/d.npz?split=train", verify="full")
        np.testing.assert_array_equal(source.read(slice(None))[..., 0], CIFAR[..., 0])
        assert source.labels.tolist() == TEN.tolist()
        assert len(load_dataset(f"{tmp_path}/d.npz?split=test")) == 10
        with pytest.raises(UsageError, match="splits test, train"):
            load_dataset(tmp_path / "d.npz")


def test_sample_files_of_guided_diffusion(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", CIFAR, TEN)
    source = load_dataset(tmp_path / "samples.npz")
    np.testing.assert_array_equal(source.read(slice(None)), CIFAR)
    assert source.labels.tolist() == TEN.tolist()
    np.savez(tmp_path / "samples.npz", CIFAR)
    with pytest.raises(DataError, match="no column 'label'"):
        load_dataset(tmp_path / "samples.npz")


def test_webdataset_tars_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of docs/data.md, and the spec of the command line."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"shard-{shard}.tar", "w") as archive:
            for row in range(10 * shard, 10 * shard + 10):
                for ending, data in (("png", png(Image.fromarray(CIFAR[row]))), ("cls", str(TEN[row]).encode())):
                    info = tarfile.TarInfo(f"{row:05d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    table = datasets.load_dataset("webdataset", data_files="shards/*.tar", split="train")
    for source in (load_dataset(table), load_dataset("hf:./shards")):
        np.testing.assert_array_equal(source.read(slice(None)), CIFAR)
        assert source.labels.tolist() == TEN.tolist()
    with pytest.raises(UsageError, match="of no known kind") as caught:
        load_dataset("shards/shard-0.tar")
    assert "hf:./FOLDER" in caught.value.fix


# --- names -----------------------------------------------------------------------------------------------------------


def test_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.delenv("PUMA_DATA", raising=False)
    for name in ("cifar10", "cifar100", "svhn", "imagenet"):
        with pytest.raises(DataError, match=f"{name} is not on this machine") as caught:
            load_dataset(name)
        assert "hf download" in caught.value.fix
        assert str(tmp_path) in caught.value.why
    with pytest.raises(DataError, match="edm-cifar10-1m is not on this machine") as caught:
        load_dataset("edm-cifar10-1m")
    assert "resolve/main/cifar10/1m.npz" in caught.value.fix
    assert "sha256" in caught.value.why
    with pytest.raises(DataError, match="does not exist") as caught:
        load_dataset("cifar01")
    assert "did you mean 'cifar10'" in caught.value.fix
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.setenv("PUMA_DATA", str(store))
    cifar_python(store, fine=False)
    cifar_python(store, fine=True)
    test = load_dataset("cifar10:test")
    assert (len(test), len(load_dataset("cifar10")), len(load_dataset("CIFAR10?split=test"))) == (10, 20, 10)
    assert load_dataset("cifar100").class_names[0] == "f0"
    monkeypatch.delenv("PUMA_DATA")
    assert load_dataset(test.spec).fingerprint == test.fingerprint
    monkeypatch.setenv("PUMA_DATA", str(store))
    for split in ("train", "val"):
        folder(store / "imagenet" / split, ["n01", "n02"])
    assert load_dataset("imagenet:val").class_names == ("n01", "n02")
    np.savez(store / "edm-cifar10-1m.npz", **edm_arrays())
    assert len(load_dataset("edm-cifar10-1m?subset=6")) == 6


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_name_where_its_own_download_command_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """``hf download --local-dir NAME`` keeps the repository's folders: NAME/CONFIG/SPLIT-00000-of-00001.parquet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PUMA_DATA", raising=False)
    config = tmp_path / name / ("plain_text" if name == "cifar10" else "cifar100")
    config.mkdir(parents=True)
    (tmp_path / name / "README.md").write_text("a card")
    labels = [0, 1, 0] if name == "cifar10" else {"fine_label": [0, 1, 0], "coarse_label": [0, 0, 0]}
    columns = {"label": labels} if name == "cifar10" else labels
    for split, seed in (("train", 1), ("test", 2)):
        images = [{"bytes": png(picture(3 * seed + row)), "path": None} for row in range(3)]
        pq.write_table(pa.table({"img": images, **columns}), config / f"{split}-00000-of-00001.parquet")
    train, test = load_dataset(name), load_dataset(f"{name}:test")
    assert (len(train), test.name, train.num_classes) == (3, f"{name}-test", 2)
    assert train.fingerprint != test.fingerprint
    monkeypatch.setenv("PUMA_DATA", str(tmp_path))  # the second half of the command, from anywhere
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_dataset(name).fingerprint == train.fingerprint


def test_a_folder_of_that_name_without_splits_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "cifar10", ["cat", "dog"])
    assert load_dataset("cifar10").class_names == ("cat", "dog")


def test_a_name_that_the_hub_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setenv("PUMA_DATA", str(tmp_path))
    with pytest.raises(DataError, match="hf:uoft-cs/cifar100:test cannot be opened") as caught:
        load_dataset("cifar100:test?label=coarse_label")
    assert "no network" in caught.value.why
    assert "hf download uoft-cs/cifar100" in caught.value.fix


@pytest.mark.parametrize(
    ("words", "code", "fact", "command"),
    [
        (
            "data show cifar10",
            3,
            "hf:uoft-cs/cifar10:train cannot be opened",
            "hf download uoft-cs/cifar10 --repo-type dataset",
        ),
        ("score hf:me/model digits --out m", 4, "cannot load hf:me/model", "hf download me/model"),
    ],
)
def test_without_network_the_answer_comes_in_seconds_and_has_the_command(
    tmp_path: Path, words: str, code: int, fact: str, command: str
) -> None:
    """In a process of its own: the hub's packages remember that they are offline."""
    pytest.importorskip("datasets")
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}  # nothing answers there
    proxies = {"PUMA_DATA", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
    environment = {key: value for key, value in os.environ.items() if key not in proxies} | offline
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "puma", *words.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == code, result.stderr
    assert time.monotonic() - began < 60  # 3 s on an idle machine; the hub's own retries take minutes
    assert fact in result.stderr
    assert command in result.stderr
    assert "Traceback" not in result.stderr


def test_real_cifar10_by_name(cifar10_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUMA_DATA", str(cifar10_dir.parent))
    source = load_dataset("cifar10:test")
    assert (len(source), source.class_names[3], source.name) == (10_000, "cat", "cifar10-test")

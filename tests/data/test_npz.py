from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade_zip import Entry, edm_arrays, npy_bytes, npy_header, write_zip
from hypothesis import given, settings
from hypothesis import strategies as st

from puma.data.load import load_dataset
from puma.errors import DataError


def save(path: Path, entries: list[Entry], **options: Any) -> Path:
    path.write_bytes(write_zip(entries, **options))
    return path


def edm_entries(**options: Any) -> list[Entry]:
    return [Entry(f"{name}.npy", npy_bytes(array), **options) for name, array in edm_arrays().items()]


extras = st.binary(max_size=40).map(lambda data: struct.pack("<HH", 0xCAFE, len(data)) + data) | st.just(b"")


@given(
    rows=st.integers(2, 30),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3])),
    label_type=st.sampled_from(["<i8", ">i8", "<i4", ">i2", "u1", "<u8"]),
    deflate=st.booleans(),
    zip64=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    local_extra=extras,
    central_extra=extras,
    comment=st.binary(max_size=30).filter(lambda data: b"PK" not in data),
    others=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_every_way_of_writing_an_npz_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    shape: tuple[int, int, int],
    label_type: str,
    deflate: bool,
    zip64: bool,
    version: tuple[int, int],
    local_extra: bytes,
    central_extra: bytes,
    comment: bytes,
    others: int,
    seed: int,
) -> None:
    arrays = edm_arrays(rows, min(rows, 3), shape, seed)
    written = {"image": arrays["image"], "label": arrays["label"].astype(label_type)}
    written |= {f"other{number}": np.arange(number) for number in range(others)}
    options: dict[str, Any] = {"zip64": zip64, "local_extra": local_extra, "central_extra": central_extra}
    entries = [
        Entry(f"{name}.npy", npy_bytes(array, version=version), deflate=deflate, **options)
        for name, array in np.random.default_rng(seed).permutation(np.array([*written.items()], dtype=object))
    ]
    path = save(tmp_path_factory.mktemp("npz") / "edm.npz", entries, comment=comment)
    with np.load(path) as ours:  # numpy agrees that the hand-made file is what it should be
        np.testing.assert_array_equal(ours["image"], arrays["image"])
    source = load_dataset(path, verify="full")
    np.testing.assert_array_equal(source.read(slice(None)), arrays["image"])
    np.testing.assert_array_equal(source.labels, arrays["label"])
    picked = np.random.default_rng(seed).integers(0, rows, 7)
    np.testing.assert_array_equal(source.read(picked), arrays["image"][picked])


def test_savez_and_savez_compressed_have_one_fingerprint(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **edm_arrays())
    np.savez_compressed(tmp_path / "b.npz", **edm_arrays())
    np.savez(tmp_path / "c.npz", **edm_arrays(seed=1))
    a, b, c = (load_dataset(tmp_path / f"{name}.npz").fingerprint for name in "abc")
    assert a == b != c


def test_class_names_of_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **edm_arrays(), classes=np.array(["cat", "dog", "ship"]))
    source = load_dataset(tmp_path / "a.npz?classes=ship,cat")
    assert source.class_names == ("ship", "cat")
    assert len(source) == 8


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


@pytest.mark.parametrize("deflate", [False, True])
def test_corrupted_files_give_the_right_bytes_or_a_refusal(tmp_path: Path, deflate: bool) -> None:
    arrays = edm_arrays()
    good = write_zip(edm_entries(deflate=deflate))
    pixels = good.find(arrays["image"].tobytes()) if not deflate else -1
    inside = range(pixels, pixels + arrays["image"].nbytes) if not deflate else range(0)
    rng = np.random.default_rng(0)
    path = tmp_path / "edm.npz"
    outcomes = {"read": 0, "refused": 0}
    positions = [position for position in range(len(good)) if position not in inside]
    chosen = [*rng.choice(positions, 350), *(rng.choice(inside, 20) if inside else [])]
    for position in chosen:
        damaged = flipped(good, int(position), int(rng.integers(8)))
        outcomes[judged(path, damaged, arrays, verify="full")] += 1
        if position not in inside:  # without the CRC a flipped pixel is a pixel
            judged(path, damaged, arrays, verify="headers")
    for _ in range(150):
        start, stop = sorted(rng.integers(0, len(good), 2))
        damaged = [
            good[:stop],
            good[:start] + good[stop:],
            good[:start] + good[start:stop] + good[start:],
            good[:start] + rng.bytes(stop - start) + good[stop:],
            good[:start] + bytes(stop - start) + good[stop:],
        ][rng.integers(5)]
        outcomes[judged(path, damaged, arrays, verify="full")] += 1
    assert outcomes["refused"] > 100
    assert outcomes["read"] > 10  # flips in time stamps and the like change nothing


def judged(path: Path, data: bytes, arrays: dict[str, Any], verify: str) -> str:
    path.write_bytes(data)
    try:
        source = load_dataset(path, verify=verify)
        images = source.read(slice(None))
    except DataError:
        return "refused"
    np.testing.assert_array_equal(images, arrays["image"])
    np.testing.assert_array_equal(source.labels, arrays["label"])
    return "read"


def test_a_flipped_pixel_is_found_by_full_verification(tmp_path: Path) -> None:
    arrays = edm_arrays(600)
    good = write_zip([Entry(f"{name}.npy", npy_bytes(array)) for name, array in arrays.items()])
    path = tmp_path / "edm.npz"
    path.write_bytes(flipped(good, good.find(arrays["image"].tobytes()) + 27_000, 3))
    assert load_dataset(path, verify="headers").labels.tolist() == arrays["label"].tolist()
    with pytest.raises(DataError, match="CRC-32"):
        load_dataset(path, verify="full")


IMAGE, LABEL = edm_entries()
HOSTILE = {
    "encrypted": ([Entry("image.npy", IMAGE.data, flags=1), LABEL], "is encrypted"),
    "another method": ([Entry("image.npy", IMAGE.data, lies={"method": 12}), LABEL], "compressed by method 12"),
    "duplicate member": ([IMAGE, Entry("image.npy", IMAGE.data[::-1]), LABEL], "two members called 'image.npy'"),
    "overlap": ([IMAGE, Entry("label.npy", LABEL.data, lies={"offset": 0, "local_name": "image.npy"})], "damaged"),
    "another name inside": (
        [Entry("image.npy", IMAGE.data, lies={"local_name": "imagf.npy"}), LABEL],
        "damaged",
    ),
    "stored with two sizes": ([Entry("image.npy", IMAGE.data, lies={"size": 5000}), LABEL], "not a readable"),
    "beyond the file": (
        [IMAGE, Entry("label.npy", LABEL.data, lies={"size": 10**9, "stored_size": 10**9})],
        "beyond the end of the file",
    ),
    "pickled objects": (
        [Entry("image.npy", npy_bytes(np.array([{}, []], dtype=object), allow_pickle=True)), LABEL],
        r"Python objects \(pickle\)",
    ),
    "pickled labels": (
        [IMAGE, Entry("label.npy", npy_bytes(np.array([{}] * 12, dtype=object), allow_pickle=True))],
        r"Python objects \(pickle\)",
    ),
    "structured": ([Entry("image.npy", npy_bytes(np.zeros(3, "u1,u1"))), LABEL], "plain array of numbers"),
    "ten terabytes": ([Entry("image.npy", npy_header((10**9, 100, 100, 1)) + bytes(500)), LABEL], "but holds 500"),
    "a byte too many": ([Entry("image.npy", IMAGE.data + b"x"), LABEL], "but holds 577"),
    "negative size": ([Entry("image.npy", npy_header((-1, 4, 4, 3)) + bytes(48)), LABEL], "plain array of numbers"),
    "not an array": ([Entry("image.npy", b"hello, this is text"), LABEL], "header that cannot be read"),
    "deep header": ([Entry("image.npy", npy_header((1,), "(" * 9000)), LABEL], "header that cannot be read"),
    "code": (
        [Entry("image.npy", npy_header((1,), "' + exit() + '")), LABEL],
        "header that cannot be read",
    ),
    "endless header": (
        [Entry("image.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 99), LABEL],
        "header that cannot be read",
    ),
    "version 9": ([Entry("image.npy", b"\x93NUMPY\x09\x00" + IMAGE.data[8:]), LABEL], r"header that cannot be read"),
    "no label": ([IMAGE], "has no column 'label'"),
    "no image": ([LABEL], "has no member 'image'"),
    "nothing": ([], "has no member 'image'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path: Path, name: str) -> None:
    entries, message = HOSTILE[name]
    path = save(tmp_path / "hostile.npz", entries)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(path)
    assert "hostile.npz" in caught.value.what


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "edm.npz"
    good = write_zip(edm_entries())
    for data in (b"", b"PK", b"not a zip at all" * 100, good[:100], good[:-1], good[:-30]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"not a readable \.npz file"):
            load_dataset(path)


def deflated_zeros(size: int) -> bytes:
    """A raw deflate stream of ``size`` (whole MiB) zeros, made from repeated blocks in no time."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    again = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return first + again * ((size >> 20) - 1) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def bombs() -> dict[str, bytes]:
    rows = 700_000
    header = npy_header((rows, 32, 32, 3))
    padded = header + bytes((1 << 20) - len(header))
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = squeeze.compress(padded) + squeeze.flush(zlib.Z_FULL_FLUSH)
    size = len(header) + rows * 3072
    stream = start + deflated_zeros(-(-size // (1 << 20)) << 20)
    honest = Entry("image.npy", b"", lies={"raw": stream, "size": size, "method": 8, "crc": 0})
    small_claim = Entry("image.npy", b"", lies={"raw": stream, "size": len(header) + 3072, "method": 8, "crc": 0})
    labels = Entry("label.npy", npy_bytes(np.zeros(1, np.int64)))
    many = [Entry(f"m{number}", b"") for number in range(3000)]
    label_bomb = npy_header((10**9,), "<i8")
    return {
        "honest about its size": write_zip([honest, labels]),
        "claims to be small": write_zip([small_claim, labels]),
        "thousands of members": write_zip([*many, *edm_entries()]),
        "labels": write_zip(
            [
                IMAGE,
                Entry(
                    "label.npy",
                    b"",
                    lies={
                        "raw": zlib.compress(label_bomb + bytes(10_000), wbits=-15),
                        "size": 8 * 10**9 + len(label_bomb),
                        "method": 8,
                        "crc": 0,
                    },
                ),
            ]
        ),
    }


@pytest.mark.parametrize("name", ["honest about its size", "claims to be small", "thousands of members", "labels"])
def test_bombs_are_refused_at_once_in_constant_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb.npz"
    path.write_bytes(bombs()[name])
    assert path.stat().st_size < 10 << 20
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(DataError, match="bomb"):
        load_dataset(path)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 20 << 20


def test_an_uncompressed_member_larger_than_memory_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    rows = 300_000
    header = npy_header((rows, 256, 256, 3))
    size = len(header) + rows * 256 * 256 * 3  # 59 GB, a hole in the file
    labels = npy_bytes(np.arange(rows) % 10)
    template = write_zip(
        [
            Entry("label.npy", labels),
            Entry("image.npy", header, zip64=True, lies={"size": size, "stored_size": size, "crc": 0}),
        ]
    )
    at = template.find(header) + len(header)
    with path.open("wb") as file:
        file.write(template[:at])
        file.seek(size - len(header), 1)
        directory = template[at:-22]
        place = file.tell()
        file.write(directory)
        end64 = file.tell()
        file.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(directory), place))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end64, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, 2**32 - 1, 2**32 - 1, 0))
    started = time.process_time()
    source = load_dataset(path)
    assert len(source) == rows
    assert not source.read(np.array([0, 150_000, rows - 1])).any()
    assert time.process_time() - started < 1

"""Data sets in layouts of their own: digits, CIFAR archives, idx (MNIST), SVHN ``.mat``, webdataset tars."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import pickle
import re
import tarfile
import zlib
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puma.data.checks import check_image_layout, check_labels
from puma.data.images import EncodedImages
from puma.data.sampler import stratified_rows
from puma.data.source import Pixels, Source, in_memory
from puma.data.spec import Options
from puma.errors import DataError, PumaError, UsageError, unknown
from puma.io import fingerprint

_DIGITS_TRAIN_ROWS = 898
_LARGEST = 1 << 29
_CIFAR = re.compile(r"cifar-?(10|100)-(python|binary|batches-py|batches-bin)(\.tar(\.gz)?|\.tgz)?$")
_SVHN = re.compile(r"(train|test|extra)_32x32\.mat$")
_DAMAGE = (OSError, EOFError, tarfile.TarError, pickle.UnpicklingError, zlib.error, LookupError, TypeError, ValueError)
_IDX = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?$")


def _of_arrays(images: Pixels, labels: NDArray[Any], name: str, where: str, class_names: Any = None) -> Source:
    check_image_layout(images.shape, images.dtype, None, where)
    values = check_labels(labels, len(images), where, class_names)
    digest = hashlib.sha256(images.tobytes() + values.astype("<i8").tobytes())
    return Source(in_memory(images), values, name=name, fingerprint=digest.hexdigest(), class_names=class_names)


def load_digits(split: str | None = None) -> Source:
    """The digits: ``"train"`` (898 images), ``"test"`` (899) or ``"all"``; 8x8x1, 17 grey levels over 0..255.

    The split is stratified and fixed: it does not depend on a random number generator.

    Raises:
        UsageError: another split.
    """
    split = split or "train"
    if split not in ("train", "test", "all"):
        raise unknown("split of digits", split, ("train", "test", "all"))
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    rows = np.arange(len(labels))
    if split != "all":
        train = stratified_rows(labels, _DIGITS_TRAIN_ROWS, seed=0)
        rows = train if split == "train" else np.setdiff1d(rows, train)
    source = _of_arrays(images[rows], labels[rows], "digits" if split == "train" else f"digits-{split}", "digits")
    source.spec = f"digits:{split}"
    return source


def is_archive(path: Path) -> bool:
    """Whether `load_archive` reads it, told by its name: CIFAR python or binary, idx, SVHN, webdataset ``.tar``."""
    folder = path.is_dir() and any(_IDX.match(place.name) for place in path.iterdir())
    return folder or path.suffix == ".tar" or any(kind.search(path.name) for kind in (_CIFAR, _SVHN, _IDX))


def load_archive(path: Path, options: Options) -> Source:
    """Open a data set in the files that its authors publish; `is_archive` tells which.

    ``cifar-10-python.tar.gz`` or its folder ``cifar-10-batches-py`` (also ``-binary``, ``-batches-bin``, and CIFAR-100:
    ``?label=fine_label`` or ``coarse_label``) and folders of idx files (``train-images-idx3-ubyte.gz`` with its labels
    beside it) hold two splits; ``train_32x32.mat`` and webdataset tars (``KEY.png`` with ``KEY.cls``, or ``KEY.json``
    that holds ``label``) hold one.

    Raises:
        UsageError: a split or label that is not there, or none where it has to be chosen.
        DataError: damaged, or a pickle that holds more than arrays, lists, texts and numbers.
    """
    two = bool(_CIFAR.search(path.name)) or path.is_dir()
    options.only(path, *(["split"] if two else []), *(["label"] if _CIFAR.search(path.name) else []))
    try:
        if match := _CIFAR.search(path.name):
            return _cifar(path, options.split, options.label, fine=match[1] == "100", binary="bin" in match[2])
        if _SVHN.search(path.name):
            return _svhn(path)
        if path.suffix == ".tar":
            return _webdataset(path, options)
        return _idx(_idx_file(path, options.split) if path.is_dir() else path)
    except PumaError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path} does not exist") from None
    except _DAMAGE as error:
        raise DataError(f"{path} cannot be read", why=str(error)[:200], fix="download it again") from None


class _Plain(pickle.Unpickler):
    """Unpickles arrays, lists, texts and numbers; refuses every class and function but the two that make arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("._core.", ".core."), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return lambda text, encoding: text.encode("latin1")
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not run")


def _files(path: Path) -> dict[str, bytes]:
    """The files of a folder or tar archive by their names without folders; nothing is extracted."""
    if path.is_dir():
        return {place.name: place.read_bytes() for place in sorted(path.iterdir()) if place.is_file()}
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                if member.size > _LARGEST:
                    raise DataError(f"{path}: {member.name} claims {member.size:,} bytes", why="no part is that large")
                found[Path(member.name).name] = file.read()
    return found


def _cifar(path: Path, split: str | None, label: str | None, *, fine: bool, binary: bool) -> Source:
    if split not in ("train", "test"):
        fix = f'choose one: "{path}?split=train"'
        raise UsageError(f"{path} holds the splits train and test" + f", not {split!r}" * (split is not None), fix=fix)
    kinds = ("coarse_label", "fine_label") if fine else ("label",)
    if fine and label not in kinds:
        raise UsageError(f"{path} has several label columns: {', '.join(kinds)}", fix="choose one: ?label=fine_label")
    if label is not None and label not in kinds:
        raise unknown(f"label column of {path}", label, kinds)
    column = kinds.index(label) if label else 0
    wanted = re.compile((r"(data_batch_\d|train)" if split == "train" else "test(_batch)?") + r"(\.bin)?$")
    files = _files(path)
    parts = [files[name] for name in sorted(files) if wanted.match(name)]
    if not parts:
        raise DataError(f"{path} holds no {split} images", why=f"it holds: {', '.join(sorted(files)[:8])}")
    meta = "meta" if fine else "batches.meta"
    if binary:
        records = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, len(kinds) + 3072)
        pixels, labels = records[:, len(kinds) :], records[:, column].astype(np.int64)
        text = files.get(f"{kinds[column]}_names.txt" if fine else "batches.meta.txt", b"").decode()
        names = text.split() or None
    else:
        batches = [_Plain(io.BytesIO(part), encoding="latin1").load() for part in parts]
        pixels = np.concatenate([batch["data"] for batch in batches])
        labels = np.concatenate([np.asarray(batch[f"{kinds[column]}s"]) for batch in batches])
        held = _Plain(io.BytesIO(files[meta]), encoding="latin1").load() if meta in files else {}
        names = held.get(f"{kinds[column]}_names")
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return _of_arrays(images, labels, f"cifar{100 if fine else 10}-{split}", str(path), names)


def _idx_file(folder: Path, split: str | None) -> Path:
    found = {place.name: place for place in sorted(folder.iterdir()) if _IDX.match(place.name)}
    splits = {"test" if name.startswith(("t10k", "test")) else "train": place for name, place in found.items()}
    if split not in splits:
        text = f"{folder} holds the splits {', '.join(sorted(splits))}" + f", not {split!r}" * (split is not None)
        raise UsageError(text, fix=f'choose one: "{folder}?split={sorted(splits)[-1]}"')
    return splits[split]


def _idx(path: Path) -> Source:
    beside = path.with_name(path.name.replace("images", "labels", 1).replace("idx3", "idx1"))
    arrays = []
    for place in (path, beside):
        with gzip.open(place) if place.suffix == ".gz" else place.open("rb") as file:
            magic = file.read(4)
            shape = tuple(np.frombuffer(file.read(4 * magic[3]), ">i4").tolist()) if len(magic) == 4 else ()
            most = max(1 << 26, 100 * place.stat().st_size)  # beyond that the file is a bomb
            if magic[:3] != b"\0\0\x08" or not shape or not 0 <= math.prod(shape) <= most:
                raise DataError(f"{place} is no idx file of bytes", why=f"it begins with {magic!r}, {shape}")
            arrays.append(np.frombuffer(_exactly(file, math.prod(shape), place), np.uint8).reshape(shape))
    name = f"{path.absolute().parent.name}-{'test' if path.name.startswith(('t10k', 'test')) else 'train'}"
    return _of_arrays(arrays[0][..., None], arrays[1].astype(np.int64), name, str(path))


def _exactly(file: Any, size: int, path: Path) -> bytes:
    data: bytes = file.read(size)
    if len(data) != size or file.read(1):
        raise DataError(f"{path} is damaged", why=f"its header says {size:,} bytes of values", fix="download it again")
    return data


def _svhn(path: Path) -> Source:
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # scipy's own classes among them
        raise DataError(f"{path} cannot be read", why=str(error)[:200], fix="download it again") from None
    images, labels = content["X"], content["y"].reshape(-1).astype(np.int64) % 10  # "0" is stored as 10
    return _of_arrays(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels, f"svhn-{path.name[:-10]}", str(path))


def _read_member(path: Path, places: list[tuple[str, int, int]], row: int) -> tuple[bytes, str]:
    name, offset, size = places[row]
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size), f"{path}: {name}"


def _webdataset(path: Path, options: Options) -> Source:
    samples: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            stem, _, ending = member.name.partition(".")
            samples[stem][ending.lower()] = member
        images, labels = [], []
        for stem, files in samples.items():
            image = next((files[e] for e in ("png", "jpg", "jpeg", "webp", "bmp", "ppm") if e in files), None)
            label = next((files[ending] for ending in ("cls", "json") if ending in files), None)
            if image is None or label is None or label.size > 1 << 20:
                raise DataError(
                    f"{path}: {stem} has no {'label' if image else 'image'}", why=f"it has: {sorted(files)}"
                )
            text = archive.extractfile(label)
            value = json.loads(text.read()) if text is not None else None  # a bare number is JSON too
            labels.append(value.get("label") if isinstance(value, dict) else value)
            images.append((image.name, image.offset_data, image.size))
    if not labels:
        raise DataError(f"{path} holds no samples")
    return Source(
        EncodedImages(partial(_read_member, path, images), len(images), options),
        check_labels(np.array(labels), len(labels), f"{path}: labels"),
        name=path.stem,
        fingerprint=fingerprint({"format": "webdataset", "files": [[n, s] for n, _, s in images], "labels": labels}),
    )

"""Data sets by name: ``cifar10``, ``cifar100``, ``svhn``, ``imagenet``, ``edm-cifar10-1m``, ``edm-cifar100-1m``."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from puma.errors import DataError

_EDM = "https://huggingface.co/datasets/P2333/DM-Improves-AT"


@dataclass(frozen=True)
class _Named:
    """Where a data set may lie below ``$PUMA_DATA``, its name on the hub, and the label column where there are two."""

    files: tuple[str, ...]
    hub: str = ""
    label: str | None = None
    published: str = ""


def _cifar(count: int) -> tuple[str, ...]:
    return (f"cifar{count}", *(f"cifar-{count}-{kind}" for kind in ("python.tar.gz", "binary.tar.gz", "binary")))


NAMES = {
    "cifar10": _Named((*_cifar(10), "cifar-10-batches-py", "cifar-10-batches-bin"), "uoft-cs/cifar10"),
    "cifar100": _Named((*_cifar(100), "cifar-100-python"), "uoft-cs/cifar100", "fine_label"),
    "svhn": _Named(
        ("svhn/{split}_32x32.mat", "{split}_32x32.mat", "svhn/cropped_digits"), "ufldl-stanford/svhn:cropped_digits"
    ),
    "imagenet": _Named(("imagenet", "imagenet-1k", "ILSVRC/Data/CLS-LOC"), "ILSVRC/imagenet-1k"),
    "edm-cifar10-1m": _Named(("edm-cifar10-1m.npz", "edm_data/cifar10/1m.npz"), published="cifar10/1m.npz"),
    "edm-cifar100-1m": _Named(("edm-cifar100-1m.npz", "edm_data/cifar100/1m.npz"), published="cifar100/1m.npz"),
}


def find_named(name: str, split: str) -> tuple[str, str | None, str | None]:
    """Find a named data set: below ``$PUMA_DATA`` (else here and in ``data``), then through the package ``datasets``.

    Returns:
        The place, and the split and the label column that it still has to be asked for.

    Raises:
        DataError: it is not on this machine; the message has the command that gets it.
    """
    known = NAMES[name]
    roots = [Path(os.environ["PUMA_DATA"])] if os.environ.get("PUMA_DATA") else [Path(), Path("data")]
    for root in roots:
        for file in known.files:
            place = (root / file.format(split=split)).expanduser()
            if place.exists():
                one_split = "{split}" in file or place.suffix == ".npz"
                return str(place), None if one_split else split, known.label
    searched = " and ".join(str(root.absolute()) for root in roots)
    if known.published:
        raise DataError(
            f"{name} is not on this machine: no {known.files[0]} in {searched}",
            why=f"it is published at {_EDM}; `curl -sL {_EDM}/raw/main/{known.published}` prints its sha256 and size",
            fix=f"curl -L -o {known.files[0]} {_EDM}/resolve/main/{known.published} && export PUMA_DATA=$PWD",
        )
    if importlib.util.find_spec("datasets") is not None:
        return f"hf:{known.hub}", split, known.label
    raise missing(name, f"there is nothing of it in {searched}, and the package datasets is not installed")


def missing(name: str, why: str) -> DataError:
    """The error for a named data set that is nowhere, with the command that gets it."""
    hub = NAMES[name].hub.partition(":")[0]
    get = f"pip install 'puma-robust[hub]' && hf download {hub} --repo-type dataset --local-dir {name}"
    return DataError(f"{name} is not on this machine", why=why, fix=f"{get} && export PUMA_DATA=$PWD")

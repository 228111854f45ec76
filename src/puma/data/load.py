"""`load_dataset`: one door to every kind of source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from puma.data.digits import load_digits
from puma.data.mapstyle import MapStyle, load_mapstyle
from puma.data.parts import check_disjoint, expanded, joined, name_of
from puma.data.prepare import prepared
from puma.data.source import ImageSource, Source
from puma.data.spec import Options, as_option, make_spec, parse_spec
from puma.errors import DataError, UsageError, unknown

_KNOWN = set(Options.__dataclass_fields__)
_KINDS = 'name "digits", an .npz, .npy or .parquet file, part files, an image folder, or hf:NAME:SPLIT'


def load_dataset(spec: str | Path | Iterable[str | Path] | MapStyle, **options: Any) -> Source:
    """Open a source of labelled images.

    Args:
        spec: one of

            - ``"digits"`` (also ``"digits:test"``, ``"digits:all"``);
            - an EDM ``.npz``, an ``.npy`` with its labels beside it, Parquet in the Hugging Face layout;
            - a folder with a folder of images for each class, or with part files;
            - ``"hf:NAME:SPLIT"`` (needs the extra ``hub``);
            - a pattern (``"train-*.parquet"``) or a list of part files, which become one source;
            - any object with ``__len__`` whose items are ``(image, label)``.

            Options may stand in the text, as in ``"cifar10.parquet?resize=16&subset=5000&seed=0"``.
        options: fields of `puma.data.spec.Options`; they win over those in the text.

    Returns:
        A source: ``source[i]`` is ``(uint8 [H, W, C], int)``. Its ``spec`` opens the same source in another process.

    >>> load_dataset("digits").image_shape
    (8, 8, 1)
    >>> load_dataset("digits?resize=4&channels=3&classes=3,8")[0][0].shape
    (4, 4, 3)

    Raises:
        UsageError: unknown kind of source, unknown option or value.
        DataError: missing, damaged or hostile file; wrong dtype, layout or labels; an empty class.
    """
    if not isinstance(spec, (str, Path, list, tuple)) and hasattr(spec, "__getitem__") and hasattr(spec, "__len__"):
        chosen = _options({}, options)
        return prepared(load_mapstyle(cast(MapStyle, spec), verify=chosen.verify), chosen)
    if isinstance(spec, (str, Path)):
        there = ("?" in str(spec) or "|" in str(spec)) and Path(spec).exists()  # a file may be called like that
        places, written = ([str(spec)], {}) if there else parse_spec(str(spec))
    elif isinstance(spec, Iterable):
        places, written = [str(part) for part in spec], {}
    else:
        raise UsageError(f"{spec!r} is no source", fix=_KINDS)
    chosen = _options(written, options)
    if not places:
        raise UsageError("no source is named", fix=_KINDS)
    files = expanded(places, chosen.split)
    parts = [_opened(place, chosen) for place in files]
    whole = joined(parts)
    if chosen.verify == "full":
        check_disjoint(parts)
    source = prepared(whole, chosen)
    source.name = name_of(Path(files[0])) if Path(files[0]).is_file() else source.name
    source.spec = make_spec([_absolute(place) for place in places], chosen)
    return source


def as_source(dataset: Source | MapStyle) -> Source:
    """``dataset`` itself if it is a source already, else wrapped as one.

    Raises:
        DataError: its items are not (image, label).
    """
    if callable(getattr(dataset, "read", None)) and hasattr(dataset, "image_shape"):
        return cast(Source, dataset)
    return load_mapstyle(cast(MapStyle, dataset))


def _options(written: dict[str, Any], given: dict[str, Any]) -> Options:
    for name, value in given.items():
        if name not in _KNOWN:
            raise unknown("option of a data source", name, _KNOWN)
        written[name] = as_option(name, value)
    if written.get("labels"):
        written["labels"] = str(Path(written["labels"]).absolute())
    return Options(**written)


def _opened(place: str, options: Options) -> ImageSource:
    kind, _, rest = place.partition(":")
    path = Path(place)
    # encoded images may differ in these before they are converted, so their decoders have to know
    shape = {"resize": options.resize, "channels": options.channels}
    if kind == "digits" and not path.exists():
        return load_digits(rest or "train")
    if kind == "hf":
        from puma.data.hub import load_hub

        name, _, split = rest.partition(":")
        return load_hub(name, split or options.split or "train", verify=options.verify, **shape)
    if path.suffix == ".npz":
        from puma.data.npz import load_npz

        return load_npz(path, verify=options.verify)
    if path.suffix == ".npy":
        from puma.data.npyfile import load_npy

        return load_npy(path, labels=options.labels, verify=options.verify)
    if path.suffix in (".parquet", ".pq"):
        from puma.data.parquet import load_parquet

        return load_parquet(path, verify=options.verify, **shape)
    if not path.exists():
        raise DataError(f"{place} does not exist", fix=_KINDS)
    if path.is_dir():
        from puma.data.folder import load_folder

        return load_folder(path / (options.split or ""), verify=options.verify, **shape)
    raise UsageError(f"{place} is of no known kind", fix=_KINDS)


def _absolute(place: str) -> str:
    """A place that means the same from another working directory."""
    kind, _, rest = place.partition(":")
    if kind == "hf":
        return f"hf:{Path(rest).absolute()}" if rest.startswith(".") else place
    return place if kind == "digits" and not Path(place).exists() else str(Path(place).absolute())

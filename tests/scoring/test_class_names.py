from __future__ import annotations

from pathlib import Path

import pytest

from puma import Pool, build_model, score_margins
from puma.errors import DataError
from puma.models.weights import set_class_names


def test_a_pool_that_numbers_its_classes_otherwise_than_the_model_is_refused(tmp_path: Path) -> None:
    model = build_model("small-cnn", 2, in_channels=1, image_size=8).eval()
    set_class_names(model, ["3", "8"])
    score_margins(model, Pool(["digits?classes=3,8&subset=20"]), norm="Linf", mode="fast", out=tmp_path / "a")
    for spec, found in (
        ("8,3", r"otherwise(?s:.*)=3,8"),
        ("3,9", "does not have: 9"),
        ("8", r"otherwise(?s:.*)source first"),
    ):
        spec = f"digits?classes={spec}&subset=20"
        with pytest.raises(DataError, match=found):
            score_margins(model, Pool([spec]), norm="Linf", mode="fast", out=tmp_path / "b")

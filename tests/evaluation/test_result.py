"""How an evaluation looks in a terminal, in a notebook, and as a picture."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from puma.evaluation import evaluate


@pytest.mark.usefixtures("short_attacks")
def test_text_table_and_picture(network: nn.Module, images: list[Any]) -> None:
    result = evaluate(network, images, "Linf:0.02")
    assert result.robust_accuracy is not None
    text = (
        f"<Evaluation Linf:0.02: clean 80.0% of 40 images, {result.robust_accuracy:.1%} under AutoAttack standard of 40"
    )
    assert repr(result).startswith(text)
    table = result._repr_html_()  # what a notebook calls
    assert table.count("<tr>") == 3
    assert f"<td>AutoAttack standard, Linf:0.02</td><td>{result.robust_accuracy:.1%}</td>" in table
    axes = result.plot()
    heights = [bar.get_height() for bar in axes.patches]
    assert heights[0] == pytest.approx(80)
    assert heights[-1] == pytest.approx(100 * result.robust_accuracy)
    assert heights[1] == pytest.approx(100 * float(result.apgd_accuracy or 0))
    assert sorted(heights, reverse=True) == heights
    clean = evaluate(network, images, "Linf:0.02", attack="clean")
    assert repr(clean) == "<Evaluation Linf:0.02: clean 80.0% of 40 images>"
    assert [bar.get_height() for bar in clean.plot(axes).patches][-1] == pytest.approx(80)
    subset = evaluate(network, images, "Linf:0.02", attack="pgd-3", subset=20)
    assert subset.plot().patches[-1].get_height() == pytest.approx(100 * float(subset.attacked_accuracy or 0))

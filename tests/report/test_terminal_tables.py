"""What a study prints when it is finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from puma.cli.study import print_results


def row(strategy: str, seed: int, clean: float, robust: float | None, **more: Any) -> dict[str, Any]:
    facts = {"params": "{}", "prune_fraction": 0.0, "recipe": "digits", "checkpoint": "last", "n_test": 200}
    costs = {"pool": "digits (898) + images (100)", "kept": 998, "mean_eps": 0.2, "apgd_accuracy": 0.5}
    judged = {"strategy": strategy, "seed": seed, "clean_accuracy": clean, "robust_accuracy": robust}
    return {**facts, **costs, **judged, **more}


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    def lines(rows: list[dict[str, Any]]) -> list[str]:
        print_results(rows)
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    monkeypatch.setenv("COLUMNS", "80")
    return lines


def test_one_seed_has_intervals_over_its_images(printed: Callable[..., list[str]]) -> None:
    lines = printed([row("none", 0, 0.95, 0.5)])
    assert "robust: AutoAttack standard on 200 test images, 95 % interval" in " ".join(lines)
    assert "none 1 998 0.200 95.0% 50.0% ±6.9" in lines


def test_seeds_are_averaged_and_pools_told_apart(printed: Callable[..., list[str]]) -> None:
    small = {"pool": "digits (898) + images (10)", "kept": 908}
    lines = printed([row("none", 0, 0.9, 0.4), row("none", 1, 0.8, 0.5), row("none", 0, 0.7, 0.3, **small)])
    assert "none 998 2 998 0.200 85.0% 45.0%" in lines
    assert "none 908 1 908 0.200 70.0% 30.0%" in lines


def test_a_weaker_attack_is_named(printed: Callable[..., list[str]]) -> None:
    lines = printed([row("none", 0, 0.95, None)])
    assert any(line.startswith("robust: APGD-CE on 200") for line in lines)
    assert "none 1 998 0.200 95.0% 50.0% ±6.9" in lines


def test_names_are_not_read_as_markup(printed: Callable[..., list[str]]) -> None:
    assert "[/red]\\x1b[2J 1 998 0.200 95.0% 50.0% ±6.9" in printed([row("[/red]\x1b[2J", 0, 0.95, 0.5)])

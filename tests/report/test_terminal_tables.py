"""What a study prints when it is finished."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from puma.cli.tables import results_table


def row(strategy: str, seed: int, clean: float, robust: float | None, **more: Any) -> dict[str, Any]:
    facts = {"params": "{}", "prune_fraction": 0.0, "recipe": "digits", "checkpoint": "last", "n_test": 200}
    costs = {"pool": "digits (898) + images (100)", "kept": 998, "mean_eps": 0.2, "apgd_accuracy": 0.5}
    judged = {"strategy": strategy, "seed": seed, "clean_accuracy": clean, "robust_accuracy": robust}
    return {**facts, **costs, **judged, **more}


def printed(rows: list[dict[str, Any]]) -> list[str]:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(results_table(rows))
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_one_seed_has_intervals_over_its_images() -> None:
    lines = printed([row("none", 0, 0.95, 0.5)])
    assert "robust: AutoAttack standard on 200 test images, 95 % interval" in " ".join(lines)
    assert "none 1 998 0.200 95.0% 50.0% ±6.9" in lines


def test_seeds_are_averaged_and_pools_told_apart() -> None:
    small = {"pool": "digits (898) + images (10)", "kept": 908}
    lines = printed([row("none", 0, 0.9, 0.4), row("none", 1, 0.8, 0.5), row("none", 0, 0.7, 0.3, **small)])
    assert "none 998 2 998 0.200 85.0% 45.0%" in lines
    assert "none 908 1 908 0.200 70.0% 30.0%" in lines


def test_a_weaker_attack_is_named() -> None:
    lines = printed([row("none", 0, 0.95, None)])
    assert any(line.startswith("robust: APGD-CE on 200") for line in lines)
    assert "none 1 998 0.200 95.0% 50.0% ±6.9" in lines

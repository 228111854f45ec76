"""Estimates everywhere, measurements where they can change the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_scoring import Small, cli

import puma
from puma.errors import UsageError
from puma.models.weights import save_model
from puma.scoring.cascade import Cascade, score_cascade

THREAT = puma.ThreatModel("Linf", 0.02)


@pytest.fixture(scope="module")
def pool() -> puma.Pool:
    return puma.Pool([puma.load_dataset("digits")])


def test_cascade_measures_what_the_plan_depends_on(pool, tmp_path) -> None:
    model = Small(pool).eval()
    full = puma.score_margins(model, pool, batch_size=128)
    table = score_cascade(model, pool, Cascade(THREAT, 0.4, band=0.2), out=tmp_path, batch_size=128, part_rows=300)
    statuses = table.to_pandas()["status"]
    measured = (statuses == "crossed").to_numpy()
    assert 0 < measured.sum() < 0.9 * len(pool)
    assert set(statuses.unique()) == {"crossed", "estimated", "misclassified"}
    np.testing.assert_allclose(table.margin[measured], full.margin[measured], rtol=1e-2)
    reach = (full.margin > 0) & (full.margin < THREAT.eps / 0.5)
    plan, exact = (puma.make_plan(t, "puma", 0.4, threat=THREAT) for t in (table, full))
    assert measured[reach & plan.keep].all()
    assert (plan.keep != exact.keep).mean() <= 0.01
    np.testing.assert_allclose(plan.eps[plan.keep & exact.keep], exact.eps[plan.keep & exact.keep], atol=2e-4)
    assert table.meta["settings"]["measured"] == measured.sum()
    again = score_cascade(model, pool, Cascade(THREAT, 0.4, band=0.2), out=tmp_path, batch_size=128, part_rows=300)
    assert again.fingerprint == table.fingerprint


def test_a_cascade_needs_sensible_numbers() -> None:
    with pytest.raises(UsageError, match="band"):
        Cascade(THREAT, 0.3, band=1.5)
    with pytest.raises(UsageError, match=r"30 is not in \[0, 1\)"):
        Cascade(THREAT, 30)


def test_a_plan_other_than_the_one_measured_for_is_warned_about(pool) -> None:
    table = score_cascade(Small(pool).eval(), pool, Cascade(THREAT, 0.4, c=0.5, band=0.2), batch_size=128)

    def warned(strategy: str = "puma", share: float = 0.4, threat: puma.ThreatModel = THREAT, **params) -> str:
        plan = puma.make_plan(table, strategy, share, threat=threat, **params)
        return "\n".join(warning for warning in plan.warnings if "mode cascade" in warning)

    for covered in (warned(), warned("easy"), warned(c=0.75), warned(threat=puma.ThreatModel("Linf", 0.01))):
        assert not covered
    assert not warned("random")
    wider = warned(c=0.1)  # a reach of 0.2 where margins below 0.04 were measured
    assert "its cap reaches margins below 0.2, that one's below 0.04" in wider
    guessed = (table.status == puma.margins.Status.ESTIMATED) & (table.margin < 0.2)
    kept = puma.make_plan(table, "puma", 0.4, threat=THREAT, c=0.1).keep
    assert f"and {(guessed & kept).sum()} of the {kept.sum()} kept images" in wider
    assert "below 0.12" in warned(threat=puma.ThreatModel("Linf", 0.06))
    assert "it prunes 0.2004 of the prunable images, that one 0.4" in warned("easy", 0.2)
    assert "that one 0.4 of each source and class" in warned("easy", class_balanced=False)
    assert "misclassified images" in warned("difficult")
    other = replace(table, meta={**table.meta, "settings": {}})
    assert not any("mode cascade" in text for text in puma.make_plan(other, "puma", 0.2, threat=THREAT, c=0.1).warnings)


def test_cascade_on_the_command_line(pool, tmp_path, monkeypatch, capsys) -> None:
    torch.manual_seed(0)
    weights, out = tmp_path / "model.safetensors", tmp_path / "table"
    save_model(puma.build_model("small-cnn", 10, in_channels=1, image_size=8).eval(), weights)
    words = ["score", weights, "digits?subset=300", "--out", out, "--mode", "cascade", "--device", "cpu", "--quiet"]

    def refused(*more: object) -> str:
        assert cli(monkeypatch, *words, *more) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "needs the plan it measures for" in refused()
    words += ["--threat", "Linf:0.01", "--prune-fraction", 0.4, "--c", 0.25]
    assert "--norm L2 contradicts --threat Linf:" in refused("--norm", "L2")
    for several in (["--devices", 2], ["--worker", 0, "--num-workers", 2], ["--engine", "ray"]):
        assert "works in one process" in refused(*several)
    assert "cannot say what it will cost" in refused("--dry-run")
    assert "makes other scores" in refused("--from-run", tmp_path)
    assert "did you mean 'cascade'" in refused("--mode", "cascde")
    assert "c=2.0" in refused("--c", 2)
    with monkeypatch.context() as launched:
        launched.setenv("RANK", "0")
        launched.setenv("WORLD_SIZE", "2")
        assert "works in one process" in refused()
    assert "belong to --mode cascade" in refused("--mode", "refined")  # the last --mode counts
    assert cli(monkeypatch, *words) == 0
    table = puma.MarginTable.read(out)
    assert table.meta["settings"]["cascade"] == {
        "threat": {"norm": "Linf", "eps": 0.01},
        "prune_fraction": 0.4,
        "c": 0.25,
        "band": 0.25,
    }
    measured = table.meta["settings"]["measured"]
    assert 0 < measured < 300
    said = capsys.readouterr().out
    assert "300 margins (Linf, cascade)" in said
    assert f"stages: 300 estimated (fast), {measured} of them measured (refined)" in said
    assert cli(monkeypatch, *words, "--norm", "Linf") == 0  # says the same: the finished table is read

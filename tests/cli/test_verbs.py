"""The verbs in the order in which a person uses them, and what they say to a person's mistakes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from puma.cli.app import main
from puma.margins import MarginTable
from puma.plan import Plan


def puma(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["puma", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every verb made, each from what those before it left."""
    folder = tmp_path_factory.mktemp("verbs")
    real, images = "digits?subset=100", folder / "images.npz"
    pool = ["--real", real, "--synthetic", images, "--model", "small-cnn", "--recipe", "digits", "--threat", "Linf:0.1"]
    short = ["--set", "steps=6", "--set", "attack_steps=2", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        for words in (
            ["generate", real, "--count", 80, "--out", images, "--set", "steps=20", "--set", "warmup=5", "--quiet"],
            ["train", *pool, *short, "--out", folder / "model"],
            ["score", folder / "model", real, images, "--out", folder / "margins", "--quiet"],
            ["plan", "--table", folder / "margins", "--threat", "Linf:0.1", "--prune-fraction", 0.5, "--explain",
             "--out", folder / "plan.parquet"],
            ["train", *pool, *short, "--plan", folder / "plan.parquet", "--out", folder / "run"],
            ["evaluate", folder / "run", "--data", "digits:test?subset=40", "--threat", "Linf:0.1", "--subset", 12,
             "--quiet"],
            ["report", folder / "run"],
            ["verify", folder / "run", "--quiet"],
            *(["show", folder / name] for name in ("images.npz", "margins", "plan.parquet", "run")),
            ["show", folder / "run" / "last.safetensors"],
        ):  # fmt: skip
            assert puma(patch, *words) == 0, words
    return folder


def test_each_verb_leaves_its_artefact(made: Path) -> None:
    table, plan = MarginTable.read(made / "margins"), Plan.read(made / "plan.parquet")
    assert [source["role"] for source in table.sources] == ["real", "synthetic"]
    assert (len(table), plan.kept) == (180, 140)
    assert {"recipe.toml", "metrics.csv", "last.safetensors", "evaluation.json", "report.html"} <= {
        path.name for path in (made / "run").iterdir()
    }


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("plan --table margins --threat Linf:0.1 --strategy pumma", 2, "did you mean 'puma'"),
        ("plan --table margins --threat Linf:0.1 --prune-fracton 0.5", 2, "--prune-fraction"),
        ("plan --table margins --threat Linf:0.1 --prune-fraction 1.0", 2, "[0, 1)"),
        ("plan --table margins --threat Linf:8", 2, "8/255"),
        ("plan --table margins --threat L2:0.5", 3, "--norm L2"),
        ("plan --table nowhere --threat Linf:0.1", 3, "no margin table"),
        ("score nowhere digits --out m2", 4, "nowhere"),
        ("score model digits --out images.npz", 6, "images.npz"),
        ("score model digits --out margins", 5, "other settings"),
        ("score model digits --out m2 --mode fst", 2, "fast"),
        (
            "train --real digits --threat Linf:0.1 --model small-cnn --recipe digits --plan plan.parquet --out r",
            3,
            "pool",
        ),
        ("train --real digits --threat Linf:0.1 --model small-cnn --recipe digit --out r", 2, "digits"),
        ("train --real digits --threat Linf:0.1 --model small-cnn --recipe digits --set stepz=3 --out r", 2, "stepz"),
        ("train --real truncated.npz --threat Linf:0.1 --model small-cnn --recipe digits --out r", 3, "truncated.npz"),
        ("train --real pickled.npz --threat Linf:0.1 --model small-cnn --recipe digits --out r", 3, "object"),
        ("train --real floats.npz --threat Linf:0.1 --model small-cnn --recipe digits --out r", 3, "uint8"),
        ("train --real short.npz --threat Linf:0.1 --model small-cnn --recipe digits --out r", 3, "label"),
        ("evaluate run --data digits:test --threat 8/255", 2, "Linf:8/255"),
        ("evaluate pickle.pt --data digits:test --threat Linf:0.1", 4, "pickle"),
        ("generate digits --count 10 --out images.jpg", 2, ".npz"),
        ("study run nothing.toml", 2, "does not exist"),
        ("study status margins", 3, "puma study run"),
        ("show nowhere", 3, "nowhere"),
        ("demo --strategies none,pumma --out d", 2, "did you mean 'puma'"),
        ("demo --eps 8 --out d", 2, "8/255"),
    ],
)
def test_a_mistake_gets_its_reason_and_its_exit_code(
    made: Path,
    words: str,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10
    np.savez("pickled.npz", image=np.array([{"a": 1}] * 20, object), label=labels)
    np.savez("floats.npz", image=images / 255.0, label=labels)
    np.savez("short.npz", image=images, label=labels[:19])
    Path("truncated.npz").write_bytes(Path("short.npz").read_bytes()[:700])
    Path("pickle.pt").write_bytes(b"\x80\x04K\x01.")
    before = set(made.rglob("*"))
    assert puma(monkeypatch, *words.split()) == code
    text = " ".join(capsys.readouterr().err.split())
    assert said in text
    assert "Traceback" not in text
    assert not {path for path in set(made.rglob("*")) - before if path.suffix in (".parquet", ".safetensors")}


def test_help_teaches_without_loading_torch() -> None:
    code = "import sys, puma.cli.app; print([m for m in ('torch', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_settings_from_a_file_yield_to_flags(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    Path("easy.toml").write_text('table = ["margins"]\nthreat = "Linf:0.1"\nstrategy = "easy"\nprune-fraction = 0.25\n')
    assert puma(monkeypatch, "plan", "--config", "easy.toml", "--prune-fraction", "0.5", "--out", "easy.parquet") == 0
    plan = Plan.read("easy.parquet")
    assert (plan.strategy, plan.kept) == ("easy", 140)
    Path("odd.toml").write_text("prune_fractoin = 0.5\n")
    assert puma(monkeypatch, "plan", "--config", "odd.toml") == 2


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "puma", "train", "--real", "digits", "--model", "small-cnn", "--recipe", "digits"]
    command += ["--threat", "Linf:0.1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "run" / "metrics.csv"  # its first row comes with the first steps
    while not (metrics.exists() and metrics.read_text().count("\n") > 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir())

"""The verbs in the order in which a person uses them, and what they say to a person's mistakes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import tomllib
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


PLAN = "plan --table margins --threat Linf:0.1"
SCORE = "score model digits?subset=60 --out OUT --quiet"
TRAIN = "train --real digits --threat Linf:0.1 --model small-cnn --recipe digits --out OUT"
TRY = f"{TRAIN} --dry-run"
EVALUATE = "evaluate run --data digits:test?subset=40 --threat Linf:0.1 --attack clean --quiet"
LOOK = "data show plain.npz --quiet"

# What was typed, the exit code, what the answer has to say (the fact, the cause if it is another, the remedy), and the
# command that the remedy leads to, which has to work; after "pip install" and downloads there is none to run.
MISTAKES: list[tuple[str, int, tuple[str, ...], str]] = [
    # names
    ("trian --real digits", 2, ("No such command", "'train'"), "train --help"),
    (f"{PLAN} --strategy pumma", 2, ("unknown strategy", "did you mean 'puma'"), f"{PLAN} --strategy puma"),
    (f"{PLAN} --prune-fracton 0.5", 2, ("No such option", "--prune-fraction"), f"{PLAN} --prune-fraction 0.5"),
    (f"{PLAN} --param cc=1", 2, ("unknown parameter", "did you mean 'c'"), f"{PLAN} --param c=1"),
    (f"{PLAN} --config odd.toml", 2, ("unknown setting", "'prune_fraction'"), f"{PLAN} --config even.toml"),
    (f"{SCORE} --mode fst", 2, ("unknown mode", "did you mean 'fast'"), f"{SCORE} --mode fast"),
    ("score model digit --out OUT", 3, ("digit does not exist", "did you mean 'digits'"), SCORE),
    ("score model digits?subst=60 --out OUT", 2, ("unknown option", "did you mean 'subset'"), SCORE),
    ("score model image.npz --out OUT", 3, ("does not exist", "did you mean 'images.npz'"), "show images.npz"),
    ("score nets:nett digits --out OUT", 4, ("cannot find", "nett", "package.module:factory"), f"{SCORE} --mode fast"),
    ("score Wang2023Better_WRN-28-10 digits --out OUT", 4, ("there is no model at", "robustbench:NAME"), ""),
    (TRAIN.replace("recipe digits", "recipe digit"), 2, ("unknown recipe", "did you mean 'digits'"), TRY),
    (TRAIN.replace("small", "smal"), 2, ("unknown model", "did you mean 'small-cnn'"), TRY),
    (TRAIN.replace("small-cnn", "wrn28-10"), 2, ("unknown model", "wrn-28-10"), "train --help"),
    (f"{TRAIN} --set stepz=3", 2, ("unknown field", "did you mean steps"), f"{TRY} --set steps=3"),
    (f"{TRAIN} --logger tensorbord", 2, ("unknown logger", "'tensorboard'"), f"{TRY} --logger tensorboard"),
    ("evaluate run --data digits:tst --threat Linf:0.1", 2, ("unknown split", "did you mean 'test'"), EVALUATE),
    (f"{EVALUATE} --checkpoint first", 2, ("unknown checkpoint", "last"), f"{EVALUATE} --checkpoint last"),
    (f"{EVALUATE} --attack autoattack", 2, ("unknown attack", "standard"), f"{EVALUATE} --attack standard --dry-run"),
    ("demo --strategies none,pumma --out OUT", 2, ("unknown strategy", "did you mean 'puma'"), "plan --list"),
    ("data show digits?classes=tree", 2, ("unknown class", "There are: 0, 1"), "data show digits?classes=0,1 --quiet"),
    # norm and eps
    ("plan --table margins --threat linf", 2, ("no eps", "Linf:8/255"), "plan --table margins --threat linf:8/255"),
    ("plan --table margins --threat inf", 2, ("no eps", "Linf:8/255"), "plan --table margins --threat inf:8/255"),
    ("plan --table margins --threat 8/255", 2, ("no norm", "Linf:8/255"), "plan --table margins --threat Linf:8/255"),
    ("plan --table margins --threat 0.1", 2, ("no norm", "Linf:0.1"), PLAN),
    (f"{SCORE} --threat l2", 2, ("no eps", "L2:0.5"), f"{SCORE} --threat L2:0.5"),
    ("plan --table margins --threat Linf:8", 2, ("whole pixel range", "8/255"), PLAN.replace("0.1", "8/255")),
    ("plan --table margins --threat L1:0.5", 2, ("unknown norm", "Linf"), PLAN),
    ("plan --table margins --threat Linf=8/255", 2, ("no eps", "Linf:8/255"), PLAN.replace("0.1", "8/255")),
    ("plan --table margins --threat Linf:8/0", 2, ("cannot read", "8/255"), PLAN.replace("0.1", "8/255")),
    ("plan --table margins --threat Linf:-0.1", 2, ("eps = -0.1 is not a number in [0, inf)", "choose eps"), PLAN),
    ("plan --table margins --threat L2:0.5", 3, ("margins are in Linf", "one norm", "--norm L2"), f"{SCORE} --norm L2"),
    (f"{SCORE} --norm L2 --threat Linf:0.1", 2, ("contradicts", "leave out --norm"), f"{SCORE} --threat Linf:0.1"),
    ("demo --eps 8 --out OUT", 2, ("whole pixel range", "8/255"), "demo --help"),
    ("evaluate run --data digits:test --threat 8/255", 2, ("no norm", "Linf:8/255"), EVALUATE),
    # numbers
    (f"{PLAN} --prune-fraction 1.0", 2, ("not in [0, 1)", "share", "0.3"), f"{PLAN} --prune-fraction 0.3"),
    (f"{PLAN} --param c", 2, ("not NAME=VALUE", "--param c=1.0"), f"{PLAN} --param c=1.0"),
    (f"{TRAIN} --set steps", 2, ("is not NAME=VALUE", "--set steps=1000"), f"{TRY} --set steps=1000"),
    (f"{TRAIN} --set steps=-3", 2, ("steps", "greater than 0", "recipe show"), "recipe show trades-edm"),
    (f"{EVALUATE} --attack pgd-20 --subset 5000", 2, ("a subset of 5,000", "1 to 40"), EVALUATE),
    ("study run study.toml --time-budget 5", 2, ("as a time", "25m"), "study run --help"),
    # what is missing, or something else than what was asked for
    ("plan --table nowhere --threat Linf:0.1", 3, ("no margin table", "puma score"), SCORE),
    ("plan --table run --threat Linf:0.1", 3, ("no margin table", "puma score"), SCORE),
    ("plan --table images.npz --threat Linf:0.1", 3, ("not a margin table", "puma show"), "show images.npz"),
    ("plan --table margins", 2, ("Missing option '--threat'", "puma plan -h"), PLAN),
    (f"{PLAN} --strategy el2n-adv", 3, ("no scores 'el2n-adv'", "margins only", "puma score-run"), "score-run --help"),
    (f"{PLAN} --from-file notes.txt", 3, ("no selection", "hello", "one index"), f"{PLAN} --from-file rows.txt"),
    (f"{PLAN} --config broken.toml", 2, ("not TOML", "Invalid value", "recipe show"), f"{PLAN} --config even.toml"),
    ("study run nothing.toml", 2, ("does not exist", "study run --help"), "study run --help"),
    ("study run study.toml", 2, ("unusable settings", "pool.synthetic", "study run --help"), "study run --help"),
    ("study status margins", 3, ("holds no study", "no study.toml", "puma study run"), "study run --help"),
    ("score nowhere digits --out OUT", 4, ("no model at nowhere", "puma train"), TRY),
    ("score small-cnn digits --out OUT", 4, ("no model at small-cnn", "finished run", "puma train"), TRY),
    ("score plan.parquet digits --out OUT", 4, ("not a whole safetensors", "puma show"), "show plan.parquet"),
    ("score model digits?resize=16 --out OUT", 4, ("fails on images of shape", "mat1", "has to return"), SCORE),
    ("evaluate margins --data digits:test --threat Linf:0.1", 4, ("cannot read weights", "puma show"), "show margins"),
    ("evaluate pickle.pt --data digits:test --threat Linf:0.1", 4, ("pickled", "any code", "safetensors"), EVALUATE),
    (f"{TRAIN} --plan plan.parquet", 3, ("180 rows, the pool 898", "plan this pool again"), PLAN),
    (f"{TRAIN} --plan margins", 3, ("not a plan", "directory", "puma show"), "show margins"),
    (TRAIN.replace("digits ", "truncated.npz ", 1), 3, ("truncated.npz", "damaged", "download it again"), LOOK),
    (TRAIN.replace("digits ", "pickled.npz ", 1), 3, ("Python objects", "run code", "uint8 images"), LOOK),
    (TRAIN.replace("digits ", "floats.npz ", 1), 3, ("float64", "nothing is cast", "astype(np.uint8)"), LOOK),
    (TRAIN.replace("digits ", "short.npz ", 1), 3, ("19 labels for 20 images", "one label for each"), LOOK),
    (TRAIN.replace("digits ", "images.npy ", 1), 2, ("no known kind", "np.savez"), LOOK),
    (TRAIN.replace("digits ", "empty ", 1), 3, ("holds no images", "root/cat/1.png"), LOOK),
    ("data show margins", 3, ("no column 'img'", "it has: index", "puma show"), "show margins"),
    ("data unpack plain.npz", 2, ("is not compressed", "use it as it is"), LOOK),
    ("generate --count 9 --out OUT/x.npz", 2, ("nothing to sample from", "puma generate digits"),
     "generate digits --count 9 --out OUT/x.npz --dry-run"),
    ("report margins", 3, ("neither a study nor a run", "metrics.csv", "puma study status"), "report run"),
    ("show nowhere", 3, ("nowhere does not exist", "digits"), "show run"),
    ("verify nowhere", 3, ("nowhere does not exist", "folder of a margin table"), "verify margins --quiet"),
    ("export robustbench run --out OUT --title t", 2, ("needs the model's id", "--name"), "export --help"),
    # devices and processes
    (f"{SCORE} --device gpu", 2, ("unknown device", "cpu"), f"{SCORE} --device cpu"),
    (f"{TRAIN} --device cuda:99", 2, ("no device 'cuda:99'", "are visible", "--device cpu"), f"{TRY} --device cpu"),
    (f"{SCORE} --engine ray --devices 2", 2, ("three ways", "choose one"), SCORE),
    (f"{SCORE} --worker 1", 2, ("together", "--worker 0 --num-workers 2"), f"{SCORE} --worker 0 --num-workers 2"),
    # output
    ("score model digits --out images.npz", 6, ("cannot write", "File exists", "another output path"), SCORE),
    ("score model digits --out margins", 5, ("other settings", "pool.sources", "another output folder"), SCORE),
    (f"{TRAIN.replace('OUT', 'run')}", 5, ("other settings", "recipe.steps: 6 there, 500 now", "another"), TRY),
    (f"{TRAIN.replace('OUT', 'notes.txt')}", 6, ("cannot write notes.txt", "File exists", "another output path"), TRY),
    (f"{PLAN} --out /proc/p.parquet", 6, ("cannot write /proc", "another output path"), f"{PLAN} --out OUT/p.parquet"),
    (f"{PLAN} --out OUT/p.csv", 2, ("does not end in .parquet", "p.parquet"), f"{PLAN} --out OUT/p.parquet"),
    ("generate digits --count 9 --out images.jpg", 2, ("not images.jpg", ".npz"), "generate --help"),
    # what is not installed here, or has to be downloaded
    ("score timm:resnet18 digits --out OUT", 2, ("timm is not installed", "pip install timm"), ""),
    ("score torchvision:resnet18 digits --out OUT", 2, ("not installed", "pip install torchvision"), ""),
    ("score robustbench:A2026B digits --out OUT", 4, ("no A2026B.pt", "not downloaded", "robustbench.git"), ""),
    ("score model hf:mnist:test --out OUT", 2, ("package datasets", "pip install 'puma-robust[hub]'"), ""),
    ("data labels model digits --out OUT", 2, ("cleanlab", 'pip install "puma-robust[labels]"'), ""),
    (f"{TRAIN} --logger wandb", 2, ("needs the package wandb", "pip install wandb"), ""),
    (f"{TRAIN} --logger mlflow", 2, ("needs the package mlflow", "pip install mlflow"), ""),
    (f"{SCORE} --engine ray", 2, ("Ray is not installed", 'pip install "puma-robust[ray]"'), ""),
    ("data show cifar10", 3, ("not on this machine", "datasets is not installed", "hf download uoft-cs/cifar10"), ""),
    ("data show edm-cifar10-1m", 3, ("not on this machine", "sha256", "curl -L -o edm-cifar10-1m.npz"), ""),
]  # fmt: skip
ABSENT = ("timm", "torchvision", "torchvision.models", "datasets", "cleanlab", "wandb", "mlflow", "ray")


@pytest.fixture
def mistaken(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the artefacts as the working directory, with files that hold something else than they should."""
    monkeypatch.chdir(made)
    monkeypatch.delenv("PUMA_DATA", raising=False)
    monkeypatch.delenv("PUMA_MODELS", raising=False)
    images, labels = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10
    images[:, 0, 0, 0] = np.arange(20)
    np.savez("plain.npz", image=images, label=labels)
    np.savez("pickled.npz", image=np.array([{"a": 1}] * 20, object), label=labels)
    np.savez("floats.npz", image=images / 255.0, label=labels)
    np.savez("short.npz", image=images, label=labels[:19])
    np.save("images.npy", images)
    Path("truncated.npz").write_bytes(Path("short.npz").read_bytes()[:700])
    Path("pickle.pt").write_bytes(b"\x80\x04K\x01.")
    Path("empty").mkdir(exist_ok=True)
    for name, text in {
        "odd.toml": "prune_fractoin = 0.5",
        "even.toml": "prune_fraction = 0.5",
        "broken.toml": "a = [",
        "study.toml": 'name = "x"\nthreat = "Linf:0.1"\npool = { real = "digits", test = "digits:test" }\ngrid = []',
        "notes.txt": "hello",
        "rows.txt": "1\n2\n3",
        "nets.py": "net = None",
    }.items():
        Path(name).write_text(text + "\n")
    return made


@pytest.mark.parametrize(("words", "code", "said", "works"), MISTAKES, ids=[row[0][:60] for row in MISTAKES])
def test_a_mistake_gets_fact_cause_and_a_command_that_works(
    mistaken: Path,
    tmp_path: Path,
    words: str,
    code: int,
    said: tuple[str, ...],
    works: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    before = set(mistaken.rglob("*"))
    with monkeypatch.context() as patch:
        for name in ABSENT:
            if not works:
                patch.setitem(sys.modules, name, None)
        assert puma(patch, *words.replace("OUT", str(out)).split()) == code
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    for part in said:
        assert part in text
    assert "Traceback" not in text
    assert re.search("try: |did you mean|Did you mean|Possible options|Try 'puma|write", text)
    assert not {path for path in set(mistaken.rglob("*")) - before if path.suffix in (".parquet", ".safetensors")}
    assert not [path for path in out.rglob("*") if path.is_file()]
    for command in re.findall("`puma ([a-z-]+(?: (?:run|status|list|show|labels|unpack)\\b)?)", text):
        assert puma(monkeypatch, *command.split(), "--help") == 0, command
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for extra in re.findall(r"puma-robust\[(\w+)\]", text):
        assert extra in extras
    for code_of_python in re.findall('python -c "(.+?)"', text):
        compile(code_of_python, "hint", "exec")
    if works and works not in WORKED:
        assert puma(monkeypatch, *works.replace("OUT", str(out)).split()) == 0, capsys.readouterr().err
        WORKED.add(works)


WORKED: set[str] = set()  # commands that a row before has led to


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

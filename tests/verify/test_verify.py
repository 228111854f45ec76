from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from puma.cli.app import app
from puma.data.load import load_dataset
from puma.data.npz import write_npz
from puma.data.pool import Pool
from puma.errors import DataError
from puma.evaluation import evaluate
from puma.generation import DiffusionConfig, SamplerConfig, generate
from puma.generation.diffusion import train_diffusion
from puma.margins import MarginTable
from puma.models.networks import build_model
from puma.models.weights import load_model, save_model, weights_sha256
from puma.scoring.snapshots import embed
from puma.strategies import make_plan
from puma.threat import ThreatModel
from puma.training.loop import train
from puma.training.recipe import load_recipe
from puma.verify import verify

THREAT = ThreatModel("Linf", 0.2)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A margin table, a plan, a run and its evaluation, as a study lays them out; a margin model beside them."""
    folder = tmp_path_factory.mktemp("study") / "study"
    source = load_dataset("digits?subset=200")
    pool = Pool([source])
    write_npz(folder / "synthetic" / "images.npz", [source.read(slice(None))], source.labels)
    model = build_model("small-cnn", 10, in_channels=1, image_size=8, seed=0)
    save_model(model, folder / "margin-model" / "last.safetensors")
    rng = np.random.default_rng(0)
    table = MarginTable(
        label=pool.labels,
        predicted=pool.labels,
        margin=rng.random(200),
        status=np.zeros(200),
        steps=np.ones(200),
        source=pool.source_number,
        meta={
            "norm": "Linf",
            "mode": "refined",
            "settings": {"part_rows": 50},
            "model": {"name": "small-cnn", "sha256": weights_sha256(model)},
            "pool": pool.describe(),
        },
    )
    table.write(folder / "margins", part_rows=50)
    plan = make_plan(table, strategy="puma", prune_fraction=0.3, threat=THREAT, protect_real=False)
    plan.write(folder / "plans" / "puma-30.parquet")
    recipe = load_recipe("digits", steps=2, batch_size=20)
    run = folder / "runs" / "puma-30"
    train("small-cnn", pool, threat=THREAT, plan=plan, recipe=recipe, out=run, validation=0)
    evaluate(load_model(run), load_dataset("digits:test?subset=50"), THREAT, out=run, attack="clean")
    return folder


@pytest.fixture
def copy(study: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(study, tmp_path / "study"))


def bad_files(folder: Path) -> list[str]:
    return [problem.what for problem in verify(folder).problems]


def test_a_whole_study_has_no_problem(study: Path) -> None:
    found = verify(study)
    assert found.problems == []
    assert found.notes == []
    once = dict.fromkeys(("margin table", "plan", "run", "evaluation", "flags", "data"), 1)
    assert {"margin part": 4, **once}.items() <= found.counts.items()
    assert found.counts["weights"] >= 3


def test_a_flipped_bit_is_found_wherever_it_is_guarded(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(path for path in copy.rglob("*") if path.suffix in {".parquet", ".npz", ".safetensors"}):
        data = path.read_bytes()
        for _ in range(4):
            damaged = bytearray(data)
            share = 0.1 if path.suffix == ".parquet" else rng.uniform(0.3, 0.5)
            damaged[int(len(data) * share)] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(damaged))
            assert any(str(path) in problem for problem in bad_files(path.parent)), path
        path.write_bytes(data)
    assert bad_files(copy) == []


def test_every_bad_file_is_listed(copy: Path) -> None:
    (copy / "margins" / "part-000001.parquet").write_bytes(b"PAR1 not any more")
    (copy / "margins" / "part-000003.parquet").write_bytes(b"")
    with (copy / "runs" / "puma-30" / "metrics.csv").open("a") as metrics:
        metrics.write("1")
    (copy / "synthetic" / "images.npz").write_bytes((copy / "synthetic" / "images.npz").read_bytes()[:-50])
    (copy / "notes.json").write_text("{")
    problems = bad_files(copy)
    assert len(problems) == 5
    for name in ("part-000001", "part-000003", "metrics.csv", "images.npz", "notes.json"):
        assert sum(name in problem for problem in problems) == 1


def test_missing_foreign_and_repeated_parts(copy: Path) -> None:
    margins = copy / "margins"
    (margins / "part-000002.parquet").rename(copy / "part-kept")
    assert any("lacks 50 of 200 rows, the first is 100" in problem for problem in bad_files(copy))
    shutil.copy(margins / "part-000001.parquet", margins / "part-000002.parquet")
    assert any("rows" in problem for problem in bad_files(copy))
    table = pq.read_table(copy / "part-kept", pre_buffer=False)
    meta = json.loads(table.schema.metadata[b"puma"])
    meta["norm"] = "L2"
    pq.write_table(table.replace_schema_metadata({"puma": json.dumps(meta)}), margins / "part-000002.parquet")
    assert any("part-000002.parquet is of another table" in problem for problem in bad_files(copy))


def test_artefacts_that_do_not_belong_together(copy: Path) -> None:
    run = copy / "runs" / "puma-30"
    table = MarginTable.read(copy / "margins")
    make_plan(table, strategy="easy", prune_fraction=0.3, threat=THREAT, protect_real=False).write(
        copy / "plans" / "puma-30.parquet"
    )
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("steps = 2", "steps = 3"))
    for name in ("last", "best"):
        save_model(build_model("small-cnn", 10, in_channels=1, image_size=8, seed=5), run / f"{name}.safetensors")
    flags = run / "evaluation-clean.parquet"
    rows = pq.read_table(flags)
    meta = json.loads(rows.schema.metadata[b"puma"]) | {"identity": "other"}
    pq.write_table(rows.replace_schema_metadata({"puma": json.dumps(meta)}), flags)
    problems = bad_files(copy)
    for text in ("from the plan beside it", "from the recipe beside it", "or does not belong to evaluation-clean.json"):
        assert sum(text in problem for problem in problems) == 1, text


def test_what_is_not_there_is_a_note(copy: Path) -> None:
    found = verify(copy / "runs" / "puma-30")
    assert found.problems == []
    assert any("was made from the plan" in note for note in found.notes)
    shutil.rmtree(copy / "margin-model")
    assert any("was made from the margin model" in note for note in verify(copy).notes)


def test_leftovers_of_killed_writers_are_passed_over(copy: Path) -> None:
    (copy / "margins" / ".part-000009.parquet.77.tmp").write_bytes(b"half")
    assert bad_files(copy) == []


def test_weights_without_checksum_are_noted(copy: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3, np.float32)}, copy / "foreign.safetensors")
    found = verify(copy)
    assert found.problems == []
    assert any("foreign.safetensors: it carries no checksum" in note for note in found.notes)


def test_command_line(copy: Path) -> None:
    runner = CliRunner()
    fine = runner.invoke(app, ["verify", str(copy), "--quiet"])
    assert fine.exit_code == 0, fine.output
    assert "no problem" in fine.output
    (copy / "plans" / "puma-30.parquet").write_bytes(b"")
    broken = runner.invoke(app, ["verify", str(copy), "--quiet"])
    assert isinstance(broken.exception, DataError)
    assert broken.exception.exit_code == 3
    assert "puma-30.parquet" in str(broken.exception)
    with pytest.raises(DataError, match="does not exist"):
        verify(copy / "nowhere")


def test_a_folder_named_from_inside(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (copy / "runs" / "puma-30", copy / "runs", copy):
        monkeypatch.chdir(place)
        assert bad_files(Path()) == []
    make_plan(MarginTable.read("margins"), strategy="easy", threat=THREAT, protect_real=False).write(
        "plans/puma-30.parquet"
    )
    assert any("from the plan beside it" in problem for problem in bad_files(Path()))


def test_generated_images_and_the_model_that_made_them(tmp_path: Path) -> None:
    config = DiffusionConfig(width=8, blocks=1, steps=1, batch_size=4)
    out = tmp_path / "made.npz"
    generate(load_dataset("digits"), 20, out=out, config=config, sampler=SamplerConfig(steps=1))
    found = verify(tmp_path)
    assert (found.problems, found.notes) == ([], [])
    model = tmp_path / "made.diffusion" / "model.safetensors"
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert any("made.diffusion/model.safetensors is damaged" in problem for problem in bad_files(tmp_path))
    other = train_diffusion(load_dataset("digits"), tmp_path / "other", config=config, seed=1)
    other.save(tmp_path / "made.diffusion")
    assert any("made.npz was not made from the diffusion model" in problem for problem in bad_files(tmp_path))
    shutil.rmtree(tmp_path / "made.diffusion")
    assert any("made.npz was made from the diffusion model" in note for note in verify(tmp_path).notes)


def test_features_are_compared_with_their_checksums(tmp_path: Path) -> None:
    pool = Pool([load_dataset("digits?subset=200")])
    model = build_model("small-cnn", 10, in_channels=1, image_size=8, seed=0).eval()
    folder = embed(model, pool, tmp_path / "features", part_rows=80)
    found = verify(tmp_path)
    assert not found.problems
    assert found.counts == {"record": 1, "other": 3}
    part = folder / "part-000002.npy"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    (problem,) = bad_files(tmp_path)
    assert "part-000002.npy is damaged" in problem


def test_broken_images_in_parquet_are_found(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [b"no picture"], "label": [0]}), tmp_path / "train.parquet")
    assert any("row 0 cannot be decoded" in problem for problem in bad_files(tmp_path))

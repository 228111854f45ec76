"""Recipes: every packaged one loads, round trips, and says everything that is wrong with it at once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from puma.cli.train import recipe_app
from puma.errors import UsageError
from puma.training.recipe import Recipe, load_recipe, parse_recipe, recipe_names

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("documented", [False, True])
def test_packaged_recipes_round_trip(name, documented):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.source
    assert parse_recipe(tomllib.loads(recipe.to_toml(documented=documented))) == recipe


def test_every_field_is_documented():
    assert {"trades-edm", "trades", "pgd-at", "mart", "digits"} <= set(recipe_names())
    assert all(field.description for field in Recipe.model_fields.values())
    quirks = [field.description for field in Recipe.model_fields.values() if field.description.startswith("Quirk")]
    assert len(quirks) >= 7


def test_the_published_settings():
    recipe = load_recipe("trades-edm")
    assert (recipe.steps, recipe.batch_size, recipe.synthetic_share) == (400 * 98, 512, 0.7)
    assert (recipe.learning_rate, recipe.beta, recipe.label_smoothing) == (0.2, 5.0, 0.1)
    assert recipe.cycle_momentum
    assert not recipe.decay_norm_parameters
    assert recipe.attack_step_linf * 8 / 255 == pytest.approx(2 / 255)
    assert recipe.attack_step_l2 * 128 / 255 == pytest.approx(2 * (128 / 255) / 10)
    assert load_recipe("trades").attack_step_linf * 0.031 == pytest.approx(0.007)
    assert load_recipe("trades").attack_batchnorm == "eval"


def test_all_problems_at_once():
    with pytest.raises(UsageError) as caught:
        parse_recipe(
            {"name": "x", "steps": -1, "bach_size": 3, "learning_rate": 0.1, "schedule": "step", "momentum": 0}
        )
    text = str(caught.value)
    for problem in (
        "steps: Input should be greater than 0",
        "batch_size: Field required",
        "unknown field bach_size (did you mean batch_size?)",
    ):
        assert problem in text
    with pytest.raises(UsageError) as caught:
        load_recipe("digits", schedule="step", momentum=0.0)
    assert 'schedule "step" needs milestones; nesterov needs momentum' in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"milestones": (0.5,)}, "milestones belong to"),
        ({"schedule": "step", "milestones": (0.7, 0.5)}, "rising shares"),
        ({"cutmix": True}, "unknown field cutmix"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batchnorm_first_step": True}, "needs batchnorm_momentum"),
    ],
)
def test_contradictions(changes, said):
    with pytest.raises(UsageError, match=said):
        load_recipe("digits", **changes)


def test_recipes_of_committed_results_are_read():
    recipe = load_recipe(RESULTS / "cifar10-16px" / "recipes" / "cifar10-16px.toml")
    assert recipe == load_recipe(RESULTS.parent / "studies" / "recipes" / "cifar10-16px.toml")


def test_files(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        load_recipe("digit")
    with pytest.raises(UsageError, match="does not exist"):
        load_recipe(tmp_path / "none.toml")
    path = tmp_path / "mine.toml"
    path.write_text("steps = [")
    with pytest.raises(UsageError, match="not TOML"):
        load_recipe(path)
    path.write_text(load_recipe("digits", name="mine", steps=7).to_toml(documented=True))
    assert load_recipe(path).steps == 7


def test_command_line():
    shown = CliRunner().invoke(recipe_app, ["show", "trades-edm"])
    assert shown.exit_code == 0
    for name, field in Recipe.model_fields.items():
        assert name in shown.output
        assert field.description in shown.output
    listed = CliRunner().invoke(recipe_app, ["list"]).output
    assert all(name in listed for name in recipe_names())

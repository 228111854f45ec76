"""``puma recipe``: the settings of training, by name."""

from __future__ import annotations

from typing import Annotated

import typer

recipe_app = typer.Typer(help="Recipes: the frozen settings of training.", no_args_is_help=True)


@recipe_app.command("list")
def list_recipes() -> None:
    """List the packaged recipes, with where their settings come from."""
    from puma.training.recipe import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        typer.echo(f"{name:12} {recipe.objective}, {recipe.steps:,} steps of {recipe.batch_size}: {recipe.source}")


@recipe_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A name of `puma recipe list`, or a TOML file.")],
    plain: Annotated[bool, typer.Option("--plain", help="Without the explanations.")] = False,
) -> None:
    """Print every field of a recipe with its meaning, as TOML: save it, change it, and train with the file."""
    from puma.training.recipe import load_recipe

    typer.echo(load_recipe(name).to_toml(documented=not plain), nl=False)

"""The documentation site builds without a broken link or reference."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from puma.cli.app import app

ROOT = Path(__file__).parents[2]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "puma.make_plan" in api or "make_plan" in api
    assert (tmp_path / "site" / "architecture" / "index.html").is_file()


def test_the_readme_links_to_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert len(text.splitlines()) <= 120


def commands(text: str) -> list[list[str]]:
    """The words of every `puma` command in the shell blocks of a page, continued lines joined, comments cut off."""
    parts = re.split(r"^```(.*)$", text, flags=re.MULTILINE)  # prose, kind, block, "", prose, kind, ...
    blocks = [block for kind, block in zip(parts[1::4], parts[2::4], strict=True) if kind in ("", "sh", "bash")]
    lines = re.findall(r"(?:^|[;&] |-m |srun |exec )puma (.+)", "\n".join(blocks).replace("\\\n", " "), re.MULTILINE)
    return [re.split(r"\s#|&&|;", line)[0].split() for line in lines]


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_the_commands_of_the_pages_exist_with_their_options(page: str) -> None:
    for words in commands((ROOT / page).read_text()):
        command: Any = typer.main.get_command(app)
        rest = list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, (page, words)
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert options <= known | {"--help", "--version"}, (page, words)


def test_there_are_commands_in_the_pages() -> None:
    assert len(commands((ROOT / "README.md").read_text())) >= 5
    assert len(commands((ROOT / "docs" / "cifar10.md").read_text())) >= 15


def test_the_dockerfile_copies_and_installs_what_is_there() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    copied = [word for kind, words in steps if kind == "COPY" for word in words.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied), copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert set(copied) == {line[1:] for line in ignored if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "src", project["readme"], *project["license-files"]} <= set(copied)
    installs = [words for kind, words in steps if kind == "RUN" and "pip install" in words]
    extras = {
        extra for words in installs for found in re.findall(r"'\.\[(.+?)\]'", words) for extra in found.split(",")
    }
    assert extras
    assert extras <= project["optional-dependencies"].keys()
    torch = re.findall(r"^torch==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(torch) == 1
    assert "$(grep '^torch==' constraints.txt)" in installs[0]
    words = [word for kind, text in steps if kind in ("ENTRYPOINT", "CMD") for word in json.loads(text)]
    assert words[0] == "puma"
    assert words[1] in typer.main.get_command(app).commands  # type: ignore[attr-defined]

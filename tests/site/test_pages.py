"""What the pages of book/ promise is true: their code runs, the commands they name exist, every reference is cited."""

import re
from pathlib import Path

import pytest
import typer

from companion.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "book").glob("*.md"))
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}


def blocks(language):
    found = [
        (name, code) for name, text in TEXTS.items() for code in re.findall(rf"```{language}\n(.*?)```", text, re.S)
    ]
    return [pytest.param(code, id=f"{name}-{i}") for i, (name, code) in enumerate(found)]


def find_command(words):
    """The command that these words of a command line name, and the words left over."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    return command, words


@pytest.mark.parametrize("code", blocks("python"))
def test_python_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {})


@pytest.mark.parametrize("lines", blocks("bash"))
def test_command_lines_are_understood(lines):
    for line in lines.splitlines():
        program, *words = line.split()
        assert program == "companion"
        command, rest = find_command(words)
        command.make_context(line, rest)  # parses and runs nothing


@pytest.mark.parametrize("words", sorted(set(re.findall(r"`companion ([a-z ]+)`", " ".join(TEXTS.values())))))
def test_commands_named_in_the_text_exist(words):
    assert find_command(words.split())[1] == []


def test_make_targets_named_in_the_text_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`make (\w+)`", " ".join(TEXTS.values())))
    assert named <= set(re.findall(r"^(\w+):", makefile, re.M))


def test_networks_named_on_the_map_exist():
    from companion import models

    section = TEXTS["map"].partition("## The chapter's networks")[2]
    first_cells = " ".join(re.findall(r"^\| (`.*?) \|", section, re.M))
    assert set(re.findall(r"`(\w+)`", first_cells)) == set(models.names())


def test_every_reference_is_cited_and_every_page_is_in_the_contents():
    cited = {
        key
        for text in TEXTS.values()
        for keys in re.findall(r"{cite(?::\w+)?}`([^`]+)`", text)
        for key in keys.split(",")
    }
    entries = set(re.findall(r"^@\w+{(\w+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"), re.M))
    assert entries == cited
    contents = set(re.findall(r"book/(\w+)", (ROOT / "_toc.yml").read_text(encoding="utf-8")))
    assert contents == set(TEXTS)

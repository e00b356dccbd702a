"""Links in READMEs resolve, and the commands in them exist with their options."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from elastic.cli.parser import parser

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for folder in (".", ".github", "configs", "elastic", "losses", "students", "teachers", "tests")
    for path in (ROOT / folder).glob("**/*.md" if folder != "." else "*.md")
)
LINES = 180
"""Largest number of lines of the main README, which should be read in one go."""


def anchors(page: Path) -> set[str]:
    """Return the anchors by which the headings of a page can be linked."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"
        assert ROOT in target.parents, f"{page.relative_to(ROOT)} links to {link}, which is outside of the repository"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page: Path) -> None:
    """The command line parses every `elastic ...` in an indented block, without comments and what follows `&&`."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    root = parser()
    for line in re.findall(r"^ {4,}((?:elastic) .*)$", text, re.M):
        words = shlex.split(re.sub(r"\bC\b(?!:)", "0.7", line.split(" && ")[0]), comments=True)
        try:
            root.parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{page.relative_to(ROOT)}: {line}")


def test_every_command_is_explained() -> None:
    page = (ROOT / "elastic" / "README.md").read_text(encoding="utf-8")
    (commands,) = (each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    assert not [name for name in commands.choices if f"elastic {name} " not in page and f"elastic {name}\n" not in page]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LINES

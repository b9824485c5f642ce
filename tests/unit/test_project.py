"""Consistency of pyproject.toml, requirements.txt, README and docs."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from covergenre import __version__
from covergenre.schema import REASONS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^\s;]+( ; .+)?", line) for line in wanted), wanted
    return {name: version.split(" ;")[0] for name, version in (w.split("==", 1) for w in wanted)}


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_pinned_version_is_within_the_range_of_the_dependency(line: str) -> None:
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins()[requirement.name])


def test_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_lists_every_module() -> None:
    tree = (ROOT / "README.md").read_text().split("## Project layout")[1].split("##")[0]
    modules = {path.name for path in (ROOT / "covergenre").rglob("*.py")}
    named = set(re.findall(r"\b(\w+\.py)\b", tree.split("jobs/")[0]))
    assert named == modules - {"__init__.py"}


def test_links_in_the_docs_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    anchors = {
        page: {
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.M)
        }
        for page in pages
    }
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), (page.name, link)
            assert not anchor or anchor in anchors[target], (page.name, link)


def test_docs_list_every_reason_of_rejection() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/formats.md").read_text(), re.M)
    assert {name: text for name, text in listed if name in REASONS} == REASONS

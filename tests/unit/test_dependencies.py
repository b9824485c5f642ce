"""What this Python lacks is said in one line, also where nothing is installed."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from covergenre import dependencies

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_packages_are_those_of_the_project() -> None:
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    assert {requirement.name for requirement in requirements} == set(dependencies.PACKAGES)
    for requirement in requirements:
        oldest = dependencies.PACKAGES[requirement.name][1]
        least = min(
            Version(spec.version.removesuffix(".*"))
            for spec in requirement.specifier
            if spec.operator in (">=", "==")
        )
        assert Version(oldest) == least, requirement
    assert PROJECT["requires-python"].startswith(">=" + ".".join(map(str, dependencies.PYTHON)))


def test_nothing_is_missing_here() -> None:
    assert dependencies.missing_requirements() == ""


def test_missing_and_old_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dependencies.PACKAGES | {
        "click": ("click", "999.1"),
        "no-such-a": ("no_such_a", "1"),
        "no-such-b": ("no_such_b", "1"),
    }
    monkeypatch.setattr(dependencies, "PACKAGES", changed)
    line = dependencies.missing_requirements()
    assert "\n" not in line
    assert f"at {sys.executable})" in line
    assert " lacks the packages no-such-a, no-such-b and has click 8." in line
    assert "(999.1 or newer is needed); install requirements.txt on every machine: uv pip" in line


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert (
        "is too old: covergenre needs Python 3.11 or newer" in dependencies.missing_requirements()
    )


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.15.0+cpu", (2, 15, 0)), ("8.2", (8, 2)), ("2.60rc1", (2, 60))]
)
def test_a_version_is_compared_by_its_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert dependencies._numbers(version) == numbers


@pytest.mark.parametrize(
    "command", [["-m", "covergenre", "--version"], ["jobs/train.py", "--help"]]
)
def test_a_python_without_packages_says_what_it_lacks(command: list[str]) -> None:
    # -S: without site-packages
    done = subprocess.run(
        [sys.executable, "-S", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("covergenre: this machine (") and done.stderr.count("\n") == 1
    needed = [name for name in dependencies.PACKAGES if name not in dependencies.USED_BY_SOME]
    assert f" lacks the packages {', '.join(needed)}; install" in done.stderr


@pytest.mark.parametrize(
    "path",
    [
        "covergenre/__init__.py",
        "covergenre/__main__.py",
        "covergenre/dependencies.py",
        *(f"jobs/{stage}.py" for stage in ("prepare", "train", "evaluate", "score")),
    ],
)
def test_what_runs_first_can_be_parsed_by_an_old_python(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 7))
    annotations = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg)]
    annotations += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    # list[str] and X | None cannot be evaluated there.
    assert all(isinstance(a, ast.Constant | ast.Name | None) for a in annotations)

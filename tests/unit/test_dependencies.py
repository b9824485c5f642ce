"""The check of Python and package versions, also without any packages installed."""

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


def test_packages_and_versions_are_those_of_pyproject() -> None:
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    assert {requirement.name for requirement in requirements} == set(dependencies.PACKAGES)
    for requirement in requirements:
        minimum = min(
            Version(spec.version.removesuffix(".*"))
            for spec in requirement.specifier
            if spec.operator in (">=", "==")
        )
        assert Version(dependencies.PACKAGES[requirement.name][1]) == minimum, requirement
    assert PROJECT["requires-python"].startswith(">=" + ".".join(map(str, dependencies.PYTHON)))


def test_nothing_is_missing_in_this_environment() -> None:
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
    for fact in (sys.executable, "no-such-a, no-such-b", "click 8.", "999.1", "requirements.txt"):
        assert fact in line


def test_old_python_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    line = dependencies.missing_requirements()
    assert sys.executable in line and "Python 3.11" in line


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.15.0+cpu", (2, 15, 0)), ("8.2", (8, 2)), ("2.60rc1", (2, 60))]
)
def test_versions_are_compared_by_their_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert dependencies._numbers(version) == numbers


@pytest.mark.parametrize(
    "command", [["-m", "covergenre", "--version"], ["jobs/train.py", "--help"]]
)
def test_missing_packages_are_reported_without_site_packages(command: list[str]) -> None:
    # -S: without site-packages
    done = subprocess.run(
        [sys.executable, "-S", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("covergenre: ") and done.stderr.count("\n") == 1
    required = [name for name in dependencies.PACKAGES if name not in dependencies.OPTIONAL]
    assert f" {', '.join(required)};" in done.stderr


@pytest.mark.parametrize(
    "path",
    [
        "covergenre/__init__.py",
        "covergenre/__main__.py",
        "covergenre/dependencies.py",
        *(f"jobs/{stage}.py" for stage in ("prepare", "train", "evaluate", "score")),
    ],
)
def test_entry_points_can_be_parsed_by_old_pythons(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 7))
    annotations = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg)]
    annotations += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    # Old Pythons cannot evaluate list[str] and X | None.
    assert all(isinstance(a, ast.Constant | ast.Name | None) for a in annotations)

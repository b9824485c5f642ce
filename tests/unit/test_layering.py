"""Slow packages are imported inside functions; packages import each other in one direction only.

The layers are defined in pyproject.toml, [tool.importlinter].
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "covergenre"
STAGES = {"prepare", "train", "evaluate", "score"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


PATHS = {module_name(path): path for path in PACKAGE.rglob("*.py")}
MODULES = sorted(PATHS)

# Imported inside functions only, so that --help and `import covergenre` stay fast.
SLOW = {
    "boto3",
    "matplotlib",
    "nncf",
    "openvino",
    "pandas",
    "ray",
    "sklearn",
    "torch",
    "torchvision",
}
TORCH = {"torch", "torchvision"}
# Modules that may import torch or Ray at the top; others must import these inside functions.
AT_TOP = {
    "covergenre.api.torch_dataset": TORCH,
    "covergenre.models.frozen_prefix": TORCH,
    "covergenre.models.inference": TORCH,
    "covergenre.models.int8": TORCH,
    "covergenre.models.networks": TORCH,
    "covergenre.models.pretrained": TORCH,
    "covergenre.models.summary": TORCH,
    "covergenre.training.dev_evaluation": TORCH,
    "covergenre.training.features": TORCH,
    "covergenre.training.ranks": TORCH,
    "covergenre.training.state": TORCH,
    "covergenre.training.worker": TORCH,
    "covergenre.cluster.dashboard_client": {"ray"},
    "covergenre.cluster.ray_internals": {"ray"},
}
# Modules that --help may import.
LIGHT = {
    "covergenre",
    "covergenre.cli",
    "covergenre.config",
    "covergenre.config_errors",
    "covergenre.errors",
    "covergenre.genre_text",
    "covergenre.progress",
    "covergenre.registry",
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text())


def imported(nodes: list[ast.stmt] | ast.Module) -> set[str]:
    """Imported names with dots: `a.b` for `import a.b` and for `from a import b`."""
    found: set[str] = set()
    parts = [nodes] if isinstance(nodes, ast.Module) else nodes
    for node in (inner for part in parts for inner in ast.walk(part)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def at_top(module: str) -> set[str]:
    """Names that `module` imports outside of functions, and not only for type checkers."""
    statements = []
    for node in tree(module).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            statements.append(node)
    return imported(statements)


def own(names: set[str]) -> set[str]:
    """The modules of covergenre among the imported names."""
    found = {name for name in names if name.split(".")[0] == "covergenre"}
    return {name if name in PATHS else name.rpartition(".")[0] for name in found}


def others(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {"covergenre"}


def test_packages_import_lower_packages_only() -> None:
    # In a subprocess, because import-linter disables the loggers of its process.
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_modules_of_help_import_no_slow_packages(module: str) -> None:
    assert not others(at_top(module)) & (SLOW | {"numpy", "pyarrow", "PIL"})
    assert own(at_top(module)) <= LIGHT


def test_cli_imports_pydantic_inside_functions() -> None:
    assert "covergenre.config" not in own(at_top("covergenre.cli"))
    assert "pydantic" not in others(at_top("covergenre.cli") | at_top("covergenre.errors"))


@pytest.mark.parametrize("module", MODULES)
def test_slow_imports_are_inside_functions(module: str) -> None:
    found = others(at_top(module)) & SLOW - AT_TOP.get(module, set())
    assert not found, f"{module} imports {sorted(found)} at its top; import it inside a function"
    chain, seen = own(at_top(module)), set[str]()
    while chain:
        needed = chain.pop()
        seen.add(needed)
        chain |= own(at_top(needed)) - seen
    for needed in seen & set(AT_TOP):
        assert AT_TOP[needed] <= AT_TOP.get(module, set()), f"{module} imports {needed} at its top"


def test_jobs_import_only_the_entry_point() -> None:
    paths = sorted((ROOT / "jobs").glob("*.py"))
    assert {path.stem for path in paths} == STAGES
    for path in paths:
        assert imported(ast.parse(path.read_text())) == {"sys", "covergenre.__main__.main"}

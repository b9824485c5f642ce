"""Who may import whom. A module imports from lower layers alone, at its top or inside a function.

A new module belongs in LAYERS: as low as what it needs allows.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "covergenre"

LAYERS = (
    # what everything stands on, and ideas that need nothing of ours
    {
        "__init__",
        "addresses",
        "environment",
        "errors",
        "schema",
        "augment",
        "autoscaling",
        "content",
        "drawing",
        "pacing",
        "genre_lists",
        "genre_text",
        "parquet",
        "messages",
        "jpeg_repair",
        "order",
        "repair",
    }
    | {"progress", "s3"},
    # one idea each, with errors of their own
    {"covers", "embedded_ray", "genres", "metrics", "registry", "sample", "splits", "storage"}
    | {"proxies", "settings_file", "submit"},
    # files, settings and networks
    {"catalog_files", "checkpoints", "config", "decoding", "fetch", "genre_map"}
    | {"models", "runtime", "shards"}
    | {"leases", "report"},
    {"bundle", "dataset", "doctor", "ingest", "model_card", "mumu", "places", "summary", "weights"},
    {"catalog", "plan"},
    {"predict", "prepare"},
    # the stages; training is what train's workers do
    {"evaluate", "score", "training"},
    {"train"},
    # all of it together
    {"demo"},
    {"cli"},
    {"__main__"},
)
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}
STAGES = {"prepare", "train", "evaluate", "score"}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# What takes long to import, or is wanted by few: inside functions only, where --help passes.
SLOW = {"boto3", "matplotlib", "pandas", "ray", "sklearn", "torch", "torchvision"}
# Those that are made of it may have it at their top; then others import them inside functions.
NETWORK = {"torch", "torchvision"}
# Of ours, what --help may import.
LIGHT = {"__init__", "errors", "registry", "config", "genre_text"}
AT_TOP = {
    "models": NETWORK,
    "summary": NETWORK,
    "training": NETWORK,
    "weights": NETWORK,
    "pacing": {"ray"},  # a class of Ray's, filled in
}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported(nodes: list[ast.stmt] | ast.Module) -> set[str]:
    """Names as they are imported, with dots: `a.b` for `import a.b` and for `from a import b`."""
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
    """What importing `module` imports: not inside functions, not for type checkers alone."""
    statements = []
    for node in tree(module).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            statements.append(node)
    return imported(statements)


def own(names: set[str]) -> set[str]:
    """The modules of covergenre among imported names."""
    parts = [name.split(".") for name in names if name.split(".")[0] == "covergenre"]
    return {part[1] if part[1] in MODULES else "__init__" for part in parts}


def others(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - {"covergenre"}


def test_every_module_has_one_layer() -> None:
    listed = [module for modules in LAYERS for module in modules]
    assert len(listed) == len(set(listed)), "a module is in two layers"
    new = set(MODULES) - set(listed)
    assert not new, f"say in LAYERS of {__file__} where these belong: {sorted(new)}"
    gone = set(listed) - set(MODULES)
    assert not gone, f"take these out of LAYERS of {__file__}: {sorted(gone)}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_lower_layers_only(module: str) -> None:
    for needed in sorted(own(imported(tree(module)))):
        assert LAYER[needed] < LAYER[module], (
            f"{module} (layer {LAYER[module]}) imports {needed} (layer {LAYER[needed]})"
        )


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_as_low_as_it_can_be(module: str) -> None:
    needs = [LAYER[needed] for needed in own(imported(tree(module)))]
    assert LAYER[module] == max(needs, default=-1) + 1


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_no_stage_imports_another(stage: str) -> None:
    assert not own(imported(tree(stage))) & STAGES
    for module in own(imported(tree(stage))):
        assert not own(imported(tree(module))) & STAGES, f"{stage} imports a stage by {module}"


@pytest.mark.parametrize("module", sorted(LIGHT | {"cli"}))
def test_help_imports_nothing_heavy(module: str) -> None:
    assert not others(at_top(module)) & (SLOW | {"numpy", "pyarrow", "PIL"})
    for needed in own(at_top(module)):
        assert needed in LIGHT, f"{module} needs {needed}"


def test_the_command_line_makes_nobody_wait_for_pydantic() -> None:
    assert "config" not in own(at_top("cli"))
    assert "pydantic" not in others(at_top("cli")) | others(at_top("errors"))


@pytest.mark.parametrize("module", MODULES)
def test_what_is_slow_to_import_is_imported_where_it_is_used(module: str) -> None:
    found = others(at_top(module)) & SLOW - AT_TOP.get(module, set())
    assert not found, f"{module} imports {sorted(found)} at its top; a function should"
    chain, seen = own(at_top(module)), set[str]()
    while chain:
        needed = chain.pop()
        seen.add(needed)
        chain |= own(at_top(needed)) - seen
    for needed in seen & set(AT_TOP):
        assert AT_TOP[needed] <= AT_TOP.get(module, set()), f"{module} imports {needed} at its top"


def test_the_jobs_import_the_entry_point_alone() -> None:
    paths = sorted((PACKAGE.parent / "jobs").glob("*.py"))
    assert {path.stem for path in paths} == STAGES
    for path in paths:
        assert imported(ast.parse(path.read_text())) == {"sys", "covergenre.__main__.main"}

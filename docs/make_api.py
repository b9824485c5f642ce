"""Write docs/api.md from the docstrings of the public names: python docs/make_api.py

A test fails if the file does not match the docstrings.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import covergenre

HEADER = """\
# Python API

Generated from the docstrings by `python docs/make_api.py`. Paths are `str` or `pathlib.Path`, local
or s3://. Errors are subclasses of `covergenre.errors.CovergenreError`: one line, and a `code` where
one class covers several problems. The package logs to the logger `covergenre`, prints nothing and
shows progress only where `progress=True` is given.
"""
ORDER = (
    *("load_model", "Model", "Scores", "load_dataset", "CoverDataset", "read_labels"),
    *("prepare", "PreparedDataset", "train", "TrainingRun", "evaluate", "Evaluation"),
    *("quantize", "QuantizedModel", "score", "ScoringRun", "ProgressEvent", "BatchPredictor"),
)
SECTIONS = r"(Args|Attributes|Returns|Raises|Settings, with their defaults|Columns[^\n]*):"
ITEM = re.compile(r"([a-z_]\w*(?:, \w+)*|\w+Error(?:, \w+Error)*)( \([^)]*\)|)?: (.*)", re.S)


def make() -> str:
    """The text of docs/api.md."""
    assert sorted(ORDER) == [name for name in covergenre.__all__ if name != "__version__"]
    return "\n".join([HEADER, *map(entry, ORDER)])


def entry(name: str) -> str:
    """The section of a public name."""
    value = getattr(covergenre, name)
    if not inspect.isclass(value):
        return f"## {name}\n\n{signature(name, value)}\n{text(value.__doc__)}"
    lines = [f"## {name}\n\n{text(value.__doc__)}"]
    if name == "BatchPredictor":
        lines.append(f"{signature(name, value)}\n{text(value.__init__.__doc__)}")
    for base in reversed(value.__mro__):
        if not base.__module__.startswith("covergenre"):
            continue
        for member, found in vars(base).items():
            if member.startswith("_"):
                continue
            if inspect.isfunction(found):
                heading = signature(f"{name}.{member}", found, method=True)
                lines.append(f"### {name}.{member}\n\n{heading}\n{text(found.__doc__)}")
            elif found.__doc__ and hasattr(found, "__get__"):
                lines.append(f"### {name}.{member}\n\n{text(found.__doc__)}")
    return "\n".join(lines)


def signature(name: str, function: Any, *, method: bool = False) -> str:
    """`name(...)` with parameters and defaults in a code block, without annotations."""
    parameters = list(inspect.signature(function).parameters.values())[method:]
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    shown, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        shown.append(str(parameter).replace("'", '"'))
    line = f"{name}({', '.join(shown)})"
    if len(line) > 100:
        line = f"{name}(\n    " + ",\n    ".join(shown) + ",\n)"
    return f"```python\n{line}\n```\n"


def text(docstring: str | None) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    out: list[str] = []
    in_section = False
    for line in lines:
        if heading := re.fullmatch(SECTIONS, line):
            in_section = True
            out += [f"**{heading[1]}**", ""]
        elif in_section and line.startswith("    ") and not line.startswith("     "):
            item = ITEM.fullmatch(line.strip())
            out.append(f"- `{item[1]}`{item[2] or ''}: {item[3]}" if item else line.strip())
        elif in_section and line.startswith("     "):
            out.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line
            out.append(line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(make())

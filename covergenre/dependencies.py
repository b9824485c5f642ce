"""Whether this Python can run covergenre: its version, and the packages it has.

Imports the standard library only and avoids new syntax, because it has to run, and to say what is
missing, where nothing is installed and on an old Python.
"""

import importlib.util
import platform
import sys

PYTHON = (3, 11)
PACKAGES = {
    "backports-zstd": ("backports.zstd", "1.0"),
    "boto3": ("boto3", "1.36"),
    "brotli": ("brotli", "1.2"),
    "click": ("click", "8.2"),
    "idna": ("idna", "3.7"),
    "matplotlib": ("matplotlib", "3.8"),
    "numpy": ("numpy", "1.26"),
    "pandas": ("pandas", "2.2"),
    "pillow": ("PIL", "11.3"),
    "psutil": ("psutil", "5.9"),
    "pyarrow": ("pyarrow", "21.0"),
    "pydantic": ("pydantic", "2.7"),
    "pyyaml": ("yaml", "6.0"),
    "ray": ("ray", "2.60"),
    "safetensors": ("safetensors", "0.4.5"),
    "scikit-learn": ("sklearn", "1.5"),
    "tenacity": ("tenacity", "9.0"),
    "torch": ("torch", "2.11"),
    "torchvision": ("torchvision", "0.26"),
    "tqdm": ("tqdm", "4.66"),
    "urllib3": ("urllib3", "2.2"),
}
"""Package -> (module, oldest version), as pyproject.toml says; a test compares them."""
USED_BY_SOME = ("backports-zstd", "boto3", "brotli")
"""Imported where they are used, and a job may do without: one that has no data on S3, say."""


def missing_requirements(ignored: "tuple[str, ...]" = ()) -> str:
    """One line on what this Python lacks, where, and how to fix it; empty if it lacks nothing.

    ignored: packages that it may lack.
    """
    here = f"this machine ({platform.node()}, Python {platform.python_version()}"
    here += f" at {sys.executable})"
    if sys.version_info[:2] < PYTHON:
        return f"{here} is too old: covergenre needs Python {PYTHON[0]}.{PYTHON[1]} or newer"
    from importlib import metadata

    missing: list[str] = []
    old: list[str] = []
    for package, (module, oldest) in PACKAGES.items():
        if package in ignored:
            continue
        if not _is_found(module):
            missing.append(package)
            continue
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:  # installed without its metadata
            continue
        if _numbers(found) < _numbers(oldest):
            old.append(f"{package} {found} ({oldest} or newer is needed)")
    lacks: list[str] = []
    if missing:
        lacks.append(f"lacks the package{'s' * (len(missing) > 1)} {', '.join(missing)}")
    if old:
        lacks.append(f"has {', '.join(old)}")
    if not lacks:
        return ""
    return (
        f"{here} {' and '.join(lacks)}; install requirements.txt on every machine:"
        " uv pip install -r requirements.txt"
    )


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def _numbers(version: str) -> "tuple[int, ...]":
    """2.15.0+cpu -> (2, 15, 0)"""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def check_environment() -> None:
    """End the process with one line and exit code 2 where covergenre cannot run."""
    line = missing_requirements(ignored=USED_BY_SOME)
    if line:
        print(f"covergenre: {line}", file=sys.stderr)
        sys.exit(2)

"""Checks the version of Python and of the required packages.

Imports the standard library only and uses old syntax, so that it can report what is missing on old
Pythons and where no package is installed.
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
"""Package -> (module, minimum version), as in pyproject.toml; a test compares them."""
OPTIONAL = ("backports-zstd", "boto3", "brotli")
"""Imported on use only: for example, boto3 is not needed for local paths."""


def missing_requirements(ignored: "tuple[str, ...]" = ()) -> str:
    """One line with the machine, the missing or old packages and the fix; empty if there are none.

    ignored: packages that are not checked.
    """
    here = f"Python {platform.python_version()} at {sys.executable} on {platform.node()}"
    if sys.version_info[:2] < PYTHON:
        return f"{here} is too old; install Python {PYTHON[0]}.{PYTHON[1]} or newer"
    from importlib import metadata

    missing: list[str] = []
    old: list[str] = []
    for package, (module, minimum) in PACKAGES.items():
        if package in ignored:
            continue
        if not _is_found(module):
            missing.append(package)
            continue
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:  # installed without its metadata
            continue
        if _numbers(found) < _numbers(minimum):
            old.append(f"{package} {found} ({minimum} or newer is required)")
    problems: list[str] = []
    if missing:
        problems.append(f"lacks the package{'s' * (len(missing) > 1)} {', '.join(missing)}")
    if old:
        problems.append(f"has {', '.join(old)}")
    if not problems:
        return ""
    return (
        f"{here} {' and '.join(problems)}; run on every machine: uv pip install -r requirements.txt"
    )


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
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
    """Exit with one line and code 2 if a required package is missing or too old."""
    line = missing_requirements(ignored=OPTIONAL)
    if line:
        print(f"covergenre: {line}", file=sys.stderr)
        sys.exit(2)

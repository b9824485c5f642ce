"""Formatting helpers for messages: plurals, articles and shortened lists."""

import math
from collections.abc import Sequence


def plural(count: float, singular: str, several: str = "") -> str:
    """`1 machine`, `2 machines`, `1,024 machines`, `0.5 CPUs`.

    several: the plural form, if it is not `singular` + "s": plural(n, "row has", "rows have").
    """
    number = f"{count:g}" if isinstance(count, float) else f"{count:,}"
    return f"{number} {singular if count == 1 else several or singular + 's'}"


def decimal(value: float | None, digits: int) -> str:
    """`0.123`, or `n/a` for None and NaN."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def file_size(size: float) -> str:
    """`5.0 KiB`, `1.5 MiB`, `22.7 GiB`."""
    units = [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")]
    unit, name = next((unit for unit in units if size >= unit[0]), units[-1])
    return f"{size / unit:,.1f} {name}"


def with_article(noun: str) -> str:
    """`a train run`, `an evaluate run`: chosen by the first letter."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def shortened(names: Sequence[str], most: int = 3) -> str:
    """`A, B and C`; with more than `most` names, `A, B, C and 3 more`."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most:,} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))

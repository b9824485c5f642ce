"""pydantic's validation errors as one-line errors that name the setting, the value and the fix."""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from covergenre.errors import ConfigError, did_you_mean

_PROBLEMS = {
    "bool_parsing": "expected true or false",
    "finite_number": "expected a finite number",
    "float_parsing": "expected a number",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_from_float": "expected an integer",
    "int_parsing": "expected an integer",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le:g}",
    "string_pattern_mismatch": "must not be blank",
    "string_too_short": "must not be empty",
    "value_error": "{error}",
}
"""pydantic's error type -> our message; pydantic's own message is used for other types."""


def config_error(
    error: ValidationError, stage: type[BaseModel], shown: Mapping[str, str]
) -> ConfigError:
    """One line for the first problem. shown: how to refer to a setting (default: its name)."""
    first = error.errors()[0]
    kind, name, value = first["type"], str(first["loc"][0]), first["input"]
    where = shown.get(name, name)
    if kind == "extra_forbidden":
        near = did_you_mean(name, stage.model_fields)
        return ConfigError(f"{stage.__name__} has no setting {name!r}{near}", code="unknown")
    if kind == "missing":
        about = stage.model_fields[name].description
        return ConfigError(f"{where} is missing; expected: {about}", code="missing")
    if kind == "literal_error" and isinstance(value, str):
        problem = "is not a valid value" + did_you_mean(value, options(stage, name))
        return ConfigError(f"{where}: {value!r} {problem}", code="invalid")
    if kind in _PROBLEMS:
        problem = _PROBLEMS[kind].format(**first.get("ctx", {}))
    else:
        problem = first["msg"][:1].lower() + first["msg"][1:]
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return ConfigError(f"{where}: {value!r}: {problem}", code="invalid")


def _options(annotation: Any) -> list[Any]:
    """The values of a Literal, also of an optional one; empty if `annotation` has none."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for inner in get_args(annotation) for value in _options(inner)]


def options(stage: type[BaseModel], name: str) -> list[str]:
    """The allowed values of the setting `name`; empty if it is not a choice."""
    return [str(value) for value in _options(stage.model_fields[name].annotation)]

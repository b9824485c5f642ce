"""Parses the YAML file of --config: setting names, values as text, and line numbers."""

from typing import Any

import yaml

from covergenre.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_NULL = f"{_TAG}null"
_MERGE = f"{_TAG}merge"


class _TextLoader(yaml.SafeLoader):
    """Loads plain scalars as text; only null and the merge key (<<) are interpreted.

    YAML 1.1 reads 2:8 as 128, 010 as 8, no as false and 2020-01-01 as a date. The settings classes
    convert text, so that a value in a file means the same as in a flag.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  as in the base class
        first: [resolver for resolver in resolvers if resolver[0] in (_NULL, _MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (_NULL, None)},
        **{
            f"{_TAG}{kind}": getattr(yaml.SafeLoader, f"construct_yaml_{kind}")
            for kind in ("seq", "map")
        },
        # Values with explicit types (`!!int 3`) are loaded as text, too.
        **{
            f"{_TAG}{kind}": yaml.SafeLoader.construct_yaml_str
            for kind in ("str", "bool", "int", "float", "timestamp")
        },
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Raises if a key of the mapping is set twice. Merge keys are not expanded yet."""
        node = super().compose_mapping_node(anchor)
        assert isinstance(node, yaml.MappingNode)
        _check_unique(node, str)
        return node


def read_settings(text: bytes, file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(name -> text, None or a list of these; name -> line number). Names have _ instead of -.

    Raises ConfigError with the file and the line.
    """
    try:
        loader = _TextLoader(text)  # raises yaml.reader.ReaderError
        try:
            root = loader.get_single_node()
            if root is None:
                return {}, {}
            if not isinstance(root, yaml.MappingNode):
                if root.tag == _NULL:
                    return {}, {}
                raise _InvalidSettings(
                    "expected settings as `name: value` lines", root, "invalid_file"
                )
            _check_unique(root, _setting_name)
            values = loader.construct_document(root)
        finally:
            loader.dispose()
        lines: dict[str, int] = {}
        for key, value in root.value:  # merged keys come first
            items = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(item, yaml.ScalarNode) for item in items):
                raise _InvalidSettings(
                    f"{key.value}: expected a value or a list of values", key, "invalid"
                )
            lines[_setting_name(key.value)] = key.start_mark.line + 1
    except _InvalidSettings as error:
        raise ConfigError(f"{file}{_line(error)}: {error.problem}", code=error.code) from error
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "cannot be parsed"
        if r"'\t'" in problem:
            problem = "has a tab; use spaces"
        raise _not_yaml(file + _line(error), problem) from error
    except yaml.reader.ReaderError as error:
        raise _not_yaml(file, f"{error.reason}; save it as UTF-8") from error
    except RecursionError as error:
        raise _not_yaml(file, "nested too deeply") from error
    return {_setting_name(str(key)): value for key, value in values.items()}, lines


class _InvalidSettings(yaml.MarkedYAMLError):
    """Valid YAML that is not a valid config file."""

    def __init__(self, problem: str, node: yaml.Node, code: str) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)
        self.code = code


def _not_yaml(where: str, problem: str) -> ConfigError:
    return ConfigError(f"{where}: not valid YAML: {problem}", code="invalid_file")


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" line {mark.line + 1}" if mark else ""


def _setting_name(key: str) -> str:
    return key.replace("-", "_")


def _check_unique(node: yaml.MappingNode, name_of: Any) -> None:
    first: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # an error when it is constructed
        name = name_of(key.value)
        earlier = first.setdefault(name, key)
        if earlier is not key:
            as_ = f" as {earlier.value}" if earlier.value != key.value else ""
            line = earlier.start_mark.line + 1
            raise _InvalidSettings(
                f"{key.value} is set twice, first in line {line}{as_}; remove one", key, "duplicate"
            )

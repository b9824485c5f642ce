"""The YAML of a --config file: names and values as they are written, with the line of each."""

from typing import Any

import yaml

from covergenre.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_NULL = f"{_TAG}null"
_MERGE = f"{_TAG}merge"


class _TextLoader(yaml.SafeLoader):
    """Reads a plain value as text; only null and the merge key (<<) keep their meaning.

    YAML 1.1 reads 2:8 as 128, 010 as 8, no as false and 2020-01-01 as a date. The settings convert
    text themselves, and a value in a file has to mean what it means as a flag.
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
        # Written out (`!!int 3`), a type is left to the settings as well.
        **{
            f"{_TAG}{kind}": yaml.SafeLoader.construct_yaml_str
            for kind in ("str", "bool", "int", "float", "timestamp")
        },
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Composes a mapping. Raises for a key that is set twice: here each mapping is seen once,
        before merge keys are expanded."""
        node = super().compose_mapping_node(anchor)
        assert isinstance(node, yaml.MappingNode)
        _check_unique(node, str)
        return node


def read_settings(text: bytes, file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """(name -> text, None or a list of these; name -> its line). Names have _ for -.

    Raises ConfigError with the file and the line.
    """
    try:
        loader = _TextLoader(text)  # reads, and so may fail, too
        try:
            root = loader.get_single_node()
            if root is None:
                return {}, {}
            if not isinstance(root, yaml.MappingNode):
                if root.tag == _NULL:
                    return {}, {}
                raise _mistake("expected settings as `name: value` lines", root)
            _check_unique(root, _setting_name)
            values = loader.construct_document(root)
        finally:
            loader.dispose()
        lines: dict[str, int] = {}
        for key, value in root.value:  # with what was merged, which comes first
            items = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(item, yaml.ScalarNode) for item in items):
                raise _mistake(f"{key.value}: expected a value or a list of values", key)
            lines[_setting_name(key.value)] = key.start_mark.line + 1
    except _Mistake as error:
        raise ConfigError(f"{file}{_line(error)}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "cannot be parsed"
        if r"'\t'" in problem:
            problem = "has a tab; use spaces"
        raise ConfigError(f"{file}{_line(error)}: not valid YAML: {problem}") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{file}: not valid YAML: {error.reason}; save it as UTF-8") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: not valid YAML: nested too deeply") from error
    return {_setting_name(str(key)): value for key, value in values.items()}, lines


class _Mistake(yaml.MarkedYAMLError):
    """Valid YAML that is no settings file."""


def _mistake(problem: str, node: yaml.Node) -> _Mistake:
    return _Mistake(problem=problem, problem_mark=node.start_mark)


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" line {mark.line + 1}" if mark else ""


def _setting_name(key: str) -> str:
    return key.replace("-", "_")


def _check_unique(node: yaml.MappingNode, name_of: Any) -> None:
    first: dict[str, yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # constructing it is refused
        name = name_of(key.value)
        earlier = first.setdefault(name, key)
        if earlier is not key:
            as_ = f" as {earlier.value}" if earlier.value != key.value else ""
            line = earlier.start_mark.line + 1
            raise _mistake(f"{key.value} is set twice, first in line {line}{as_}", key)

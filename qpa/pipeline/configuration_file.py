"""The values in a configuration file, each with the line where it stands.

Rules:
1. A file is YAML, of which mappings, lists and plain values are used; tags and Python objects are not.
2. What a value is follows from the option that it is for, not from YAML's rules for numbers: 1e-3 is a
   number, and 5000 a text where a text is wanted.
3. A list may also be one text with commas, as on the command line.
4. The resolved configuration of a run, `configuration.json`, is such a file too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from qpa.documents.base import OptionValue
from qpa.documents.resolved_configuration import ResolvedConfiguration
from qpa.errors import ConfigurationError, one_sentence
from qpa.pipeline.options import Option

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"


@dataclass(frozen=True)
class Given:
    """One value of a file.

    Args:    path: the names that lead to it, such as ("train", "max_steps").
             node: the value as it is written.
             place: the file and the line, for errors.
    """

    path: tuple[str, ...]
    node: Any
    place: str

    @property
    def is_null(self) -> bool:
        """Return whether there is a name with nothing behind it."""
        return str(self.node.tag) == _NULL

    @property
    def has_parts(self) -> bool:
        """Return whether names with values of their own stand below."""
        return isinstance(self.node, yaml.MappingNode)

    def words(self) -> str:
        """Return the value in a few words, for an error."""
        if isinstance(self.node, yaml.ScalarNode):
            return self.node.value[:80] or "nothing"
        return "names with values" if self.has_parts else "a list"

    def value_for(self, option: Option, place: str) -> OptionValue:
        """Return the value as the option's type has it; None for none.

        A text that is no number stays one: the option's own check refuses it in its own words.

        Raises:  ConfigurationError: it is a list where one value is wanted, or the other way.
        """
        if self.is_null:
            return None
        if option.kind is tuple:
            return tuple(self._items(place))
        if not isinstance(self.node, yaml.ScalarNode):
            raise ConfigurationError(place, "one value", self.words())
        if option.kind is bool:
            if self.node.tag != _BOOL:
                raise ConfigurationError(place, "true or false", self.words())
            return bool(SafeConstructor.bool_values[self.node.value.lower()])
        return _number(self.node.value, option.kind)

    def _items(self, place: str) -> Iterator[str]:
        """Yield the texts of a list; of names with values name=value."""
        if isinstance(self.node, yaml.ScalarNode):
            yield from (name.strip() for name in self.node.value.split(",") if name.strip())
            return
        for part in self.node.value:
            parts = part if isinstance(part, tuple) else (part,)
            if not all(isinstance(one, yaml.ScalarNode) for one in parts):
                raise ConfigurationError(place, "a list of names", "a list of other things")
            yield "=".join(one.value for one in parts)


def read_tree(path: Path) -> list[Given]:
    """Return everything that a file gives: sections, what stands in them, and what has no section.

    Raises:  ConfigurationError: the file cannot be read, is no YAML, has no names, or has one twice.
             DocumentError: the resolved configuration of a run is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        found = "no such file" if not path.exists() else error.strerror or type(error).__name__
        raise ConfigurationError(str(path), "a configuration file", found, "qpa init prints one") from error
    if path.suffix == ".json" and _is_document(content):
        return _of_document(path, content)
    root = _compose(content, str(path))
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        found = Given((), root, "").words()
        raise ConfigurationError(_place(path, root), "names with values, such as model: ..", found)
    return list(_parts(path, root, ()))


def set_values(sets: Sequence[str]) -> list[Given]:
    """Return what texts such as "train.max_steps=200" give.

    Raises:  ConfigurationError: one has no equals sign, or its value is no YAML.
    """
    found = []
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigurationError("`set`", "an option and a value, train.max_steps=200", text)
        found.append(Given(tuple(name.split(".")), _node(value, f"`set` {name}"), "`set`"))
    return found


def _parts(path: Path, mapping: yaml.MappingNode, above: tuple[str, ...]) -> Iterator[Given]:
    """Yield what stands in a mapping, and in the sections in it, each after its section."""
    lines: dict[str, int] = {}
    for key, node in mapping.value:
        place = _place(path, key)
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigurationError(place, "a name", Given((), key, "").words())
        if key.value in lines:
            found = f"it again; it is in line {lines[key.value]} already"
            raise ConfigurationError(place, f"{'.'.join((*above, key.value))} once", found)
        lines[key.value] = key.start_mark.line + 1
        given = Given((*above, key.value), node, place)
        yield given
        # Of an option below a section names with values are a value: --columns question=prompt.
        if isinstance(node, yaml.MappingNode) and (not above or above == ("export",)):
            yield from _parts(path, node, given.path)


def _compose(content: bytes | str, subject: str) -> yaml.Node | None:
    try:
        return yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{subject}, line {mark.line + 1}" if mark else subject
        problem = one_sentence(error.problem or str(error))
        if "'\\t'" in problem:
            raise ConfigurationError(place, "spaces before a name", "a tab") from error
        raise ConfigurationError(place, "YAML", f"a syntax error ({problem})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(subject, "YAML in UTF-8", one_sentence(error)) from error


def _node(text: str, place: str) -> yaml.Node:
    """Return the node of a value on the command line, where a text needs no quotes."""
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        node = _compose(text, place)
        assert node is not None
        return node
    tag = yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False))
    return yaml.ScalarNode(tag, text)


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def _number(text: str, kind: type) -> OptionValue:
    if kind in (int, float):
        try:
            number: OptionValue = kind(text)
        except ValueError:
            return text
        return number
    return text


def _is_document(content: bytes) -> bool:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "schema" in found


def _of_document(path: Path, content: bytes) -> list[Given]:
    document = ResolvedConfiguration.from_json(content, str(path))
    found = []
    for one in document.options:
        node = _compose(json.dumps(one.value), str(path))
        assert node is not None
        found.append(Given(tuple(one.name.split(".")), node, str(path)))
    formats = _compose(json.dumps(document.formats), str(path))
    assert formats is not None
    return [Given(("export",), formats, str(path)), *found]

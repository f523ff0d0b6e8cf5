"""Settings: frozen types whose values are checked, and which say in words what is legal.

A group of keys is a dataclass made by :func:`settings`. Its docstring says what the group is for,
the string under each field what the key means; errors and ``--help`` are read from both.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass as _plain_dataclass
from dataclasses import fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import core_schema

T = TypeVar("T")


class SettingsError(ValueError):
    """One line: the key, what was given, and what is legal."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass, by keyword only, that refuses unknown keys and illegal values. What keys
    must be together is said by a method with pydantic's ``model_validator``; its ValueError is the
    whole line."""
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    return dataclass(frozen=True, kw_only=True, config=config)(cls)


class Words:
    """Beside an annotation: what is legal there, where its parts do not say it well."""

    def __init__(self, text: str) -> None:
        self.text = text


class OneOf:
    """Beside ``Any``: one of these values and of the same type; for the names in a registry."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.literal_schema(list(self.values))


@_plain_dataclass(frozen=True)
class Key:
    """One key: its name with dots, its annotation, and what the string under it says."""

    name: str
    annotation: Any
    meaning: str


Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Count = Annotated[int, Strict(), Field(ge=1, lt=2**63)]  # 1, 2, ...
Whole = Annotated[int, Strict(), Field(ge=0, lt=2**63)]  # 0, 1, ...
Number = Annotated[float, Strict(), Field(ge=0)]  # of at least 0
Positive = Annotated[float, Strict(), Field(gt=0)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]


def read(kind: type[T], tree: Mapping[str, Any]) -> T:
    """``tree``, plain data as of a YAML file, as ``kind``. Every key must be there: defaults are
    given by :func:`defaults`, so that what is missing was taken away.

    Raises SettingsError.
    """
    present = _present(kind, tree)
    check_keys(kind, present)
    for key in keys(kind, tree):
        if key.name not in present:
            raise SettingsError(f"{key.name} is missing; give it as {key.name}=VALUE")
    try:
        return _adapter(kind).validate_python(tree)
    except ValidationError as error:
        raise SettingsError(_explained(kind, tree, error)) from None


def _present(kind: type, tree: Mapping[str, Any]) -> list[str]:
    """The keys that ``tree`` has; what is inside of a mapping of free names is no key."""
    free = free_names(kind)
    names = {
        key: next((x for x in free if key.startswith(x + ".")), key) for key, _ in values(tree)
    }
    return list(dict.fromkeys(names.values()))


def free_names(kind: type) -> list[str]:
    """The keys that are mappings with names of the user's own."""
    return [key.name for key in keys(kind) if _is_mapping(key.annotation)]


def _is_mapping(annotation: Any) -> bool:
    annotation, _ = _split(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return any(map(_is_mapping, get_args(annotation)))
    return get_origin(annotation) is dict


def defaults(kind: type) -> dict[str, Any]:
    """The default of every key that has one, groups within groups."""
    tree = {}
    for name, annotation in _hints(kind).items():
        members = _groups(annotation)
        if len(members) == 1:
            tree[name] = defaults(members[0])
        elif not members and not (field := kind.__pydantic_fields__[name]).is_required():
            tree[name] = _plain(field.get_default(call_default_factory=True))
    return tree


def keys(kind: type, tree: Mapping[str, Any] | None = None) -> list[Key]:
    """Every key, with dots. A group that may be of several types has the keys of the one that
    ``tree`` names, or of all of them."""
    result = []
    for name, annotation in _hints(kind).items():
        members = _groups(annotation)
        if len(members) > 1 and tree and isinstance(tree.get(name), Mapping):
            members = [m for m in members if m.name == tree[name].get("name")] or members
        result += _keys_of(kind, name, tuple(members))
    return result


@cache
def _keys_of(kind: type, name: str, members: tuple[type, ...]) -> list[Key]:
    """Of one field, which is a key or a group of one of these types."""
    if not members:
        return [Key(name, _hints(kind)[name], _meaning(kind, name))]
    inside = {key.name: key for member in reversed(members) for key in keys(member)}
    order = dict.fromkeys(key.name for member in members for key in keys(member))
    return [replace(inside[key], name=f"{name}.{key}") for key in order]


def check_keys(kind: type, names: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raises SettingsError for one that does not exist, with those that are near; ``others`` are
    legal too."""
    known = {key.name for key in keys(kind)} | set(others)
    for key in names:
        if key not in known:
            same = sorted(each for each in known if each.rpartition(".")[2] == key)  # without group
            near = same or difflib.get_close_matches(key, known, 3, 0.5)
            near = near or sorted({each.split(".")[0] for each in known})
            raise SettingsError(f"unknown key {key!r}; did you mean: {', '.join(near)}?")


def groups(kind: type) -> set[str]:
    """The keys that hold other keys."""
    names = [key.name for key in keys(kind)]
    return {name.rsplit(".", n)[0] for name in names for n in (1, 2) if name.count(".") >= n}


def words(annotation: Any, value: Any = None) -> str:
    """What is legal where ``value`` was given."""
    annotation, notes = _split(annotation)
    for note in notes:
        if isinstance(note, Words):
            return note.text
        if isinstance(note, OneOf):
            return f"one of: {', '.join(map(str, note.values))}"
    if get_origin(annotation) in (Union, UnionType):
        parts = [x for x in get_args(annotation) if x is not NoneType]
        null = ["null"] if len(parts) < len(get_args(annotation)) else []
        return " or ".join([*null, *(words(part, value) for part in parts)])
    if get_origin(annotation) is Literal:
        legal = get_args(annotation)
        return f"one of: {', '.join(map(str, legal))}" if len(legal) > 1 else str(legal[0])
    if get_origin(annotation) is list:
        if not isinstance(value, list):
            return "a list, as [A,B]"
        return f"a list, each of it {words(get_args(annotation)[0], value[0] if value else None)}"
    if annotation is bool:
        return "one of: True, False"
    if annotation is str:
        return "text"
    bounds = {}
    for note in notes:
        for bound in getattr(note, "metadata", [note]):
            for name in ("ge", "gt", "le", "lt"):
                if getattr(bound, name, None) is not None:
                    bounds[name] = getattr(bound, name)
    if annotation is int:
        large = isinstance(value, int) and value >= bounds.get("lt", math.inf)
        return f"an integer of at least {bounds['ge']}" + (" and below 2**63" if large else "")
    least = f"above {bounds['gt']:g}" if "gt" in bounds else f"of at least {bounds.get('ge', 0):g}"
    return f"a finite number {least}" + (f" and at most {bounds['le']:g}" if "le" in bounds else "")


def _explained(kind: type, tree: Any, error: ValidationError) -> str:
    """The first of the errors in one line."""
    first = error.errors()[0]
    path, value, annotation, chosen = [], tree, kind, ""
    for part in first["loc"]:
        members = _groups(annotation)
        if len(members) > 1:  # the name of the type that was chosen
            annotation = next(m for m in members if m.name == part)
            chosen = f" with {'.'.join(path)}={part}"
        elif members and part in _hints(members[0]):
            annotation = _hints(members[0])[part]
            value = value[part]
            path.append(str(part))
        else:
            break
    if first["type"] == "value_error" and not (path and not _groups(annotation)):
        return str(first["ctx"]["error"])
    if first["type"].startswith("union_tag"):
        path.append("name")
        value, legal = value.get("name"), ", ".join(m.name for m in _groups(annotation))
        return f"{'.'.join(path)} must be one of: {legal}; got {value!r}"
    return f"{'.'.join(path)} must be {words(annotation, value)}{chosen}; got {value!r}"


@cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotation of every field."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _meaning(kind: type, name: str) -> str:
    """The string under the field, in the class that has it."""
    for base in kind.__mro__:
        field = getattr(base, "__pydantic_fields__", {}).get(name)
        if field is not None and field.description:
            return " ".join(field.description.split())
    return ""


def _groups(annotation: Any) -> list[type]:
    """The settings that an annotation consists of: one, several of a union, or none."""
    annotation, _ = _split(annotation)
    if is_dataclass(annotation):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType):
        members = [_split(x)[0] for x in get_args(annotation)]
        return members if all(map(is_dataclass, members)) else []
    return []


def _split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """(annotation, what stands beside it)."""
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        return inner, tuple(notes)
    return annotation, ()


def values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, with dots, and its value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from values(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _plain(value: Any) -> Any:
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value

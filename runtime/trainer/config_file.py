"""YAML -> TrainConfig: every key is known and of its type, or the file is refused with all its problems named."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from runtime.trainer.config import TrainConfig

MAX_CONFIG_BYTES = 1 << 20
_MERGE = "tag:yaml.org,2002:merge"  # the key <<
# PyYAML raises ValueError for what looks like a date and is none, RecursionError for deep nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


class ConfigError(ValueError):
    """A configuration that cannot be used; `str()` is the sentence for the user."""


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read, apply `KEY.SUBKEY=VALUE` overrides, check. Paths in the file are relative to the working folder.

    Raises ConfigError with every unknown key, wrong type and value out of range by name.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        raw = _load(content.decode("utf-8")) if len(content) <= MAX_CONFIG_BYTES else None
    except ConfigError as cause:
        raise ConfigError(f"{path}: {cause}") from None
    except (OSError, *_NOT_YAML) as cause:
        raise ConfigError(f"{path}: cannot be read as YAML ({' '.join(str(cause).split())[:200]})") from None
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: is larger than the {MAX_CONFIG_BYTES:,} bytes that a configuration may have")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, found {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    problems: list[str] = []
    config = _build(TrainConfig, raw, "", problems)
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    try:
        config.validate()
    except ValueError as cause:
        raise ConfigError(f"{path}: {cause}") from None
    return typing.cast(TrainConfig, config)


def as_plain(config: object) -> Any:
    """A configuration as what JSON and YAML can hold."""
    if dataclasses.is_dataclass(config):
        return {field.name: as_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): as_plain(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [as_plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def as_flat(config: object) -> dict[str, str]:
    """A configuration as the table of a model card: `optimizer.lr` to its value in words."""

    def flat(prefix: str, value: object) -> dict[str, str]:
        if not isinstance(value, dict):
            return {prefix: str(value)}
        return {key: text for name, item in value.items() for key, text in flat(f"{prefix}.{name}", item).items()}

    return {key.removeprefix("."): text for key, text in flat("", as_plain(config)).items()}


def from_plain(raw: Mapping[str, Any], where: str) -> TrainConfig:
    """The inverse of `as_plain`, for a configuration kept beside a checkpoint; raises ConfigError naming `where`."""
    problems: list[str] = []
    config = _build(TrainConfig, dict(raw), "", problems)
    if problems:
        raise ConfigError(f"{where}: " + "; ".join(problems))
    return typing.cast(TrainConfig, config)


def _load(text: str) -> Any:
    """What YAML says, if no key stands twice in a mapping: PyYAML would take the last one and say nothing."""
    waiting, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # named by an alias once more
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return yaml.safe_load(text)


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            where = f"in line {line}" if lines[key.value] == line else f"in lines {lines[key.value]} and {line}"
            raise ConfigError(f"{key.value} is set twice, {where}: remove one of them")
        lines[key.value] = line


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, for instance optimizer.lr=1e-4")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {parent} is not a group of keys")
        node = child
    try:
        node[leaf] = _load(text)
    except ConfigError as cause:
        raise ConfigError(f"--set {override!r}: {cause}") from None
    except _NOT_YAML as cause:
        raise ConfigError(f"--set {override!r}: {' '.join(str(cause).split())[:200]}") from None


def _build(cls: type, raw: object, where: str, problems: list[str]) -> Any:
    """An instance of the dataclass, or None after adding to `problems`."""
    if not isinstance(raw, dict):
        problems.append(f"{where or 'the file'} must hold keys and values, found {raw!r}")
        return None
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            problems.append(f"{prefix}{key} is not a setting{hint}")
    values, num_before = {}, len(problems)
    for name, field in known.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], f"{prefix}{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is missing")
    return cls(**values) if len(problems) == num_before else None


def _convert(hint: Any, value: object, where: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, problems)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where, problems)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(arguments[0], item, where, problems) for item in items)
    if origin is Mapping:
        if not isinstance(value, dict):
            problems.append(f"{where} must hold keys and values, found {value!r}")
            return {}
        return {str(key): _convert(arguments[1], item, f"{where}[{key!r}]", problems) for key, item in value.items()}
    return _scalar(hint, value, where, problems)


def _scalar(hint: type, value: object, where: str, problems: list[str]) -> Any:
    if hint is Path and isinstance(value, str) and value:
        return Path(value).expanduser()
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and type(value) in (int, float):
        try:
            return float(typing.cast(float, value))
        except OverflowError:  # a whole number of more than 308 digits
            problems.append(f"{where} is a number of {len(str(value))} digits, which is too large")
            return None
    if type(value) is hint:
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    problems.append(f"{where} = {value!r} must be {names[hint]}")
    return None

"""Where configuration values come from: defaults < YAML files left to right < `FORGE_*` variables < `--a.b` flags.

Owns reading, merging and remembering the origin of every value. Does not own the schema (`config/`).
Each trap of the libraries beneath is an error here: a missing or empty file, a key given twice, a variable or flag
that names no field, a union whose kind changes while values of the old kind remain.

Variables are read by pydantic-settings; flags take YAML values, so that `--pretrain.steps 5` reads as it does in a
file.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

from forge_ray.config import OPERATIONAL, ForgeConfig
from forge_ray.config.train import shape_of
from forge_ray.errors import ConfigError

ENV_PREFIX = "FORGE_"


@dataclass(frozen=True)
class Resolved:
    """A validated configuration and, for each dotted field that something set, what set it."""

    config: ForgeConfig
    origins: Mapping[str, str]

    def rows(self) -> list[tuple[str, Any, str]]:
        """Every leaf as (dotted name, value, origin), in schema order."""
        leaves = _leaves(self.config.model_dump(mode="json"), "")
        return [(name, value, self.origin(name)) for name, value in leaves]

    def origin(self, name: str) -> str:
        """What set this field: itself, or (a list is set whole) the nearest parent that was set."""
        return _origin(self.origins, name) or "default"


def _origin(origins: Mapping[str, str], name: str) -> str | None:
    while name:
        if name in origins:
            return origins[name]
        name = name.rpartition(".")[0]
    return None


def _all_origins(origins: Mapping[str, str], name: str) -> list[str]:
    """What set this field or, where it was put together from several layers, every layer that set a part of it."""
    below = dict.fromkeys(origin for field, origin in origins.items() if field.startswith(f"{name}."))
    return list(below) or [_origin(origins, name) or "default"]


def resolve(
    files: Sequence[str | Path], flags: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Resolved:
    """Merges all layers and validates the result.

    Args:
        files: YAML files, later ones override earlier ones; lists are replaced whole.
        flags: Command-line words such as `--pretrain.steps=5` or `--pretrain.steps 5`.
        environ: Stands in for `os.environ`.

    Raises:
        ConfigError: Naming the file, variable or flag, the value, what was wanted and what to do.
    """
    layers = [(str(path), read_yaml(Path(path))) for path in files]
    layers += _env_layers(os.environ if environ is None else environ)
    layers += _flag_layers(flags)
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        _merge(merged, layer, "", origin, origins)
    _fill_kinds(merged, ForgeConfig)
    try:
        config = ForgeConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, origins) from None
    if config.model.depth:
        for name in shape_of(config.model.depth):
            origins.setdefault(f"model.{name}", origins["model.depth"])
    return Resolved(config, origins)


def reference(*, show_kinds: bool = False) -> list[tuple[str, str, str, str]]:
    """Every field as (dotted name, type, default, docstring), for `forge config`.

    Args:
        show_kinds: Write `pretrain.optimizer[muon].momentum`: the field is there only with this `kind`.
    """
    return list(_reference(ForgeConfig, "", show_kinds))


def fields(sections: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """The reference's rows of these sections or single fields, or all rows; kinds are shown.

    Raises:
        ConfigError: A word names no section and no field.
    """
    rows, plain = reference(show_kinds=True), [row[0] for row in reference()]
    for section in sections:
        if not any(f"{name}.".startswith(f"{section}.") for name in plain):
            near = difflib.get_close_matches(section, plain, n=1)
            hint = f"did you mean `forge config {near[0]}`?" if near else "`forge config` lists every field"
            raise ConfigError("no such section or field", got=section, do=hint)
    prefixes = tuple(f"{section}." for section in sections) or ("",)
    return [row for row, name in zip(rows, plain, strict=True) if f"{name}.".startswith(prefixes)]


# ---------------------------------------------------------------------------------------------------------- layers


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *base` adds keys that the mapping itself may override
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, (list, dict)):
            raise yaml.MarkedYAMLError(problem=f"the key at line {line} is no name")
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice, at lines {seen[key]} and {line}")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
# As in YAML 1.2 only true and false are booleans, so that `off` is the word; where one is wanted, pydantic takes both.
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse_yaml(text: str) -> Any:
    # 4e-3 is a string in YAML 1.1 (no dot); pydantic turns it into a float, so both spellings work.
    return yaml.load(text, Loader=_UniqueKeyLoader)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, as written: a key that stands twice is an error, and `off` is a word.

    Raises:
        ConfigError: It is missing, cannot be read, is no YAML or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file, e.g. jobs/demo.yaml"
        raise ConfigError("configuration file not found", got=path, do=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file cannot be read: {error}", got=path) from None
    try:
        data = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", do="mend the line named above") from None
    if not isinstance(data, dict):
        got = "an empty file" if data is None else type(data).__name__
        raise ConfigError(
            f"{path} holds no configuration", got=got, wanted="a mapping of sections", do="see jobs/demo.yaml"
        )
    return data


def _env_layers(environ: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    names = sorted(name for name in environ if name.upper().startswith(ENV_PREFIX))
    for name in names:
        _check_path(name[len(ENV_PREFIX) :].lower().split("__"), f"environment variable {name}")
    layers = []
    for name in names:
        dotted = name[len(ENV_PREFIX) :].lower().replace("__", ".")
        layers.append((f"${name}", _env_values(name, environ[name], dotted)))
    return layers


def _env_values(name: str, value: str, dotted: str) -> dict[str, Any]:
    if any(part.isdigit() for part in dotted.split(".")):
        return _nest(dotted.split("."), _flag_value(name, value))
    # Built per variable so that each value keeps its own origin; the library splits the name and decodes JSON.
    schema = type(
        "_Env", (BaseSettings,), {"__annotations__": {k: f.annotation for k, f in ForgeConfig.model_fields.items()}}
    )
    source = EnvSettingsSource(schema, env_prefix=ENV_PREFIX, env_nested_delimiter="__", case_sensitive=False)
    source.env_vars = {name.lower(): value}
    try:
        values = source()
    except SettingsError:
        raise ConfigError(f"environment variable {name} is not valid JSON", got=value, do="quote it as JSON") from None
    return {key: value for key, value in values.items() if value != {}}


def _flag_layers(flags: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    layers, words = [], list(flags)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError("unexpected argument", got=word, wanted="a YAML file or --section.field value")
        dotted, equals, text = word[2:].partition("=")
        _check_path(dotted.split("."), f"flag --{dotted}")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"flag --{dotted} has no value", do=f"write --{dotted}=VALUE")
            text = words.pop(0)
        layers.append((f"--{dotted}", _nest(dotted.split("."), _flag_value(f"--{dotted}", text))))
    return layers


def _flag_value(name: str, text: str) -> Any:
    try:
        return _parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"{name} is not a valid YAML value", got=text, do="quote it") from None


def _nest(parts: list[str], value: Any) -> dict[str, Any]:
    for part in reversed(parts):
        value = {part: value}
    return value


def _merge(target: dict[str, Any], layer: Mapping[str, Any], prefix: str, origin: str, origins: dict[str, str]) -> None:
    if not isinstance(layer, Mapping):
        return
    _check_kind_change(target, layer, prefix, origin, origins)
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        old = target.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict):
            _merge(old, value, f"{dotted}.", origin, origins)
        elif isinstance(value, Mapping) and isinstance(old, list):
            _merge_list(old, value, dotted, origin, origins)
        elif isinstance(value, Mapping):
            target[key] = {}
            _merge(target[key], value, f"{dotted}.", origin, origins)
        else:
            for name in [n for n in origins if n.startswith(f"{dotted}.")]:
                del origins[name]
            target[key] = value
            origins[dotted] = origin


def _merge_list(items: list[Any], layer: Mapping[str, Any], dotted: str, origin: str, origins: dict[str, str]) -> None:
    for index, value in layer.items():
        if not str(index).isdigit() or int(index) >= len(items):
            raise ConfigError(f"{origin} names no item of {dotted}", got=index, wanted=f"0 to {len(items) - 1}")
        holder = {index: items[int(index)]}
        _merge(holder, {index: value}, f"{dotted}.", origin, origins)
        items[int(index)] = holder[index]


def _check_kind_change(
    target: dict[str, Any], layer: Mapping[str, Any], prefix: str, origin: str, origins: dict[str, str]
) -> None:
    if "kind" not in layer or "kind" not in target or layer["kind"] == target["kind"]:
        return
    stale = sorted(key for key in target if key != "kind" and key not in layer)
    if stale:
        raise ConfigError(
            f"{prefix}kind changes from {target['kind']!r} to {layer['kind']!r} while values of the old kind remain",
            got=", ".join(f"{prefix}{key} (from {', '.join(_all_origins(origins, prefix + key))})" for key in stale),
            do=f"remove them where they were set, or set them again in {origin}",
        )


# ---------------------------------------------------------------------------------------------------------- schema


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's type can hold, through Annotated, unions and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_of(arg)]


def _check_path(parts: list[str], where: str) -> None:
    """Refuses a dotted path that names no field, with the nearest one that does."""
    models: list[type[BaseModel]] = [ForgeConfig]
    for depth, part in enumerate(parts):
        if part.isdigit() and depth:
            continue
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        if part not in fields:
            every = [row[0] for row in reference()]
            near = difflib.get_close_matches(".".join(parts), every, n=1) or difflib.get_close_matches(
                part, fields, n=1
            )
            hint = f"did you mean {near[0]}?" if near else "`forge config` lists every field"
            raise ConfigError(f"{where} names no field", got=".".join(parts), do=hint)
        if get_origin(fields[part].annotation) is dict and len(parts) <= depth + 2:
            return  # a key of the user's own
        models = _models_of(fields[part].annotation)


def _fill_kinds(values: dict[str, Any], model: type[BaseModel]) -> None:
    """Who sets a field of a union without naming its kind means the kind that is the default."""
    for name, field in model.model_fields.items():
        value = values.get(name)
        if not isinstance(value, dict):
            continue
        if "kind" not in value and hasattr(field.default, "kind"):
            value["kind"] = field.default.kind
        for inner in _models_of(field.annotation):
            kind = inner.model_fields.get("kind")
            if kind is None or value.get("kind") in get_args(kind.annotation):
                _fill_kinds(value, inner)


def _explain(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    lines = []
    for item in error.errors():
        dotted = ".".join(_without_tags([str(part) for part in item["loc"]]))
        message = item["msg"].removeprefix("Value error, ")
        words = [f"{dotted}.{word}".removeprefix(".") for word in message.split()]
        named = [name for name in words if name in origins]
        origin = ", ".join(dict.fromkeys(origins[name] for name in named) or _all_origins(origins, dotted))
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(dotted, [row[0] for row in reference()], n=1)
            message = f"no such field{f', did you mean {near[0]}?' if near else ''}"
        got = "" if item["type"] in ("missing", "extra_forbidden", "value_error") else f" (got {item['input']!r})"
        lines.append(f"{dotted or 'configuration'}: {message}{got} [{origin}]")
    return ConfigError("configuration is not valid", got="; ".join(lines), do="`forge config` documents every field")


def _without_tags(parts: list[str]) -> list[str]:
    """The user's path in an error's location, into which tagged unions put the tag; a field may be called like one."""
    kept: list[str] = []
    models: list[type[BaseModel]] = [ForgeConfig]
    for part in parts:
        tagged = [m for m in models if (kind := m.model_fields.get("kind")) and part in get_args(kind.annotation)]
        if len(models) > 1 and tagged:
            models = tagged
            continue
        kept.append(part)
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        if part in fields:
            models = _models_of(fields[part].annotation)
    return kept


def _leaves(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{name}.{key}" if name else key)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, f"{name}.{i}")]
    return [(name, value)]


def _reference(model: type[BaseModel], prefix: str, show_kinds: bool) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        dotted, inner = f"{prefix}{name}", _models_of(field.annotation)
        default = "" if field.is_required() or inner else repr(field.default)
        note = " (operational)" if OPERATIONAL in field.metadata else ""
        text = " ".join((field.description or "").split())
        yield dotted, "" if inner else _type_name(field.annotation), default, text + note
        for sub in inner:
            kind = get_args(sub.model_fields["kind"].annotation)[0] if len(inner) > 1 and show_kinds else ""
            yield from _reference(sub, f"{dotted}[{kind}]." if kind else f"{dotted}.", show_kinds)


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return _type_name(args[0])
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, args))
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    return f"{_type_name(origin)}[{', '.join(map(_type_name, args))}]"

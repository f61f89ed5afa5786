"""Strict terms: YAML files that say exactly what they mean, or are refused with one clear line.

Study, site and feature files are `Terms`: frozen pydantic models that refuse unknown keys. Loading goes
through `load`, which turns every fault into one `ConfigurationError` naming file, key, value, bound and remedy.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigurationError

MAX_FILE_BYTES = 4_000_000  # a code list of 50,000 entries fits; a decompression or alias bomb does not


class Terms(BaseModel):
    """Base of everything that is read from YAML: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    def digest(self) -> str:
        """sha256 over the canonical JSON of the terms: equal terms, equal digest, whatever the file's layout."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


T = TypeVar("T", bound=Terms)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (a small file must not describe a huge one) and without duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # the stubs leave it out
            raise ConfigurationError(f"line {mark.line + 1}: YAML aliases (*name) are refused; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise ConfigurationError(f"line {key_node.start_mark.line + 1}: a key must be a plain word")
            if key in seen:
                raise ConfigurationError(
                    f"line {key_node.start_mark.line + 1}: key `{key}` appears twice; keep one of them"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The plain data in a YAML file. Raises ConfigurationError naming file and line."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path}: {size} bytes, more than the {MAX_FILE_BYTES} allowed")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # noqa: S506 (a SafeLoader subclass)
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({type(error).__name__}); expected UTF-8 YAML") from None
    except ConfigurationError as error:
        raise ConfigurationError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigurationError(f"{path}{where}: not valid YAML: {problem}") from None


def load(path: Path, model: type[T]) -> T:
    """Read a YAML file as `model`. Raises ConfigurationError with one line per fault, each naming key and remedy."""
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return parse(data, model, str(path))


def parse(data: dict[str, Any], model: type[T], where: str) -> T:
    """Validate plain data as `model`; `where` names its source in errors."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [_fault(fault, model) for fault in error.errors(include_url=False)]
        raise ConfigurationError("\n".join(f"{where}: {fault}" for fault in faults)) from None


def _fault(fault: Any, model: type[Terms]) -> str:
    """One pydantic fault in our words: `key: what is wrong (bound or nearest key)`."""
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        known = _keys_at(model, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key `{key}`; {hint}"
    if fault["type"] == "missing":
        return f"key `{key}` is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    value = fault.get("input")
    shown = f" (got {value!r})" if isinstance(value, str | int | float | bool) and len(str(value)) <= 60 else ""
    return f"`{key}`: {message}{shown}" if key else f"{message}{shown}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model that sits at `path` inside `model`, as far as annotations tell."""
    current: Any = model
    for part in path:
        annotation = current.model_fields[part].annotation if part in getattr(current, "model_fields", {}) else current
        models = [a for a in _flatten(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if not models:
            return []
        current = models[0]
    return list(getattr(current, "model_fields", {}))


def _flatten(annotation: Any) -> list[Any]:
    """An annotation and everything inside its brackets."""
    inner = [leaf for arg in getattr(annotation, "__args__", ()) for leaf in _flatten(arg)]
    return [annotation, *inner]

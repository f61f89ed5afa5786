"""Strict terms: YAML files that say exactly what they mean, or are refused with one clear line.

Study, site and feature files are `Terms`: frozen pydantic models that refuse unknown keys. Loading goes
through `load`, which turns every fault into one `ConfigurationError` naming file, key, value, bound and remedy.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import stat
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Tag, ValidationError, ValidationInfo, field_validator

from common.errors import ConfigurationError

MAX_FILE_BYTES = 4_000_000  # a code list of 50,000 entries fits; a decompression or alias bomb does not


class Terms(BaseModel):
    """Base of everything that is read from YAML: frozen, unknown keys refused, numbers finite, `yes` is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    LATER: ClassVar[frozenset[str]] = frozenset()
    """Fields that a first version did not have, absent by default: they count in the digest from when they are used.

    So what was pinned before an upgrade stays what was agreed to, and a running study goes on.
    """

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Otherwise pydantic reads `rounds: yes` as 1, and `present: 1` as yes."""
        if info.field_name is None:
            return value
        wanted = _flatten(cls.model_fields[info.field_name].annotation)
        takes_answers = any(leaf is bool or leaf is True or leaf is False for leaf in wanted)
        given = value if isinstance(value, list) else [value]
        if not takes_answers and any(isinstance(v, bool) for v in given):
            raise ValueError("yes, no, true and false stand for no number or word here; write the value")
        if takes_answers and any(isinstance(v, int | float) and not isinstance(v, bool) for v in given):
            raise ValueError("a number stands for no answer here; write true or false")
        return value

    def digest(self, *, without: frozenset[str] = frozenset()) -> str:
        """sha256 over the canonical JSON of the terms: equal terms, equal digest, whatever the file's layout.

        Args:
            without: top-level fields that do not count.
        """
        unused = {name for name in self.LATER if getattr(self, name) is None}
        plain = self.model_dump(mode="json", exclude=unused | without)
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
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
                    f"line {key_node.start_mark.line + 1}: key `{_plain(key)}` appears twice; keep one of them"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The plain data in a YAML file. Raises ConfigurationError naming file and line."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a study may name its features: a device or a pipe would have no end
            raise ConfigurationError("cannot be read: not a plain file; name another one")
        if found.st_size > MAX_FILE_BYTES:
            raise ConfigurationError(
                f"{found.st_size} bytes, more than the {MAX_FILE_BYTES} allowed; name another file"
            )
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # noqa: S506 (a SafeLoader subclass)
    except FileNotFoundError:
        raise ConfigurationError(f"{_printable(path)}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{_printable(path)}: cannot be read ({type(error).__name__}); expected UTF-8 YAML"
        ) from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{_printable(path)}: {error}") from None
    except Exception as error:  # yaml's own, RecursionError, and what `!!bool maybe` or `2020-13-45` raise inside yaml
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise ConfigurationError(f"{_printable(path)}{where}: not valid YAML: {_printable(problem)}") from None


def load(path: Path, model: type[T]) -> T:
    """Read a YAML file as `model`. Raises ConfigurationError with one line per fault, each naming key and remedy."""
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    return parse(data, model, str(path))


def parse(data: dict[str, Any], model: type[T], where: str) -> T:
    """Validate plain data as `model`; `where` names its source in errors."""
    known = get_args(model.model_fields["version"].annotation) if "version" in model.model_fields else ()
    version = data.get("version")
    if known and isinstance(version, int) and max(known) < version < 10**6:
        raise ConfigurationError(f"{where}: version {version}, this wardround reads {max(known)}; upgrade wardround")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        faults = [_fault(fault, model) for fault in error.errors(include_url=False)]
        raise ConfigurationError("\n".join(f"{where}: {fault}" for fault in faults)) from None


def _fault(fault: Any, model: type[Terms]) -> str:
    """One pydantic fault in our words: `key: what is wrong (bound or nearest key)`."""
    path, fields = _walk(model, fault["loc"])
    key = ".".join(_plain(part) for part in path)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], fields, n=1, cutoff=0.5)
        return f"unknown key `{key}`; " + (f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(fields)}")
    if fault["type"] == "missing":
        return f"key `{key}` is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    value = fault.get("input")
    short = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 200)
    shown = f" (got {value!r})" if short and len(str(value)) <= 60 else ""
    return f"`{key}`: {message}{shown}" if key else f"{message}{shown}"


def _walk(model: type[BaseModel], location: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """(the keys of the file that lead to a fault, the field names of the last mapping on the way).

    pydantic's location holds more than keys: the tag of a union's member, and `[key]` where a key itself is wrong.
    """
    path: list[str] = []
    fields: list[str] = []
    at: Any = model
    for part in location:
        while get_origin(at) is Annotated:
            at = get_args(at)[0]
        if get_origin(at) in (Union, UnionType):
            members = [member for member in get_args(at) if member is not NoneType]
            tagged = [member for member in members if Tag(str(part)) in getattr(member, "__metadata__", ())]
            at = (tagged or members)[0]
            if tagged:
                continue
        if part != "[key]":
            path.append(str(part))
        if isinstance(at, type) and issubclass(at, BaseModel):
            fields = sorted(at.model_fields)
            at = at.model_fields[part].annotation if part in at.model_fields else None
        elif get_origin(at) is dict:
            at = get_args(at)[1]
        elif get_origin(at) in (list, tuple):
            at = get_args(at)[0]
    return path, fields


def _plain(key: Any) -> str:
    """A key fit for an error message: at most 60 characters, and such as every terminal can print."""
    text = _printable(key)
    return text if len(text) <= 60 else text[:60] + "..."


def _printable(text: Any) -> str:
    """Text whose control characters are written out: a file that somebody else made must not steer a terminal."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))


def _flatten(annotation: Any) -> list[Any]:
    """An annotation and everything inside its brackets."""
    inner = [leaf for arg in getattr(annotation, "__args__", ()) for leaf in _flatten(arg)]
    return [annotation, *inner]

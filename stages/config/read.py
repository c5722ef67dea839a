"""params.yaml, read and validated as a whole; what is wrong with it becomes one line."""

from __future__ import annotations

import copy
import difflib
import os
import re
import shutil
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.config.checks import check
from stages.config.renamed import INSTEAD
from stages.config.schema import Params
from stages.ground import disk
from stages.ground.errors import UserError, quote

PARAMS_FILE = "params.yaml"
# More than anybody writes, and less than takes a second to read.
DEEPEST, MOST_FOLLOWED, MOST_DIGITS = 50, 100_000, 25
_INTEGER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9_]+)")


def _unknown_key(section: str, key: str) -> str:
    sections = {name: field.annotation for name, field in Params.model_fields.items()}
    if not section:
        return f"unknown section {quote(key)}; the sections are {', '.join(sections)}"
    if section not in sections:  # an entry of a list, such as train.callbacks.0
        return f"unknown key {section}.{key}; its keys are class and kwargs"
    if key in INSTEAD:
        return f"{section}.{key} is not a key here; write {INSTEAD[key]}"
    for other, model in sections.items():
        if other != section and key in model.model_fields:  # type: ignore[union-attr]
            return f"{section}.{key} is in the wrong section; write {other}.{key}"
    allowed = list(sections[section].model_fields)  # type: ignore[union-attr]
    close = difflib.get_close_matches(key, allowed, 1)
    hint = f"did you mean {close[0]}?" if close else f"the keys of {section} are {', '.join(allowed)}"
    return f"unknown key {section}.{key}; {hint}"


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    # Unions put the name of the branch that was tried into the location; the key alone is what the user typed.
    key = ".".join(where[:2])
    if first["type"] == "extra_forbidden":
        line = _unknown_key(".".join(where[:-1]), where[-1])
    elif first["type"] == "missing":
        line = f"{'.'.join(where)} is missing; every key must be there (null where it allows it)"
    elif first["type"] == "invalid_key":
        line = f"{key} is no key; a key is text, such as {', '.join(Params.model_fields)}"
    elif first["type"] == "value_error":
        # Of a section as a whole the message says which keys.
        line = f"{key}: " * (len(where) > 1) + str(first["ctx"]["error"])
    else:
        allowed = {
            e["msg"].removeprefix("Input should be ") for e in error.errors() if e["loc"][:2] == first["loc"][:2]
        }
        line = f"{key} is {quote(first['input'])}; it should be {' or '.join(sorted(allowed))}"
    others = {e["loc"][:2] for e in error.errors()} - {first["loc"][:2]}
    return line + (f" (and {len(others)} more)" if others else "")


def parse_params(values: object) -> Params:
    """Validate the mapping read from params.yaml.

    Raises:
        UserError: with the key, its value and what is allowed.
    """
    if not isinstance(values, dict):
        raise UserError(f"{PARAMS_FILE}: expected a mapping of sections, found {quote(values)}")
    try:
        params = Params.model_validate(values)
        check(params)
    except ValidationError as error:
        raise UserError(f"{PARAMS_FILE}: {_one_line(error)}") from None
    except ValueError as error:
        raise UserError(f"{PARAMS_FILE}: {error}") from None
    return params


def change_param(section: str, key: str, value: object) -> None:
    """Write one value into params.yaml, which otherwise stays as it is, comments included."""
    from dvc.utils.serialize import modify_yaml

    path = Path(PARAMS_FILE)
    made = disk.temporary(path)
    shutil.copyfile(path, made)
    with modify_yaml(str(made)) as params:
        params[section][key] = value
    disk.fsync(made)
    os.replace(made, path)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file as DVC does (YAML 1.2: `2e-5` is a number).

    Raises:
        UserError: if it is missing, not UTF-8, no YAML, or larger, once its aliases are followed, than any file that a
            person writes; with the line.
    """
    from ruamel.yaml import YAMLError

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; run from the folder that holds it")
    try:
        return copy.deepcopy(_parse(str(path), Path(path).read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except ValueError as error:  # a tag or a date that its text does not keep to
        raise UserError(f"{path}: not valid YAML: {error}") from None


@lru_cache(maxsize=8)
def _parse(path: str, text: str) -> Any:
    """What `read_yaml` reads. A stage asks for the same two files again and again, each time as they are then."""
    from ruamel.yaml import YAML

    _bound(path, YAML(typ="safe").parse(text))
    return YAML(typ="safe").load(text)


def _bound(path: str | Path, events: Iterable[Any]) -> None:
    """Refuse, before anything is built of it, what would take for ever: aliases of aliases, depth, long numbers."""
    size: dict[str, int] = {}  # of what is anchored, aliases followed
    inside: list[tuple[str | None, int]] = []  # the collections around, and how large all was when they began
    total = followed = 0
    for event in events:
        anchor, kind = getattr(event, "anchor", None), type(event).__name__
        where = f"{path}:{event.start_mark.line + 1}: " if event.start_mark else f"{path}: "
        if kind == "AliasEvent":
            if anchor in [name for name, _ in inside]:
                raise UserError(f"{where}the alias *{anchor} stands for what contains it; write its values out")
            total += size.get(str(anchor), 0)
            followed += size.get(str(anchor), 0)
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            inside.append((anchor, total))
            total += 1
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            name, before = inside.pop()
            size |= {name: total - before} if name else {}
        elif kind == "ScalarEvent":
            total += 1
            size |= {anchor: 1} if anchor else {}
            if event.implicit[0] and len(event.value) > MOST_DIGITS and _INTEGER.fullmatch(event.value):
                raise UserError(f"{where}a number of {len(event.value)} digits; no parameter takes one of more than 19")
        if len(inside) > DEEPEST:
            raise UserError(f"{where}nested deeper than {DEEPEST} levels; no parameter is")
        if followed > MOST_FOLLOWED:
            raise UserError(f"{where}aliases stand for more than {MOST_FOLLOWED:,} values; write out what is needed")


def load_params(path: str | Path = PARAMS_FILE) -> Params:
    """Read and validate params.yaml. Raises `UserError` with one line naming the key."""
    return parse_params(read_yaml(path))

"""params.yaml, read and validated as a whole; what is wrong with it becomes one line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.config.checks import check
from stages.config.renamed import INSTEAD
from stages.config.schema import Params
from stages.ground.errors import UserError, quote

PARAMS_FILE = "params.yaml"


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
    elif first["type"] == "value_error":
        line = str(first["ctx"]["error"])
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


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file as DVC does (YAML 1.2: `2e-5` is a number).

    Raises:
        UserError: if it is missing, not UTF-8, or no YAML, with the line.
    """
    from ruamel.yaml import YAML, YAMLError

    try:
        return YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the folder that holds it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def load_params(path: str | Path = PARAMS_FILE) -> Params:
    """Read and validate params.yaml. Raises `UserError` with one line naming the key."""
    return parse_params(read_yaml(path))

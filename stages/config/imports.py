"""Code that a parameter or a model's folder names: `module:name`."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from stages.config.pipeline import DVC_FILE, read_stages
from stages.ground.disk import absolute
from stages.ground.errors import RAISED, UserError, quote


def import_object(path: str, named_by: str) -> Any:
    """What `path`, written `module:name`, stands for; `named_by` is the parameter that says so.

    Raises:
        UserError: it cannot be imported.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except RAISED as error:  # whatever the module does when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{named_by} is {quote(path)}, which cannot be imported: {reason}") from error


def is_project_code(module: str) -> bool:
    """Whether `module` is the project's own: below stages/custom, or in a file or package that dvc.yaml lists as a
    dep. Nothing is imported to find out."""
    top = module.partition(".")[0]
    if top == "stages":  # the pipeline's own functions remove folders, too
        return module == "stages.custom" or module.startswith("stages.custom.")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or not spec.has_location or spec.origin is None:
        return False  # built in, or a folder that is no package, such as one with data
    file = Path(spec.origin)
    place = absolute(file.parent if spec.submodule_search_locations else file)
    return any(place.is_relative_to(absolute(dep)) for dep in _listed())


def _listed() -> set[str]:
    """The deps of all stages of dvc.yaml in the current folder; those that parameters fill in are data."""
    if not Path(DVC_FILE).is_file():
        return set()
    return {
        dep
        for stage in read_stages().values()
        for dep in stage.get("deps", [])
        if isinstance(dep, str) and "${" not in dep
    }

"""Code that a parameter names: `module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from stages.ground.errors import UserError, quote


def import_object(path: str, named_by: str) -> Any:
    """What `path`, written `module:name`, stands for; `named_by` is the parameter that says so.

    Raises:
        UserError: it cannot be imported.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{named_by} is {quote(path)}, which cannot be imported: {reason}") from error

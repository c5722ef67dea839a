"""Finds a file by its content in DVC's cache, where what was published once still is."""

from __future__ import annotations

import os
from pathlib import Path

from stages.ground.disk import sha256_file
from stages.keeping.sealed import FileRecord


def find_in_dvc_cache(wanted: FileRecord) -> Path | None:
    """A file of DVC's cache with that size and sha256; None if there is none, or no repository.

    DVC names files by their md5, which is not known here: those of the right size are read.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            cache = Path(repo.cache.local.path)
    except (DvcException, OSError):
        return None
    for place, _, names in os.walk(cache):
        for name in names:
            path = Path(place, name)
            try:
                if path.stat().st_size == wanted.size and sha256_file(path) == wanted.sha256:
                    return path
            except OSError:
                continue
    return None

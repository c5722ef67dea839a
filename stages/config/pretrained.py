"""Where a pretrained model or tokenizer comes from: a source becomes a local folder of plain files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from stages.config.schema import FACTORY
from stages.ground.errors import UserError, quote

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PACKAGE = "package:"
MODEL, TOKENIZER = "model.source", "tokenize.tokenizer"
# What is fetched from the Hub. Never .bin: those are pickles.
TOKENIZER_FILES = ["*.json", "*.txt", "*.model"]
MODEL_FILES = [*TOKENIZER_FILES, "model*.safetensors"]


def _package_folder(source: str, named_by: str) -> Path:
    name, _, inside = source.removeprefix(PACKAGE).partition("/")
    is_source = f"{named_by} is {quote(source)}"
    if not name.isidentifier():
        raise UserError(f"{is_source}: write package:NAME/PATH with an importable NAME")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{is_source}: no package {name} is installed; pip install it")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root):
        raise UserError(f"{is_source}: the path leaves the package {name}")
    if not folder.is_dir():
        raise UserError(f"{is_source}: the package {name} has no folder {quote(inside)}")
    return folder


def _hub_folder(source: str, revision: str | None, named_by: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = MODEL_FILES if named_by == MODEL else TOKENIZER_FILES
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        where = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{named_by} {quote(source)}{where} could not be fetched from the Hub "
            f"({type(error).__name__}: {reason}); offline, name a local folder or package:NAME/PATH"
        ) from None


def local_folder(source: str) -> Path | None:
    """The folder on this disk that `source` names, or None for a Hub id, a package or a factory.

    A source is a folder if it exists as one or is written like a path (`./x`, `../x`, `/x`, `~/x`).
    """
    if source.startswith((PACKAGE, FACTORY)):
        return None
    path = Path(source).expanduser()
    if path.is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return path
    return None


def _resolve(source: str, revision: str | None, named_by: str) -> Path:
    folder = local_folder(source)
    if folder is not None and not folder.is_dir():
        raise UserError(f"{named_by} is {quote(source)}: no such folder")
    if folder is None and not source.startswith(PACKAGE):
        return _hub_folder(source, revision, named_by)
    if revision is not None:
        raise UserError(f"model.revision is {quote(revision)}, but only a Hub id has revisions; write null")
    return folder or _package_folder(source, named_by)


def resolve_tokenizer(source: str) -> Path:
    """A local folder with the files of `tokenize.tokenizer`.

    Raises:
        UserError: unknown package or folder, a path that leaves its package, or a Hub id that cannot be fetched.
    """
    return _resolve(source, None, TOKENIZER)


def resolve_model(source: str, revision: str | None) -> Path | None:
    """A local folder with `config.json`, safetensors weights and the tokenizer of `model.source`.

    None for a factory: its model is made by code, and comes with no files.

    Raises:
        UserError: unknown package or folder, a path that leaves its package, no safetensors weights,
            or a Hub id that cannot be fetched.
    """
    if source.startswith(FACTORY):
        if revision is not None:
            raise UserError(f"model.revision is {quote(revision)}, but only a Hub id has revisions; write null")
        return None
    folder = _resolve(source, revision, MODEL)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.source {quote(source)}: no config.json in {folder}; it is not a Hugging Face model folder"
        )
    if not any((folder / name).is_file() for name in WEIGHTS):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise UserError(
            f"model.source {quote(source)}: no {WEIGHTS[0]} in {folder} (found {found}); "
            "pickled weights (.bin) are never loaded: convert them to safetensors"
        )
    return folder

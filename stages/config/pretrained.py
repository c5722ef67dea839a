"""Where a pretrained model or tokenizer comes from: a source becomes a local folder of plain files."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from stages.config.schema import FACTORY
from stages.ground.errors import TransientError, UserError, is_unreachable, quote, reason

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PACKAGE = "package:"
MODEL, TOKENIZER = "model.source", "tokenize.tokenizer"
# What is fetched from the Hub. Never .bin: those are pickles.
TOKENIZER_FILES = ["*.json", "*.txt", "*.model"]
MODEL_FILES = [*TOKENIZER_FILES, "model*.safetensors"]
# Where transformers takes for granted that a file holds an object.
OF_MODEL = ("config.json", "generation_config.json")
OF_TOKENIZER = (
    "config.json",  # tokenizers look there too
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def _object(path: Path, where: str) -> dict[str, Any]:
    """The object in a JSON file; `where` names its folder in messages. Raises UserError: it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {path.name} cannot be read: {reason(error)}; fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: {path.name} should hold an object, found a {type(found).__name__}; fetch it again")
    return found


def _nested(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a config and of the configs in it."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, dict):
            yield from _nested(value)


def weight_files(folder: Path, where: str) -> list[Path]:
    """The files of safetensors in `folder` that are loaded; `where` names it in messages.

    Raises:
        UserError: there is none, or the index names anything but safetensors inside of the folder.
    """
    single, index = (folder / name for name in WEIGHTS)
    found = [single] if single.is_file() else [folder / name for name in _shards(index, where)]
    for path in found:
        if not path.is_file():
            raise UserError(f"{where}: {path.relative_to(folder)} cannot be read: no such file; fetch it again")
    return found


def _shards(index: Path, where: str) -> list[str]:
    names = _object(index, where).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{where}: {index.name} should have a weight_map from tensors to files; fetch it again")
    found = sorted(set(names.values()))
    for name in found:
        path = PurePosixPath(name)
        if path.suffix != ".safetensors" or path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{where}: {index.name} names {quote(name)}; only safetensors inside of the folder are loaded, never "
                "pickled weights (.bin)"
            )
    return found


def require_whole_tokenizer(folder: Path, where: str) -> None:
    """Refuse JSON files over which transformers would fall. Raises UserError: one is cut short or holds no object."""
    _require_objects(folder, OF_TOKENIZER, where)


def _require_objects(folder: Path, names: tuple[str, ...], where: str) -> None:
    for name in names:
        if (folder / name).is_file():
            _object(folder / name, where)


def require_whole_model(folder: Path, where: str) -> None:
    """Refuse what transformers would fall over, or follow out of a model's folder.

    Raises:
        UserError: a JSON file or the header of a file of weights is cut short or broken in another way, or there are
            weights of another name or an adapter.
    """
    from safetensors import SafetensorError, safe_open

    _require_objects(folder, OF_MODEL, where)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{where}: it has an adapter_config.json, so it is no whole model; merge the adapter into one")
    config = _object(folder / "config.json", where)
    for key, value in _nested(config):
        if key.strip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise UserError(
                f"{where}: config.json names {quote(value)} as its {key}, which is code on the Hub, and none is run; "
                "leave it out"
            )
    if config.get("quantization_config") is not None:
        raise UserError(f"{where}: config.json has a quantization_config; only plain weights can be trained on here")
    if "transformers_weights" in config:
        raise UserError(
            f"{where}: config.json names its weights by transformers_weights; call them {WEIGHTS[0]} and leave it out"
        )
    for path in weight_files(folder, where):
        try:
            with safe_open(path, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{where}: {path.relative_to(folder)} cannot be read: {reason(error)}; fetch it again"
            ) from None


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
        where = f" at revision {revision}" if revision else ""
        kind = TransientError if is_unreachable(error) else UserError
        raise kind(
            f"{named_by} {quote(source)}{where} could not be fetched from the Hub "
            f"({type(error).__name__}: {reason(error)}); offline, name a local folder or package:NAME/PATH"
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
        UserError: unknown package or folder, a path that leaves its package, no safetensors weights, an index
            that names other files, or a Hub id that cannot be fetched.
    """
    if revision is not None and (source.startswith((FACTORY, PACKAGE)) or local_folder(source)):
        raise UserError(f"model.revision is {quote(revision)}, but only a Hub id has revisions; write null")
    if source.startswith(FACTORY):
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
    weight_files(folder, f"model.source {quote(source)}")
    return folder

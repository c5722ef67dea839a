"""Models in memory and on disk: from a pretrained folder or a factory, from a trained one, and to a folder."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from stages.config.imports import import_object, is_project_code
from stages.config.pipeline import DVC_FILE
from stages.config.pretrained import require_whole_model
from stages.config.schema import FACTORY, ModelParams
from stages.ground.errors import UserError, quote, reason, user_code
from stages.modeling import codec
from stages.tasks.base import Head

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# A factory model's folder: what rebuilds it, beside its model.safetensors.
REBUILD, WEIGHTS, EXTRA = "model.json", "model.safetensors", "extra_state"
# What else is in the folder of a model that was saved, tokenizer and card included: nothing that somebody put there.
KNOWN = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "README.md", ".git*",
    "task.json", "features.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.*", "merges.txt", "*.model",
)  # fmt: skip


def build_model(
    params: ModelParams,
    folder: Path | None,
    head: Head,
    seed: int,
    pad_token_id: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """The model to train, fp32, on the CPU: the pretrained one in `folder` with `head`, or what the factory makes where
    `folder` is None. Whatever is new is initialised from `seed`.

    Args:
        pad_token_id: the tokenizer's; a pretrained model goes by it, whatever its config says.
        say: is given a line where the folder's own head, or pad token, is not taken as it is.

    Raises:
        UserError: a keyword that the model's config or the factory does not take, or a folder that transformers
            cannot load.
    """
    torch.manual_seed(seed)
    if folder is None:
        return _call_factory(params.source, params.kwargs)
    where = f"model.source {quote(params.source)}"
    require_whole_model(folder, where)
    with _one_line(f"{where} cannot be loaded"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for key in params.kwargs:
            if not hasattr(config, key) or callable(getattr(config, key)):
                raise UserError(f"model.kwargs: {quote(key)} is no setting of {type(config).__name__}")
        before = copy.deepcopy(config)
        config.update(params.kwargs | head.config)
        if pad_token_id is not None:
            _pad_with(config, pad_token_id, say)
        model, info = getattr(transformers, head.auto_model).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # what is mismatched is looked at below
            output_loading_info=True,
        )
        _fit_head(model, before, info, head, seed, say)
    return model


@contextmanager
def _one_line(what: str, advice: str = "") -> Iterator[None]:
    """Whatever a library raises at files that somebody else wrote becomes one line: `what`, the error, `advice`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {reason(error)}{advice}") from None


def _pad_with(config: PreTrainedConfig, pad_token_id: int, say: Callable[[str], None]) -> None:
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        found = getattr(part, "pad_token_id", None)
        if found != pad_token_id:
            part.pad_token_id = pad_token_id
            if found is not None:
                say(
                    f"model.source: its config pads with token {found}, its tokenizer with {pad_token_id}, which counts"
                )


def _fit_head(
    model: PreTrainedModel, before: PreTrainedConfig, info: Any, head: Head, seed: int, say: Callable[[str], None]
) -> None:
    """Where the folder has a head of its own: put its labels into the order of `head`, or put a new one in its place.

    `before` is the config in the folder, `info` what transformers tells of loading.
    """
    inside = f"{model.base_model_prefix}."
    state = model.state_dict()
    outside = {name for name in state if not name.startswith(inside)}
    mismatched = {name: shapes for name, *shapes in info["mismatched_keys"]}
    for name, (found, expected) in mismatched.items():
        if name not in outside:
            raise UserError(
                f"model.source: its weight {name} has the shape {tuple(found)}, but its config asks for "
                f"{tuple(expected)}; look at model.kwargs and config.json"
            )
    missing = set(info["missing_keys"])
    if not state.keys() - outside - missing:
        raise UserError(f"model.source: none of its weights are those of a {type(model).__name__}'s encoder")
    # Many encoders are saved without their pooler, which is new then as a head is.
    lacking = [name for name in state if name in missing and name not in outside and ".pooler." not in name]
    if lacking:
        number = f"{len(lacking)} of {len(state.keys() - outside)}"
        say(f"warning: model.source: {number} weights of its encoder are not in its folder, and new: {_some(lacking)}")
    if not outside - missing:
        return  # the usual case: the head is new
    theirs, ours = _in_order(before.id2label), list(head.config.get("id2label", {}).values())
    if sorted(_folded(theirs)) != sorted(_folded(ours)):
        theirs, ours = _named(theirs), _named(ours)
    why = _misfit(type(model).__name__, before, theirs, ours, head, bool(mismatched), sorted(outside & missing))
    if why is None and theirs and ours and _folded(theirs) != _folded(ours):
        last = [
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer.out_features == head.outputs and not name.startswith(inside)
        ]
        order = [_folded(theirs).index(name) for name in _folded(ours)]
        if last:
            with torch.no_grad():
                for tensor in last[-1].parameters():
                    tensor.copy_(tensor[order])
            say(f"model.source: its head has the labels in the order {_list(theirs)}; it is put into that of the data")
            return
        why = f"its head has the labels in another order, {_list(theirs)}"
    if why is not None:
        torch.manual_seed(seed)
        new = type(model)(model.config).state_dict()
        model.load_state_dict({name: new[name] for name in outside}, strict=False)
        say(f"model.source: {why}; the head is a new one, and the encoder stays")


def _misfit(
    name: str,
    before: PreTrainedConfig,
    theirs: list[str],
    ours: list[str],
    head: Head,
    mismatched: bool,
    lacking: list[str],
) -> str | None:
    """Why a head that is there is another one than `head`; None if it is that, or may be."""
    wrote = (before.architectures or [name])[0].removeprefix("Flax").removeprefix("TF")
    if wrote != name:
        return f"its head is that of a {wrote}"
    if lacking:
        return f"its head is not whole: its folder lacks {_some(lacking)}"
    if mismatched:
        return f"its head has {before.num_labels} outputs, and {head.outputs} are needed"
    if before.problem_type not in (None, head.config["problem_type"]):
        return f"its head is one for {before.problem_type}, and {head.config['problem_type']} is needed"
    if theirs and ours and sorted(_folded(theirs)) != sorted(_folded(ours)):
        return f"its head knows the labels {_list(theirs)}, and the data has {_list(ours)}"
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _in_order(id2label: Any) -> list[str]:
    return [str(id2label[key]) for key in sorted(id2label or {})]


def _named(names: list[str]) -> list[str]:
    """`names`, or none where they only number the classes: then a class is the same by its place."""
    return [] if all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(names)) else names


def _folded(names: list[str]) -> list[str]:
    folded = [name.strip().casefold() for name in names]
    return folded if len(set(folded)) == len(folded) else names


def _list(names: list[str]) -> str:
    return quote(", ".join(names))


def _call_factory(source: str, kwargs: dict[str, Any]) -> nn.Module:
    what = f"model.source {quote(source)}"
    factory = import_object(source.removeprefix(FACTORY), "model.source")
    if not callable(factory) or inspect.isbuiltin(factory) or (
        inspect.isclass(factory) and not issubclass(factory, nn.Module)
    ):  # fmt: skip
        raise UserError(f"{what} is no function or class that gives a nn.Module, but {quote(factory)}")
    with user_code(f"{what} with {quote(kwargs)}"):
        model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise UserError(f"{what} gives {type(model).__name__}; it should give a nn.Module")
    with user_code(f"{what}: its state cannot be kept, as where a buffer is sparse or nested"):
        _own_memory(model, what)
        model.state_dict()
    return model


@torch.no_grad()
def _own_memory(model: nn.Module, what: str) -> None:
    """Give tensors that were made with `expand`, several of whose elements are the same memory, a place for each: only
    so can they be trained or loaded."""
    for prefix, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if is_lazy(tensor):
                raise UserError(
                    f"{what}: {prefix}{'.' * bool(prefix)}{name} has no shape before the model was called; "
                    "give the layer its size (LazyLinear: Linear), or let the factory call the model once, on zeros"
                )
            if tensor.is_meta:
                raise UserError(
                    f"{what}: {prefix}{'.' * bool(prefix)}{name} is on the meta device, so it has no values; make it "
                    "on the CPU"
                )
            if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
                tensor.data = tensor.contiguous()


def save_model(model: nn.Module, folder: Path, params: ModelParams) -> None:
    """Write a folder that `from_pretrained` reads; of a factory model model.safetensors and model.json, which
    `load_model` reads. Tied weights are written once.

    Raises:
        UserError: a factory model has a state that neither safetensors nor JSON holds.
    """
    if isinstance(model, PreTrainedModel) and not params.source.startswith(FACTORY):
        model.config._name_or_path = ""  # a path of this machine has no place in an out
        model.save_pretrained(folder)
    else:
        extra, more = extra_state(model)
        with user_code(f"model.source {quote(params.source)}: its weights cannot be saved"):
            weights = {name: codec.stored(tensor) for name, tensor in _first_names(model).items()}
            save_file(weights | more, folder / WEIGHTS)
        rebuild = {"source": params.source, "kwargs": params.kwargs} | ({"extra_state": extra} if extra else {})
        (folder / REBUILD).write_text(json.dumps(rebuild, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def _first_names(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers; what is tied, under its first name alone."""
    first: dict[object, str] = {}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and first.setdefault(codec.memory(tensor, name), name) == name
    }


def extra_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What of the model's state is no tensor (`nn.Module.get_extra_state`): JSON by name, and tensors in it. Raises
    UserError if it is no plain data."""
    plain = {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    try:
        return codec.split(plain, EXTRA)
    except TypeError as error:
        raise UserError(f"model.source: {error}, so no checkpoint can hold it") from None


def load_model(
    folder: Path, device: torch.device, source: str | None = None, kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """A model that `save_model` wrote, in eval mode on `device`.

    Args:
        source: `model.source` as the caller knows it. None: of a factory model what the folder names is called, if it
            is the project's own code.
        kwargs: `model.kwargs`, likewise.

    Raises:
        UserError: it is not there, holds what no model of ours does, names other code than `source` or the project's
            own, or a factory model's code is another than the one that wrote it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run: dvc repro train")
    _require_known(folder)
    with _one_line(str(folder), "; run: dvc repro train"):
        if (folder / REBUILD).exists():
            model = _rebuild(folder, source, kwargs)
        else:
            require_whole_model(folder, str(folder))
            wrote = AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures[0]
            kind = getattr(transformers, wrote)
            if not (inspect.isclass(kind) and issubclass(kind, PreTrainedModel)):
                raise UserError(f"{folder}: config.json names {quote(wrote)}, which is no model; run: dvc repro train")
            model = kind.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
    # What these return is not looked at: who overrides `train` or `to` forgets it easily.
    model.to(device)
    model.eval()
    return model


def _require_known(folder: Path) -> None:
    """Refuse a folder with files that `save_model` and select_best do not write."""
    names = sorted(path.name for path in folder.iterdir())
    kind = (REBUILD, WEIGHTS) if REBUILD in names else ("config.json",)
    for name in names:
        if name != REBUILD and not any(fnmatch.fnmatchcase(name, pattern) for pattern in KNOWN):
            raise UserError(f"{folder}: {quote(name)} is no part of a model; take it away, or run: dvc repro train")
    if REBUILD in names and "config.json" in names:
        raise UserError(
            f"{folder}: it holds {REBUILD} and config.json, and a model has one of them; run: dvc repro train"
        )
    for name in kind:
        if name not in names:
            raise UserError(f"{folder}: no {name}, so it is no model; run: dvc repro train")


class _Rebuild(BaseModel):
    """model.json: what is called with what, and what of the state is no tensor."""

    model_config = ConfigDict(extra="forbid", strict=True)
    source: str
    kwargs: dict[str, Any]
    extra_state: dict[str, Any] = {}


def _rebuild(folder: Path, source: str | None, kwargs: dict[str, Any] | None) -> nn.Module:
    path = folder / REBUILD
    try:
        wanted = _Rebuild.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: {error.errors()[0]['msg']}; it should hold source and kwargs") from None
    what = f"{path} names {quote(wanted.source)}"
    if not wanted.source.startswith(FACTORY):
        raise UserError(f"{what}; it should be {FACTORY}module:callable")
    if source is not None and wanted.source != source:
        raise UserError(f"{what}, but model.source is {quote(source)}; run: dvc repro train")
    if kwargs is not None and wanted.kwargs != json.loads(json.dumps(kwargs)):
        raise UserError(
            f"{what} with {quote(wanted.kwargs)}, but model.kwargs is {quote(kwargs)}; run: dvc repro train"
        )
    if source is None:
        _require_project_code(wanted.source, what)
    model = _call_factory(wanted.source, wanted.kwargs)
    weights, expected = load_file(folder / WEIGHTS), _first_names(model)
    extra = {name: value for name, value in weights.items() if name.startswith(f"{EXTRA}.") and name not in expected}
    weights = {name: value for name, value in weights.items() if name not in extra}
    if weights.keys() != expected.keys():
        raise UserError(f"{folder}: its weights are those of another model than {wanted.source} makes now")
    state = {name: codec.restored(value, expected[name].dtype) for name, value in weights.items()}
    # What is tied is loaded under its first name.
    model.load_state_dict(state | codec.join(wanted.extra_state, extra), strict=False)
    return model


def _require_project_code(source: str, what: str) -> None:
    """Only the project's own code is called because a folder says so.

    Raises:
        UserError: it is other code, or something that the project's code only imports.
    """
    path = source.removeprefix(FACTORY)
    module = path.partition(":")[0]
    advice = (
        f"only what stages/custom, or code that {DVC_FILE} lists as a dep, defines is called because a folder says so; "
        "if you trust the folder, give load_model this source"
    )
    if not is_project_code(module):
        raise UserError(f"{what}: {advice}")
    found = import_object(path, what)
    is_model = inspect.isclass(found) and issubclass(found, nn.Module)
    if not is_model and not (inspect.isfunction(found) and is_project_code(found.__module__)):
        raise UserError(f"{what}, which is neither a nn.Module nor a function that is defined there: {advice}")

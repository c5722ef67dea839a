"""Models in memory and on disk: from a pretrained folder or a factory, from a trained one, and to a folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from stages.config.imports import import_object
from stages.config.schema import FACTORY, ModelParams
from stages.ground.errors import UserError, quote, user_code
from stages.tasks.base import Head

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# A factory model's folder: what rebuilds it, beside its model.safetensors.
REBUILD = "model.json"


def build_model(params: ModelParams, folder: Path | None, head: Head, seed: int) -> nn.Module:
    """The model to train, fp32, on the CPU: the pretrained one in `folder` with a new `head`, or what the factory
    makes where `folder` is None. Whatever is new is initialised from `seed`.

    Raises:
        UserError: a keyword that the model's config or the factory does not take, or a folder that transformers
            cannot load.
    """
    torch.manual_seed(seed)
    if folder is None:
        return _call_factory(params)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for key in params.kwargs:
            if not hasattr(config, key):
                raise UserError(f"model.kwargs: {quote(key)} is no setting of {type(config).__name__}")
        config.update(params.kwargs | head.config)
        return getattr(transformers, head.auto_model).from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.source {quote(params.source)} cannot be loaded: {reason}") from None


def _call_factory(params: ModelParams) -> nn.Module:
    factory = import_object(params.source.removeprefix(FACTORY), "model.source")
    with user_code(f"model.source {quote(params.source)} with {quote(params.kwargs)}"):
        model = factory(**params.kwargs)
    if not isinstance(model, nn.Module):
        raise UserError(f"model.source {quote(params.source)} gives {type(model).__name__}; it should give a nn.Module")
    return model


def save_model(model: nn.Module, folder: Path, params: ModelParams) -> None:
    """Write a folder that `from_pretrained` reads; of a factory model model.safetensors and model.json, which
    `load_model` reads. Tied weights are written once."""
    if isinstance(model, PreTrainedModel) and not params.source.startswith(FACTORY):
        model.config._name_or_path = ""  # a path of this machine has no place in an out
        model.save_pretrained(folder)
    else:
        save_file(_untied(model), folder / "model.safetensors")
        rebuild = {"source": params.source, "kwargs": params.kwargs}
        (folder / REBUILD).write_text(json.dumps(rebuild, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights and buffers on the CPU; what is tied, under its first name alone."""
    first: dict[object, str] = {}
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if first.setdefault(memory(tensor, name), name) == name
    }


def memory(tensor: Tensor, name: str) -> object:
    """What views of the very same memory (tied weights) have in common; an empty one shares it with none."""
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name


def load_model(folder: Path, device: torch.device) -> nn.Module:
    """A model that `save_model` wrote, in eval mode on `device`.

    Raises:
        UserError: it is not there, or a factory model's code is another than the one that wrote it.
    """
    try:
        if (folder / REBUILD).exists():
            rebuild = json.loads((folder / REBUILD).read_text(encoding="utf-8"))
            model = _call_factory(ModelParams(**rebuild, revision=None))
            weights = load_file(folder / "model.safetensors")
            if weights.keys() != _untied(model).keys():
                raise UserError(f"{folder}: its weights are those of another model than {rebuild['source']} makes now")
            model.load_state_dict(weights, strict=False)  # what is tied is loaded under its first name
        else:
            wrote = AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures[0]
            model = getattr(transformers, wrote).from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: {str(error).splitlines()[0]}; run: dvc repro train") from None
    return model.to(device).eval()

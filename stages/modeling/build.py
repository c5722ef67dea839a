"""Models in memory and on disk: from a pretrained folder, from a trained one, and to an ordinary HF folder."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from stages.config.errors import UserError, quote
from stages.config.params import ModelParams
from stages.data.store import Task

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def build_model(params: ModelParams, folder: Path, task: Task, seed: int) -> PreTrainedModel:
    """The pretrained model in `folder` with a new head for `task`, initialised from `seed`, fp32, on the CPU.

    Raises:
        UserError: a keyword the model's config does not know, or a folder that transformers cannot load.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for key in params.kwargs:
            if not hasattr(config, key):
                raise UserError(f"model.kwargs: {quote(key)} is no setting of {type(config).__name__}")
        config.update(params.kwargs)
        config.id2label = dict(enumerate(task.label_names))
        config.label2id = {name: i for i, name in enumerate(task.label_names)}
        config.problem_type = task.problem_type
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.source {quote(params.source)} cannot be loaded: {reason}") from None


def save_model(model: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors; `from_pretrained` reads them, tied weights included."""
    assert isinstance(model, PreTrainedModel)
    model.config._name_or_path = ""  # a path of this machine has no place in an out
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    """A model that `save_model` wrote, in eval mode on `device`. Raises UserError if it is not there."""
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {str(error).splitlines()[0]}; run: dvc repro train") from None
    return model.to(device).eval()

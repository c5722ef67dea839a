"""State as plain data: nested dicts and lists of numbers, text and tensors, to safetensors and JSON and back.

The same codec serves every part of a checkpoint, so nothing is ever pickled or unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tree = Any
"""dict (keys str or int), list, tuple, str, int, float, bool, None, or torch.Tensor, nested."""

_TENSOR, _COMPLEX, _DICT, _TUPLE = "__tensor__", "__complex__", "__dict__", "__tuple__"


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU in a form that safetensors takes: complex128 as pairs of float64, shape (..., 2)."""
    copied = tensor.detach().to("cpu", copy=True).resolve_conj().resolve_neg()
    return (torch.view_as_real(copied) if copied.dtype == torch.complex128 else copied).contiguous()


def restored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `stored` was given, which was of `dtype`."""
    # A copy of its own: pairs in a mapped file need not begin where complex128 may.
    return torch.view_as_complex(tensor.clone()) if dtype == torch.complex128 else tensor


def memory(tensor: torch.Tensor, name: str) -> object:
    """What views of the very same memory (tied weights) have in common; an empty one shares it with none."""
    if not tensor.numel():
        return name
    seen_as = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), *seen_as)


def split(tree: Tree, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Copy `tree` out of live memory: a JSON skeleton, and its tensors on the CPU by name.

    Tensors that are views of the very same memory (tied weights) are stored once. Names start with `name`.

    Raises:
        TypeError: for a value that is none of `Tree`'s kinds, naming where it is.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[object, str] = {}

    def encode(value: Tree, where: str) -> Any:
        if isinstance(value, torch.Tensor):
            first = seen.setdefault(memory(value, where), where)
            if first == where:
                tensors[where] = stored(value)
            return {_COMPLEX if value.dtype == torch.complex128 else _TENSOR: first}
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, Mapping):
            if not all(isinstance(key, str | int) for key in value):
                raise TypeError(f"{where}: the keys of a state must be str or int, found {list(value)[:3]}")
            if any(isinstance(key, int) for key in value) or any(str(key).startswith("__") for key in value):
                # JSON knows only text as keys; the optimizer's are numbers.
                return {_DICT: [[key, encode(item, f"{where}.{key}")] for key, item in value.items()]}
            return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, tuple):
            return {_TUPLE: [encode(item, f"{where}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, list):
            return [encode(item, f"{where}.{i}") for i, item in enumerate(value)]
        raise TypeError(
            f"{where}: a state holds dicts, lists, tuples, text, numbers, None, tensors, found {type(value).__name__}"
        )

    return encode(tree, name), tensors


def join(skeleton: Any, tensors: Mapping[str, torch.Tensor]) -> Tree:
    """The tree that `split` took apart. Raises KeyError if a tensor is missing."""
    if isinstance(skeleton, list):
        return [join(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if _TENSOR in skeleton:
        return tensors[skeleton[_TENSOR]]
    if _COMPLEX in skeleton:
        return restored(tensors[skeleton[_COMPLEX]], torch.complex128)
    if _TUPLE in skeleton:
        return tuple(join(item, tensors) for item in skeleton[_TUPLE])
    if _DICT in skeleton:
        return {key: join(item, tensors) for key, item in skeleton[_DICT]}
    return {key: join(item, tensors) for key, item in skeleton.items()}

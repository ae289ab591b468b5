"""Hashes of what shapes a pipeline's latents."""

from __future__ import annotations

import hashlib
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..storage import tensor_bytes

_THREADS = 4  # hashing releases the interpreter's lock
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STATE_OF_CALLS = ("truncation", "padding")
_OF_THE_LOADING = ("architectures", "dtype", "torch_dtype", "transformers_version")
# By component: the state in which its weights were hashed, and the hash.
_hashed: weakref.WeakKeyDictionary[torch.nn.Module, tuple[str, str]] = weakref.WeakKeyDictionary()


def fingerprint(pipeline: Any) -> dict[str, str]:
    """Hashes of what shapes a pipeline's latents: its configurations, and its weights.

    All bytes of all tensors of every component count, LoRA layers with their scales and with
    which of them are active, and FreeU; so do the components' configurations, and the tokenizers.
    A component's bytes are read once; they are read again when a tensor was replaced or written to
    since (torch's version counter, and the sums of every tensor's rows for writes through `.data`,
    which the counter does not see).

    Args:
        pipeline: Stable Diffusion 1.x, 2.x or XL pipeline.

    Raises:
        ValueError: weights are on the meta device, so there is nothing to hash.
    """
    configs = {
        name: _configuration(component)
        for name, component in sorted(pipeline.components.items())
        if component is not None
    }
    text = json.dumps(configs, sort_keys=True, default=str)
    weights = hashlib.sha256()
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            weights.update(
                f"{name} {_weights_hash(name, component)} {_switches(component)}".encode()
            )
    return {
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


def _configuration(component: Any) -> dict[str, Any] | str:
    """What a component was made with, beside its weights."""
    backend = getattr(component, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        # What calls leave behind is not the tokenizer's.
        return {key: value for key, value in described.items() if key not in _STATE_OF_CALLS}
    if hasattr(component, "get_vocab"):
        return {"vocabulary": component.get_vocab(), "class": type(component).__name__}
    config = getattr(getattr(component, "_orig_mod", component), "config", None)
    if config is None:
        return type(component).__name__
    found = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {
        key: value
        for key, value in found.items()
        if not key.startswith("_") and key not in _OF_THE_LOADING
    }


def _weights_hash(name: str, module: torch.nn.Module) -> str:
    tensors = {
        key.removeprefix("_orig_mod."): tensor.detach()
        for key, tensor in sorted(module.state_dict(keep_vars=True).items())
    }
    absent = [key for key, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise ValueError(
            f"the {name}'s weights are on the meta device ({absent[0]} and others), as "
            "enable_sequential_cpu_offload leaves them; use enable_model_cpu_offload instead"
        )
    state = hashlib.sha256()
    for key, tensor in tensors.items():
        version = -1 if tensor.is_inference() else tensor._version
        state.update(f"{key} {tensor.data_ptr()} {version} {tensor.shape}".encode())
        state.update(tensor_bytes(_row_sums(tensor).cpu()))
    known = _hashed.get(module)
    if known is not None and known[0] == state.hexdigest():
        return known[1]
    with ThreadPoolExecutor(_THREADS) as threads:
        digests = list(threads.map(_tensor_hash, tensors.values()))
    total = hashlib.sha256()
    for key, digest in zip(tensors, digests, strict=True):
        total.update(f"{key} {digest}".encode())
    _hashed[module] = (state.hexdigest(), total.hexdigest())
    return total.hexdigest()


def _row_sums(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of every row, added up as integers: int64 [rows]."""
    first = tensor.shape[0] if tensor.ndim > 1 and tensor.numel() else 1
    rows = tensor.reshape(first, -1).contiguous()
    return rows.view(_WORDS[tensor.element_size()]).sum(-1, dtype=torch.int64)


def _tensor_hash(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor_bytes(tensor.cpu().contiguous()))
    return digest.hexdigest()


def _switches(module: torch.nn.Module) -> list[tuple[Any, ...]]:
    """What changes a module's output beside its weights: LoRA's state, and FreeU's factors."""
    found: list[tuple[Any, ...]] = []
    layer: Any
    for layer in module.modules():
        if hasattr(layer, "scaling") and hasattr(layer, "active_adapters"):
            scales = sorted(layer.scaling.items())
            found.append((scales, list(layer.active_adapters), bool(layer.disable_adapters)))
        freeu = tuple(getattr(layer, name, None) for name in ("s1", "s2", "b1", "b2"))
        if any(isinstance(factor, float) for factor in freeu):
            found.append(freeu)
    return found

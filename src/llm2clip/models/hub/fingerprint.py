"""Hashes of everything that affects an encoder's embeddings. Stores and caches use them to detect changes."""

import hashlib
import json
from typing import Any

import torch
from torch import nn


def fingerprint(identity: dict[str, Any]) -> str:
    """Return a hash (32 hex digits) of an encoder's `identity()`. Equal hashes mean identical embeddings."""
    return hash_text(json.dumps(identity, sort_keys=True))


def hash_text(text: str) -> str:
    """Return a hash (32 hex digits) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def hash_weights(module: nn.Module) -> str:
    """Return a hash (32 hex digits) of a module's weights and buffers, including names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items(), key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]

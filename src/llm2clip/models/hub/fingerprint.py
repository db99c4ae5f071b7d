"""Hashes of everything that affects an encoder's embeddings. Caches use them to detect changes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def fingerprint(identity: dict[str, Any]) -> str:
    """Return a hash (32 hex digits) of an encoder's `identity()`.

    Encoders with the same hash produce identical embeddings.
    """
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def hash_weights(module: nn.Module) -> str:
    """Return a hash (16 hex digits) of the names and values of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]

"""Short hashes of all that changes a vector, by which caches know whose vectors they hold."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def fingerprint(identity: dict[str, Any]) -> str:
    """One hash of an encoder's `identity`: two encoders with the same one give the same vectors."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def hash_weights(module: nn.Module) -> str:
    """A hash of a module's weights and their names."""
    weights = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return weights.hexdigest()[:16]

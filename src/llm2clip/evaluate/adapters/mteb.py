"""Any model that `open_dual` opens, in mteb.

    import mteb
    from llm2clip.evaluate.adapters.mteb import MTEBModel

    mteb.evaluate(MTEBModel("runs/mine/model"), mteb.get_tasks(["Flickr30kT2IRetrieval"]))

Vectors are compared by their cosine, as mteb's base class does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from torch.utils.data import DataLoader

from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.fingerprint import fingerprint


class MTEBModel(AbsEncoder):
    """Texts, pictures, or both of an item, whose vector is then the normalised sum of its two."""

    def __init__(self, name: str, device: torch.device | str | None = None) -> None:
        """
        Args:
            name: as of `open_dual`.
            device: where it runs; None is a GPU where there is one.
        """
        self.model = open_dual_encoder(name, device)
        parts = [part for part in name.replace(":", "/").split("/") if part not in ("", ".", "..")]
        facts = {
            "name": "/".join(["llm2clip", *parts][-2:]),
            "revision": fingerprint(self.model.identity())[:12],
            "modalities": ["image", "text"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "embed_dim": self.model.embed_dim,
        }
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=facts)

    def encode(self, inputs: DataLoader[Any], **_: Any) -> np.ndarray:
        """Batches with columns text, image (PIL) or both, to (N, width) float32, L2-normalised. No prompt is added."""
        parts = []
        for batch in inputs:
            sides = []
            if batch.get("image"):
                sides.append(self.model.encode_images([self.model.transform(load_image(p)) for p in batch["image"]]))
            if batch.get("text"):
                sides.append(self.model.encode_texts(batch["text"]))
            if not sides:
                raise ValueError(f"a batch with neither text nor image, but {', '.join(batch)}")
            parts.append(F.normalize(torch.stack(sides).sum(0), dim=-1))
        return torch.cat(parts).numpy()

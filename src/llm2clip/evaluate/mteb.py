"""Adapter that lets mteb evaluate any model that `open_dual_encoder` can load.

    import mteb
    from llm2clip.evaluate.mteb import MTEBModel

    mteb.evaluate(MTEBModel("runs/mine/model"), mteb.get_tasks(["Flickr30kT2IRetrieval"]))

Embeddings are compared by cosine similarity, the default in mteb's base class.
"""

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
from llm2clip.models.loading import fingerprint


class MTEBModel(AbsEncoder):
    """Encoder for texts, images and pairs. A pair's embedding is the normalised sum of its image and text vectors."""

    def __init__(self, name: str, device: torch.device | str | None = None) -> None:
        """See `open_dual_encoder`. Default device: a GPU if available."""
        self.model = open_dual_encoder(name, device)
        parts = [part for part in name.replace(":", "/").split("/") if part not in ("", ".", "..")]
        metadata = {
            "name": "/".join(["llm2clip", *parts][-2:]),
            "revision": fingerprint(self.model.identity())[:12],
            "modalities": ["image", "text"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "embed_dim": self.model.embed_dim,
        }
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=metadata)

    def encode(self, inputs: DataLoader[Any], **_: Any) -> np.ndarray:
        """Return L2-normalised embeddings, float32 of shape (N, D). Prompts are not added to the texts.

        Each batch must have a "text" column, an "image" column with PIL images, or both.
        """
        chunks = []
        for batch in inputs:
            modalities = []
            if batch.get("image"):
                images = [self.model.transform(load_image(image)) for image in batch["image"]]
                modalities.append(self.model.encode_images(images))
            if batch.get("text"):
                modalities.append(self.model.encode_texts(batch["text"]))
            if not modalities:
                raise ValueError(f"a batch must have a text or image column (got {', '.join(batch)})")
            chunks.append(F.normalize(torch.stack(modalities).sum(0), dim=-1))
        return torch.cat(chunks).numpy()

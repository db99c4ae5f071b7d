"""Adapter for evaluating llm2clip models, and checkpoints of the LLM2CLIP authors, with mteb.

Example for MIEB-lite:

    import mteb
    from llm2clip.evaluate.mteb import get_model_meta

    model = get_model_meta("runs/mine/model").load_model()
    mteb.evaluate(model, mteb.get_benchmark("MIEB(lite)"))
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ScoringFunction
from torch.utils.data import DataLoader

from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder, wrap_llm2clip
from llm2clip.models.llm2clip import encode_documents
from llm2clip.models.loading import get_model_name_with_hash, read_config, split_revision
from llm2clip.models.model_folder import is_model_folder
from llm2clip.models.official_checkpoint import attach_caption_encoder, load_official_checkpoint
from llm2clip.models.official_layout import download_official_checkpoint
from llm2clip.models.published_encoders import suggest_published_encoders


class MTEBModel(AbsEncoder):
    """Encoder of texts, images and image-text pairs. Pairs are encoded as the normalised sum of both embeddings."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model

    def encode(self, inputs: DataLoader[Any], **_: Any) -> np.ndarray:
        """Return L2-normalised embeddings, float32 of shape (N, D). Prompts are not added to the texts.

        Each batch must have a "text" column, an "image" column with PIL images, or both columns.
        """
        encoders = {"image": self._encode_images, "text": self.model.encode_texts}
        chunks = []
        for batch in inputs:
            columns = [name for name in encoders if batch.get(name)]
            count = len(next(iter(batch.values())))
            rows = [{name: batch[name][row] for name in columns} for row in range(count)]
            chunks.append(encode_documents(rows, self.model.embed_dim, encoders))
        return torch.cat(chunks).numpy()

    def _encode_images(self, images: list[Any]) -> torch.Tensor:
        return self.model.encode_images([self.model.transform(load_image(image)) for image in images])


def get_model_meta(source: str, text: str | None = None) -> ModelMeta:
    """Return a model's metadata for mteb. The method `load_model` of the metadata loads the model.

    Args:
        source: Folder or hub id of an llm2clip model, or of a checkpoint of the LLM2CLIP authors. If the checkpoint is
            in mteb's registry, the registry's metadata is used, but not its loader, which requires llm2vec.
        text: Caption encoder for the checkpoint. Default: the published encoder with which the checkpoint was trained.
    """
    path, (name, revision) = Path(source), split_revision(source)
    listed = None if path.exists() else MODEL_REGISTRY.get(name)
    if listed and "llm2clip" not in name.lower():
        raise ValueError(f"{name} is not an LLM2CLIP checkpoint: use mteb.get_model_meta({name!r})")
    experiment = {"loader": "llm2clip"} if listed else {}  # separates the results from those of mteb's own loader
    if text:
        experiment["caption_encoder"] = get_model_name_with_hash(text) if Path(text).exists() else text
    if path.exists():
        name, revision = "/".join(path.resolve().parts[-2:]), get_model_name_with_hash(source).rpartition("-")[2]
    elif listed and revision is None:
        source, revision = "", listed.revision
    else:
        path = download_official_checkpoint(source)
        source, revision = "", path.name  # the folder name is the commit hash
    metadata = {
        "loader": partial(load_model, source=source, text=text),
        "name": name,
        "revision": revision,
        "embed_dim": listed.embed_dim if listed else read_config(path).get("embed_dim"),
        "modalities": ["image", "text"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "framework": ["PyTorch", "safetensors"],
        "use_instructions": False,
        "experiment_kwargs": experiment or None,
        "extra_requirements_groups": None,  # only mteb's own loader requires extras and returns float16
        "output_dtypes": None,
    }
    return (listed or ModelMeta.create_empty()).model_copy(update=metadata)


def load_model(
    name: str, revision: str | None = None, source: str = "", text: str | None = None, device: Any = None, **_: Any
) -> MTEBModel:
    """Load a model for mteb, by default on a GPU if available. If `source` is empty, load `name` at `revision`."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = source or f"{name}@{revision}"
    if is_model_folder(source if Path(source).exists() else download_official_checkpoint(source)):
        return MTEBModel(open_dual_encoder(source, device))
    model = load_official_checkpoint(source)
    encoders = [text] if text else suggest_published_encoders(source, model.config.text_dim, model.config.tower)
    if len(encoders) != 1:
        raise ValueError(
            f"the caption encoder of {name} is unknown (candidates: {', '.join(encoders) or 'none'}). Pass the encoder "
            "with which the checkpoint was trained: get_model_meta(CHECKPOINT, text=ENCODER)"
        )
    attach_caption_encoder(model, encoders[0], source)
    precision = model.to(device).load_encoder(stage="evaluate")
    model.encoder.move_for_encoding(device, precision)
    return MTEBModel(wrap_llm2clip(model, name, precision))

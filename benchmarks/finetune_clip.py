"""Fine-tune both towers of a CLIP or SigLIP model, the "directly fine-tuned CLIP" baseline in the LLM2CLIP paper.

    python benchmarks/finetune_clip.py DATA... --out RUN --align.tower openai/clip-vit-base-patch16
        [--align.lr 1e-5] [--align.tower_lr 1e-5] [other settings of `align`]

Both towers are trained with the training loop and settings of `align`, except that the model's own text tower replaces
the adapter, and tokenized captions replace the embedding store. The result is an ordinary transformers model that
`evaluate` accepts as a model or baseline. Run the same command again to resume an interrupted run.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from llm2clip.config import AlignConfig, FitConfig
from llm2clip.data.image_facts import save_training_image_hashes
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.io_utils import atomic_dir
from llm2clip.models.clip_models import ClipTextEncoder, get_pooled_output, load_clip_text_encoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import fingerprint, hash_weights, hide_loading_progress_bars, load_transformers_config
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.pipeline import open_run
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone
from llm2clip.train.align import align
from llm2clip.train.losses import get_loss

# Text towers of these types need no attention mask: CLIP's attention is causal, and SigLIP was trained on padded texts.
SUPPORTED_TYPES = ("clip", "metaclip_2", "siglip")


def finetune_clip(records: RecordTable, config: AlignConfig, out: Path, log: SkipLog) -> Path:
    """Fine-tune both towers of the CLIP model `config.tower`, or resume from the latest checkpoint.

    `lr` is the learning rate of the text tower, the projections and the logit scale; `tower_lr` is the learning rate of
    the vision tower. The adapter settings, `embed_dim` and `inherit` have no effect. The logit scale starts at the CLIP
    model's value.

    Returns:
        The model folder, `out/model`, in transformers format.
    """
    model_dir = out / "model"
    if not model_dir.exists():
        text_encoder = load_clip_text_encoder(config.tower, torch.device("cpu"))
        model_type = text_encoder.model.config.model_type
        if model_type not in SUPPORTED_TYPES:
            raise ValueError(
                f"--align.tower {config.tower} is a {model_type!r} model, which is not supported. Supported types: "
                f"{', '.join(SUPPORTED_TYPES)}"
            )
        captions = TokenizedCaptions(text_encoder)
        model = build_finetuning_model(text_encoder.model, config)
        model = align(records, captions, model.to(process_state().device), config, out, log)
        if process_state().is_main_process:
            _save_clip(model, config.tower, model_dir)
    wait_for_everyone()
    return model_dir


class TokenizedCaptions:
    """Tokenized captions with the embedding store interface that `align` expects."""

    def __init__(self, text_encoder: ClipTextEncoder) -> None:
        self.manifest = {"fingerprint": fingerprint({"weights": hash_weights(text_encoder.model)})}
        self._tokenize = text_encoder.tokenize
        self._captions: list[str] = []
        self._row_of: dict[str, int] = {}

    def find_rows(self, captions: Iterable[str]) -> np.ndarray:
        """Return the row numbers of N captions, of shape (N,), int64."""
        rows = []
        for caption in captions:
            row = self._row_of.setdefault(caption, len(self._captions))
            if row == len(self._captions):
                self._captions.append(caption)
            rows.append(row)
        return np.array(rows, dtype=np.int64)

    def take(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the token ids of N captions, padded to equal length, of shape (N, tokens), int64."""
        ids: Tensor = self._tokenize([self._captions[row] for row in rows])["input_ids"]
        return ids.numpy()


class TextTower(nn.Module):
    """Text tower of a transformers CLIP model. Maps token ids of shape (N, tokens) to embeddings."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        for name in ("vision_model", "visual_projection", "logit_scale", "logit_bias"):
            if hasattr(clip, name):  # parameters without gradients would cause a distributed run to hang
                delattr(clip, name)
        self.clip = clip

    def forward(self, input_ids: Tensor) -> Tensor:
        return get_pooled_output(self.clip.get_text_features(input_ids=input_ids))


@torch.no_grad()
def build_finetuning_model(clip: Any, config: AlignConfig) -> LLM2CLIP:
    """Build a model for `align` from a transformers CLIP model, using its text tower as the adapter.

    `clip` is modified: its text tower becomes part of the new model, and its vision tower is deleted.
    """
    tower = VisionTower.from_pretrained(config.tower, image_size=config.image_size)
    visual_projection = getattr(clip, "visual_projection", None)
    embed_dim = tower.feature_dim if visual_projection is None else visual_projection.out_features
    model_config = LLM2CLIPConfig(
        tower=tower.config,
        text_dim=embed_dim,  # not used
        embed_dim=embed_dim,
        adapter=AdapterConfig(depth=0),
        projection=visual_projection is not None,
        logit_bias=get_loss(config.loss).needs_bias,
        matryoshka_dims=config.matryoshka_dims,
    )
    model = LLM2CLIP(model_config, tower)
    if visual_projection is not None:
        model.projection.load_state_dict(visual_projection.state_dict())
    bias = getattr(clip, "logit_bias", None)
    model.set_logits(clip.logit_scale.exp().item(), None if bias is None else bias.item())
    model.adapter = TextTower(clip)  # type: ignore[assignment]
    return model


@torch.no_grad()
@hide_loading_progress_bars()
def _save_clip(model: LLM2CLIP, name: str, folder: Path) -> None:
    """Save the fine-tuned model in transformers format, with the tokenizer and image processor of `name`."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    clip: Any = AutoModel.from_pretrained(
        name, config=load_transformers_config(name), trust_remote_code=False, dtype=torch.float32
    )
    # Some versions of transformers wrap the vision model in another module.
    vision_model = getattr(clip.vision_model, "vision_model", clip.vision_model)
    vision_model.load_state_dict(model.tower.backbone.state_dict())
    text_tower: Any = model.adapter
    unexpected = clip.load_state_dict(text_tower.clip.state_dict(), strict=False).unexpected_keys
    assert not unexpected, unexpected
    if model.config.projection:
        clip.visual_projection.load_state_dict(model.projection.state_dict())
    clip.logit_scale.copy_(model.logit_scale.reshape(clip.logit_scale.shape))
    if model.logit_bias is not None and getattr(clip, "logit_bias", None) is not None:
        clip.logit_bias.copy_(model.logit_bias.reshape(clip.logit_bias.shape))
    with atomic_dir(folder) as temporary:
        clip.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(temporary)
        AutoImageProcessor.from_pretrained(name, trust_remote_code=False).save_pretrained(temporary)
        if model.training_images is not None:
            save_training_image_hashes(temporary, model.training_images)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=str, help="Images with captions, as for `align`.")
    parser.add_argument("--out", type=str, required=True, help="Output folder; the result is OUT/model.")
    parser.add_class_arguments(AlignConfig, "align")
    args = parser.instantiate(parser.parse_args(arguments))
    with open_run("align", args.data, Path(args.out), FitConfig(align=args.align)) as run:
        model = finetune_clip(run.data.train, run.config.align, run.out, run.log)
    print_once(f"Model: {model}")


if __name__ == "__main__":
    main()

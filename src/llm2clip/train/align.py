"""Stage 2, align: the vision tower, its projection and the adapter learn from the store.

Each step takes a batch of images and some cached captions of each, and lowers a contrastive loss between them. The LLM
is not here: its embeddings are rows of the store.

The heads may learn first, alone, on features that the tower gives as it is: heads drawn at random send a pretrained
tower noise until they fit it (arXiv 2202.10054). That is the same training with the tower frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from llm2clip.config import AlignConfig
from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.distributed import process_state
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.store.lock import folder_lock
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.align_trainer import AlignTrainer, Validate, latest_checkpoint_all_ranks


@onednn_matmul()
def align(
    records: Sequence[Record],
    store: EmbeddingStore,
    model: LLM2CLIP,
    config: AlignConfig,
    folder: Path,
    log: SkipLog,
    validate: Validate | None = None,
    features: Path | None = None,
) -> LLM2CLIP:
    """Train a model on `records`; a killed run goes on from its last checkpoint.

    Args:
        records: with images; their captions must be in the store.
        store: the captions' embeddings.
        model: freshly initialised, its tower pretrained; changed in place.
        recipe: the settings.
        folder: keeps checkpoints/step-N, metrics.jsonl, evaluations.jsonl, best/, and heads/ where they learn first.
        log: where unreadable images are counted and listed.
        validate: figures of the model in eval mode on held-out images, `score` among them, higher is better.
        features: store of the tower's features, where the recipe wants them; filled first; None is one in `folder`.

    Returns:
        The trained model, in eval mode: `model` itself, or the same with whole weights where they were shared out.

    Raises:
        ValueError: there are fewer images than a batch, or settings do not go together.
        TooManySkipped: too many images cannot be decoded.
        FloatingPointError: the loss or a gradient is not finite; the message names the step and the last checkpoint.
    """
    if config.load_best_at_end == "best" and validate is None:
        raise ValueError(
            "--align.load_best_at_end best needs held-out images to evaluate on: name some with --held_out"
        )
    state = process_state()  # before Accelerate decides by itself whether this is one of several
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) if state.is_main_process else nullcontext():
        if config.head_epochs and latest_checkpoint_all_ranks(folder / "checkpoints") is None:
            model = AlignTrainer(
                records, store, model, config.heads(), folder / "heads", features, log, heads=True
            ).run()
        return AlignTrainer(records, store, model, config, folder, features, log, validate).run()

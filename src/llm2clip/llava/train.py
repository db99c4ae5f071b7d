"""LLaVA-1.5's two-stage training (arXiv 2310.03744): first the projector alone, then the projector and the LLM.

The vision tower is frozen. Both stages use transformers' Trainer, so `torchrun` and `accelerate launch` with DDP or
FSDP2 work as usual. The second stage starts from the result of the first stage.

    RUN/features/     cached patch features of the vision tower, if they are small enough
    RUN/pretrain/     first stage: checkpoints, metrics.jsonl, and the trained weights in learned.safetensors
    RUN/instruct/     second stage: files as in RUN/pretrain/
    RUN/model/        trained model, for AutoModelForImageTextToText.from_pretrained
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.image_hashes import hash_images, load_training_images, save_training_images
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import atomic_dir
from llm2clip.llava.build import save_llava
from llm2clip.llava.chat_template import Conversation
from llm2clip.llava.config import LlavaConfig
from llm2clip.llava.image_features import PatchFeatures, cache_patch_features, patch_feature_size
from llm2clip.llava.stage import TRAINED_WEIGHTS, TrainingStage, load_llava, load_trained_weights, set_trainable_parts
from llm2clip.runs.output_folder import folder_lock
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone
from llm2clip.store.image_features import image_keys
from llm2clip.store.store import EmbeddingStore

STAGES = ("pretrain", "instruct")


def train_llava(
    source: str,
    pretrain: Sequence[Conversation],
    instruct: Sequence[Conversation],
    config: LlavaConfig,
    out: Path,
    log: SkipLog,
) -> Path:
    """Run both stages and save the trained model to `out/model`. An interrupted run is resumed.

    Args:
        source: folder or hub id of a LLaVA model, for example a folder written by `build_llava`.
        pretrain: conversations on which to train the projector. May be empty. Conversations without an image are
            ignored.
        instruct: conversations on which to train the projector and the LLM. May be empty.
        out: run directory.
        log: records images that cannot be decoded while features are cached. Without caching, such images only cause
            warnings.

    Returns:
        The path of the model folder.

    Raises:
        ValueError: there are no conversations, the number of epochs is 0, or a setting is invalid.
        FolderInUseError: another process is using the run directory.
    """
    conversations = {
        "pretrain": [conversation for conversation in pretrain if conversation.image is not None],
        "instruct": list(instruct),
    }
    if not config.pretrain_epochs:
        conversations["pretrain"] = []
    if not config.epochs:
        conversations["instruct"] = []
    if not any(conversations.values()):
        raise ValueError("there are no conversations to train on, or the number of epochs is 0")
    model_folder = out / "model"
    if (model_folder / "config.json").is_file():
        return model_folder
    state = process_state()
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory(state.device)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    with folder_lock(out) if state.is_main_process else nullcontext(), onednn_matmul():
        all_conversations = [*conversations["pretrain"], *conversations["instruct"]]
        store = _cache_features(source, all_conversations, processor, config, out / "features", log)
        for stage in STAGES:
            usable = conversations[stage]
            if store is not None:
                usable = _drop_unusable_conversations(usable, store)
            if conversations[stage] and not usable:
                raise ValueError(f"none of the images of the {stage} conversations can be decoded")
            if usable and not (out / stage / TRAINED_WEIGHTS).is_file():
                TrainingStage(source, processor, stage, config, out, store).run(usable)
        if state.is_main_process:
            hashes = hash_images(conversation.image for conversation in all_conversations)
            earlier = load_training_images(source)  # the images on which the vision tower was trained
            with atomic_dir(model_folder) as folder:
                save_llava(_load_trained_model(source, config, out), processor, folder)
                save_training_images(folder, hashes if earlier is None else np.union1d(hashes, earlier))
            for checkpoint in out.glob("*/checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
    wait_for_everyone()
    return model_folder


def _cache_features(
    source: str,
    conversations: Sequence[Conversation],
    processor: Any,
    config: LlavaConfig,
    folder: Path,
    log: SkipLog,
) -> EmbeddingStore | None:
    """Cache the patch features of all images and return the store.

    Return None, without caching anything, if the store would be larger than `config.cache_gb`.
    """
    images = {conversation.image.key: conversation.image for conversation in conversations if conversation.image}
    if not images or not config.cache_gb:
        return None
    model_config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    values_per_image = model_config.image_seq_length * patch_feature_size(model_config)
    gigabytes = len(images) * values_per_image * 2 / 1e9  # float16
    if gigabytes > config.cache_gb:
        return None
    model = load_llava(source)
    model.model.vision_tower.to(process_state().device)  # the LLM stays on the CPU: only the tower is used
    features = PatchFeatures(model, processor)
    del model
    print_once(f"Caching the vision tower's features for {len(images):,} images: {gigabytes:.1f} GB in {folder}")
    for _ in images:
        log.count_row()
    store = cache_patch_features(list(images.values()), features, folder, log, workers=config.workers or None)
    log.check()
    return store


def _drop_unusable_conversations(conversations: Sequence[Conversation], store: EmbeddingStore) -> list[Conversation]:
    """Return the conversations that have no image or whose image is in the store."""
    images = [conversation.image for conversation in conversations if conversation.image is not None]
    in_store = iter(store.find_keys(image_keys(images)) >= 0)
    return [conversation for conversation in conversations if conversation.image is None or next(in_store)]


def _load_trained_model(source: str, config: LlavaConfig, out: Path) -> Any:
    """Load the complete model in float32, with the weights from the last trained stage. LoRA weights are merged."""
    model = load_llava(source)
    trained_stages = [stage for stage in STAGES if (out / stage / TRAINED_WEIGHTS).is_file()]
    if not trained_stages:
        return model
    last = trained_stages[-1]
    model = set_trainable_parts(model, last, config, out)
    load_trained_weights(model, out / last / TRAINED_WEIGHTS)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model

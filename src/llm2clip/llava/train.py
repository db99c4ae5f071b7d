"""Two-stage training of LLaVA-1.5 (arXiv 2310.03744): first the projector, then the projector and the LLM.

The vision tower is frozen, and the second stage starts from the weights of the first stage. Both stages use
transformers' Trainer, which supports `torchrun` and `accelerate launch` with DDP or FSDP2.

    RUN/features/     cached patch features of the vision tower, unless they would exceed `--llava.cache_gb`
    RUN/pretrain/     first stage: checkpoints, metrics.jsonl, and trained weights in learned.safetensors
    RUN/instruct/     second stage: the same files as in RUN/pretrain/
    RUN/model/        trained model for AutoModelForImageTextToText.from_pretrained
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from llm2clip.cpu_tuning import keep_freed_memory, use_onednn_matmul
from llm2clip.data.image_facts import get_distinct_image_hashes, load_training_image_hashes, save_training_image_hashes
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import atomic_dir, atomic_path
from llm2clip.llava import LlavaConfig
from llm2clip.llava.conversations import Conversation
from llm2clip.llava.dataset import (
    ConversationDataset,
    LengthGroupedSampler,
    LlavaCollator,
    PatchFeatureEncoder,
    PrecomputedVisionTower,
    get_patch_feature_size,
)
from llm2clip.llava.modeling_patches import register_llava_classes
from llm2clip.models.loading import load_transformers_config
from llm2clip.models.precision import resolve_precision
from llm2clip.runs.checkpoint import CheckpointManager, TrainingLogCallback, TrainingStateMixin, hash_texts
from llm2clip.runs.output_folder import hold_folder_lock
from llm2clip.runs.ranks import print_once, process_state, set_fsdp_wrap_policy, set_mixed_precision, wait_for_everyone
from llm2clip.store.encode import make_image_keys, store_image_features
from llm2clip.store.store import EmbeddingStore

STAGES = ("pretrain", "instruct")
TRAINED_WEIGHTS = "learned.safetensors"  # file name in each stage's folder


def train_llava(
    source: str,
    pretrain: Sequence[Conversation],
    instruct: Sequence[Conversation],
    config: LlavaConfig,
    out: Path,
    log: SkipLog,
) -> Path:
    """Train both stages, or resume training. Save the model to `out/model` and return the path of the folder.

    Args:
        source: Folder or hub id of a LLaVA model, such as a folder written by `build_llava`.
        pretrain: Conversations for the first stage. May be empty. Conversations without an image are ignored.
        instruct: Conversations for the second stage. May be empty.
        log: Skip log for images that cannot be decoded, used only if patch features are cached.

    Raises:
        ValueError: There is nothing to train, a setting is invalid, or the data, the batch size or the number of
            processes has changed since the last checkpoint.
        FolderInUseError: Another process uses the run directory.
        FloatingPointError: The loss, the gradient norm or a weight is not finite.
    """
    with_image = [conversation for conversation in pretrain if conversation.image is not None]
    conversations = {
        "pretrain": with_image if config.pretrain_epochs else [],
        "instruct": list(instruct) if config.epochs else [],
    }
    if not any(conversations.values()):
        raise ValueError("nothing to train: there are no conversations, or the number of epochs is 0")
    model_folder = out / "model"
    if (model_folder / "config.json").is_file():
        return model_folder
    register_llava_classes()
    state = process_state()
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory(state.device)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    with hold_folder_lock(out) if state.is_main_process else nullcontext(), use_onednn_matmul():
        all_conversations = [*conversations["pretrain"], *conversations["instruct"]]
        store = _cache_patch_features(source, all_conversations, processor, config, out / "features", log)
        for stage in STAGES:
            usable = conversations[stage]
            if store is not None:
                images = [conversation.image for conversation in usable if conversation.image is not None]
                in_store = iter(store.find_keys(make_image_keys(images)) >= 0)
                usable = [conversation for conversation in usable if conversation.image is None or next(in_store)]
            if conversations[stage] and not usable:
                raise ValueError(f"none of the images in the {stage} conversations can be decoded")
            if usable and not (out / stage / TRAINED_WEIGHTS).is_file():
                _train_stage(stage, source, usable, processor=processor, config=config, out=out, store=store)
        if state.is_main_process:
            _save_model(source, all_conversations, processor, config, out)
            for checkpoint in out.glob("*/checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
    wait_for_everyone()
    return model_folder


def _save_model(
    source: str, conversations: Sequence[Conversation], processor: Any, config: LlavaConfig, out: Path
) -> None:
    """Save the model, and hashes of all images on which the model or its vision tower has been trained."""
    hashes = get_distinct_image_hashes(conversation.image for conversation in conversations)
    earlier = load_training_image_hashes(source)
    with atomic_dir(out / "model") as folder:
        _load_trained_model(source, config, out).save_pretrained(folder)
        processor.save_pretrained(folder)
        save_training_image_hashes(folder, hashes if earlier is None else np.union1d(hashes, earlier))


def load_llava_model(source: str, dtype: torch.dtype = torch.float32) -> Any:
    config = load_transformers_config(source)
    return AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=dtype, trust_remote_code=False)


def _cache_patch_features(
    source: str,
    conversations: Sequence[Conversation],
    processor: Any,
    config: LlavaConfig,
    folder: Path,
    log: SkipLog,
) -> EmbeddingStore | None:
    """Cache the patch features of all images. Return the store, or None if its size would exceed `config.cache_gb`."""
    images = {conversation.image.key: conversation.image for conversation in conversations if conversation.image}
    if not images or not config.cache_gb:
        return None
    model_config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    values_per_image = model_config.image_seq_length * get_patch_feature_size(model_config)
    gigabytes = len(images) * values_per_image * 2 / 1e9  # float16
    if gigabytes > config.cache_gb:
        return None
    model = load_llava_model(source)
    model.model.vision_tower.to(process_state().device)  # the LLM remains on the CPU
    features = PatchFeatureEncoder(model, processor)
    del model
    print_once(f"Caching patch features of {len(images):,} images in {folder} ({gigabytes:.1f} GB)")
    log.count_rows(len(images))
    refs, workers = list(images.values()), config.workers or None
    return store_image_features(refs, features, features.identity(), folder, log, batch_size=32, workers=workers)


def _train_stage(
    stage: str,
    source: str,
    conversations: Sequence[Conversation],
    *,
    processor: Any,
    config: LlavaConfig,
    out: Path,
    store: EmbeddingStore | None,
) -> None:
    """Train a stage, or resume its training. Save the trained weights to `out/STAGE/learned.safetensors`.

    If `store` is None, the vision tower computes patch features in each step.
    """
    folder, state = out / stage, process_state()
    batch_size = config.pretrain_batch_size if stage == "pretrain" else config.batch_size
    precision = resolve_precision("llava", config.precision, state.device)
    bf16_on_gpu = precision == "bf16" and state.device.type == "cuda"
    model = load_llava_model(source, torch.bfloat16 if config.lora_r and bf16_on_gpu else torch.float32)
    num_image_tokens: int = model.config.image_seq_length
    features = None
    empty_image = torch.zeros(num_image_tokens, get_patch_feature_size(model.config))
    if store is None:
        model.model.vision_tower.to(state.device)
        features = PatchFeatureEncoder(model, processor, bf16=bf16_on_gpu)
        size = features.transform.preprocess.size
        empty_image = torch.zeros(3, size, size)
    model.model.vision_tower = PrecomputedVisionTower(feature_maps=model.config.model_type == "fast_vlm")
    model.config.get_text_config().use_cache = False
    set_fsdp_wrap_policy(model.model.language_model.layers)
    model = _set_trainable_parameters(model, stage, config, out)

    texts = (json.dumps([conversation.id, *conversation.turns]) for conversation in conversations)
    checkpoints = CheckpointManager(folder)
    checkpoints.check_signature(
        {"batch_size": batch_size, "conversations": hash_texts(texts), "processes": state.num_processes}
    )
    dataset = ConversationDataset(conversations, processor, num_image_tokens, max_length=config.max_length, store=store)
    sampler = None
    if config.group_by_length:
        sampler = LengthGroupedSampler(dataset.estimate_token_counts(), batch_size, config.seed)
    lr_setting = "--llava.pretrain_lr" if stage == "pretrain" else "--llava.lr"
    training_log = TrainingLogCallback(
        folder / "metrics.jsonl", checkpoints, stage, f"Lower {lr_setting}", log_summary=True
    )
    trainer = _LlavaTrainer(
        model=model,
        args=_make_training_arguments(stage, config, folder, batch_size, precision),
        train_dataset=dataset,
        data_collator=LlavaCollator(processor.tokenizer, num_image_tokens, empty_image),
        sampler=sampler,
        features=features,
    )
    training_log.add_to_trainer(trainer)
    # Unfused attention is faster on CPUs.
    with sdpa_kernel(SDPBackend.MATH) if state.device.type == "cpu" else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoints.latest) if checkpoints.latest else None)
    _save_trained_weights(trainer, model, folder)


def _save_trained_weights(trainer: Trainer, model: nn.Module, folder: Path) -> None:
    full_state = trainer.accelerator.get_state_dict(trainer.model)  # with FSDP, weights are gathered from all ranks
    if process_state().is_main_process:
        names = sorted(name for name, weight in model.named_parameters() if weight.requires_grad)
        trained = {name: full_state[name].detach().cpu().contiguous() for name in names}
        if not all(tensor.isfinite().all() for tensor in trained.values()):
            raise FloatingPointError(f"some of the trained weights are not finite: see {folder / 'metrics.jsonl'}")
        with atomic_path(folder / TRAINED_WEIGHTS) as file:
            save_file(trained, file)
    wait_for_everyone()


def _make_training_arguments(
    stage: str, config: LlavaConfig, folder: Path, batch_size: int, precision: str
) -> TrainingArguments:
    state, pretrain = process_state(), stage == "pretrain"
    if batch_size % state.num_processes:
        name = "--llava.pretrain_batch_size" if pretrain else "--llava.batch_size"
        raise ValueError(
            f"{name} must be divisible by the number of processes (got {batch_size} and {state.num_processes})"
        )
    per_device = batch_size // state.num_processes
    largest = min(config.micro_batch_size, per_device)
    micro_batch_size = max(n for n in range(1, largest + 1) if per_device % n == 0)
    set_mixed_precision(precision)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=per_device // micro_batch_size,
        num_train_epochs=config.pretrain_epochs if pretrain else config.epochs,
        learning_rate=config.pretrain_lr if pretrain else config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,  # values less than 1 are fractions of all steps
        bf16=precision == "bf16",
        use_cpu=state.device.type == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=10,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        dataloader_num_workers=config.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        label_names=["labels"],
        report_to="none",
        accelerator_config={"use_configured_state": True},  # the process group has already been initialised
        seed=config.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # prevents the use of DataParallel on multiple GPUs
    return arguments


class _LlavaTrainer(TrainingStateMixin, Trainer):
    """Trainer that batches conversations of similar length and runs the vision tower outside the model."""

    def __init__(
        self, *, sampler: LengthGroupedSampler | None, features: PatchFeatureEncoder | None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.sampler = sampler  # if None, the default sampler is used
        self.features = features  # None if batches contain cached patch features

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if self.features is not None:
            prepared["pixel_values"] = self.features(prepared["pixel_values"])
        return prepared


def _set_trainable_parameters(model: Any, stage: str, config: LlavaConfig, out: Path) -> Any:
    """Freeze all parameters that a stage does not train. If LoRA is used, wrap the model in a PEFT model.

    The stage "pretrain" trains the projector. The stage "instruct" also trains the LLM (all weights or LoRA adapters),
    starting from the weights in `out/pretrain` if they exist. Projector and LoRA weights are converted to float32. The
    model is modified in place and returned.
    """
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    if stage == "pretrain":
        return model
    pretrained = out / "pretrain" / TRAINED_WEIGHTS
    if pretrained.is_file():
        _load_trained_weights(model, pretrained)
    if config.lora_r:
        return _add_lora_adapters(model, config)
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    return model


def _add_lora_adapters(model: Any, config: LlavaConfig) -> Any:
    """Add float32 LoRA adapters to all linear layers of the LLM. All weights of the projector are trained."""
    from peft import LoraConfig, get_peft_model

    lora_config = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        exclude_modules=r"model\.(vision_tower|multi_modal_projector)\..*",
        modules_to_save=["multi_modal_projector"],
    )
    torch.manual_seed(config.seed)
    peft_model: Any = get_peft_model(model, lora_config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


def _load_trained_model(source: str, config: LlavaConfig, out: Path) -> Any:
    """Load the model in float32, with the weights of the last trained stage. Merge LoRA weights."""
    model = load_llava_model(source)
    trained_stages = [stage for stage in STAGES if (out / stage / TRAINED_WEIGHTS).is_file()]
    if not trained_stages:
        return model
    last = trained_stages[-1]
    model = _set_trainable_parameters(model, last, config, out)
    _load_trained_weights(model, out / last / TRAINED_WEIGHTS)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def _load_trained_weights(model: nn.Module, file: Path) -> None:
    parameters = dict(model.named_parameters())
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(
                f"{file} does not match the model: the name or shape of the weight {name} differs. To start over, use "
                "another --out"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)

"""The `tune` stage: contrastive training of a decoder LLM on captions, with LoRA or full fine-tuning.

Two captions of the same image form a positive pair (called "CC" in the paper), and all other texts in the batch are
negatives. General text pairs ("TC") can be added or used instead. LoRA is merged into the LLM after training, so the
result is an ordinary sentence-transformers model.

Training uses the sentence-transformers trainer, with a metrics log, a progress bar and checkpoints that contain only
the trained weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import BatchSampler, SequentialSampler

from llm2clip.config import TuneConfig
from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.pairs import TuningItem, pair_batches, resolve_pairs_per_step
from llm2clip.io_utils import atomic_dir
from llm2clip.models.precision import DTYPES, resolve_precision
from llm2clip.models.text.batching import default_batch_tokens
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.llm_layers import get_layers
from llm2clip.models.text.lora import LoraSession, check_qlora_available
from llm2clip.runs.checkpoint import Checkpoints, TrainingLog, hash_texts
from llm2clip.runs.fsdp import (
    empty_copy,
    fsdp_enabled,
    gather_to_cpu,
    reduce_gradients_in_fp32,
    set_fsdp_wrap_policy,
    set_mixed_precision,
)
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone
from llm2clip.runs.training_state import TrainingStateMixin
from llm2clip.train.pair_loss import PairCollator, PairLoss


def tune(sources: Sequence[Sequence[TuningItem]], encoder: CaptionEncoder, config: TuneConfig, run_dir: Path) -> Path:
    """Tune a caption encoder and save it to `run_dir/encoder`, resuming from the latest checkpoint if one exists.

    Args:
        sources: One list of image captions or text pairs per source.
        encoder: Caption encoder to tune. It is modified in place.
        config: Settings for the `tune` stage. If `steps` is 0, the encoder is saved without tuning.
        run_dir: Output folder for checkpoints/ and metrics.jsonl. After training, it also contains encoder/. No other
            process may write to it (see `run_lock`).

    Returns:
        The folder of the tuned encoder, in sentence-transformers format.

    Raises:
        ValueError: A source has too few items, settings contradict each other, or the existing checkpoints were saved
            with different settings or data.
        FloatingPointError: The loss or a gradient is not finite.
    """
    encoder_dir = run_dir / "encoder"
    if not encoder_dir.exists():
        checkpoints = Checkpoints(run_dir / "checkpoints", config.batch_size)
        rows = _sample_rows(sources, encoder, config, checkpoints.resumed_total("pairs per step"))
        if rows:
            precision, lora = _set_trainable(encoder, config)
            _train(rows, encoder, config, run_dir, precision, checkpoints)
            _restore_encoder(encoder, lora)
        if process_state().is_main_process:
            with atomic_dir(encoder_dir) as folder:
                encoder.save_pretrained(folder)
    wait_for_everyone()
    return encoder_dir


def _sample_rows(
    sources: Sequence[Sequence[TuningItem]], encoder: CaptionEncoder, config: TuneConfig, pairs_per_step: int | None
) -> list[dict[str, Any]]:
    """Check the settings and return the text pairs for all steps. The pairs are identical on all ranks.

    `pairs_per_step` is the number of pairs per step of the run to resume, or None for a new run.
    """
    if config.qlora:
        check_qlora_available()
        if fsdp_enabled():
            raise ValueError("--tune.qlora does not work with FSDP: remove --use_fsdp")
    if any(not 0 < dim < encoder.embed_dim for dim in config.matryoshka_dims):
        raise ValueError(
            f"--tune.matryoshka_dims must be between 1 and {encoder.embed_dim - 1}, less than the encoder's embedding "
            f"dimension (got {config.matryoshka_dims})"
        )
    if config.steps == 0:
        return []
    if pairs_per_step is None:
        world_size = process_state().num_processes
        pairs_per_step = resolve_pairs_per_step(sources, config.batch_size, world_size)
        if pairs_per_step < config.batch_size * world_size:
            print_once(
                f"Too little data for {config.batch_size * world_size:,} pairs per step: using {pairs_per_step:,}"
            )
    batches = pair_batches(
        sources,
        config.source_weights,
        pairs_per_step,
        config.steps,
        seed=config.seed,
        hard_negative_group_size=config.hard_negative_group_size,
    )
    rows = [asdict(pair) for batch in batches for pair in batch]
    instructions = {row["instruction"] for row in rows} - {""}
    if instructions:
        encoder.exclude_prompts_from_pooling(sorted(instructions))
    return rows


def _set_trainable(encoder: CaptionEncoder, config: TuneConfig) -> tuple[str, LoraSession | None]:
    """Select the trainable weights: either newly added LoRA layers or all LLM weights except the token embeddings.

    With LoRA, the frozen matrices take nearly all of the memory. To save memory, they are stored in the training
    precision or, with QLoRA, in 4 bits.

    Returns:
        The training precision (fp32, bf16 or fp16), and the LoRA session, which is None without LoRA.
    """
    torch.manual_seed(config.seed)
    device = process_state().device
    precision = resolve_precision("tune", config.precision, device)
    llm = encoder.llm
    pooler = getattr(llm, "pooler", None)  # BERT-like models have a pooler, which llm2clip does not use
    encoder.st.requires_grad_(False)  # also freezes modules that follow the LLM
    lora = None
    if config.lora_r:
        lora_config = LoraConfig(
            r=config.lora_r,
            lora_alpha=2 * config.lora_r,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
            exclude_modules=["pooler.dense"] if pooler is not None else None,
        )
        lora = LoraSession(encoder, lora_config, DTYPES[precision], device, config.qlora)
    else:
        llm.requires_grad_(True)
        llm.get_input_embeddings().requires_grad_(False)  # they are large, and captions use only a few rows
        if pooler is not None:
            pooler.requires_grad_(False)
    encoder.to(device)
    if config.gradient_checkpointing:
        encoder.llm.gradient_checkpointing_enable({"use_reentrant": False})
        encoder.llm.enable_input_require_grads()
    return precision, lora


@onednn_matmul()
def _train(
    rows: Sequence[Mapping[str, Any]],
    encoder: CaptionEncoder,
    config: TuneConfig,
    run_dir: Path,
    precision: str,
    checkpoints: Checkpoints,
) -> None:
    """Train the weights that require gradients on the rows, in order. Resume from the latest checkpoint, if any."""
    pairs_per_step = len(rows) // config.steps  # on all ranks
    batch_size = pairs_per_step // process_state().num_processes
    set_mixed_precision(precision)
    set_fsdp_wrap_policy(list(get_layers(encoder.llm)))
    args = _make_training_arguments(config, run_dir, precision, batch_size)
    keep_freed_memory(args.device)
    texts = (text for r in rows for text in (r["instruction"], r["anchor"], r["positive"], *r["negatives"]))
    signature = {
        "steps": config.steps,
        "pairs per step": pairs_per_step,
        "precision": precision,
        "texts": hash_texts(texts),
    }
    checkpoints.check(signature)
    loss = PairLoss(
        encoder,
        config.temperature,
        config.batch_tokens or default_batch_tokens(encoder.device),
        symmetric=config.symmetric,
        matryoshka_dims=config.matryoshka_dims,
        # The memory per rank must not grow if the run has been resumed on fewer ranks.
        grad_cache=config.grad_cache or batch_size > config.batch_size,
    )
    trainer = _TuneTrainer(
        model=encoder.st,
        args=args,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        loss=loss,
        data_collator=cast(Any, PairCollator(preprocess_fn=encoder.tokenize)),
    )
    advice = "Lower --tune.lr, or use --tune.precision fp32"
    TrainingLog(run_dir / "metrics.jsonl", checkpoints, "tune", advice).add_to(trainer)
    reduce_gradients_in_fp32(trainer.accelerator)
    unsharded = empty_copy(encoder.st) if trainer.is_fsdp_enabled else None
    # On CPUs, use plain matmuls: in bf16, the backward pass of PyTorch's fused attention is slow there for short
    # captions (see `benchmarks/tune.py`).
    with sdpa_kernel(SDPBackend.MATH) if args.device.type == "cpu" else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoints.latest) if checkpoints.latest else None)
    if unsharded is not None:
        encoder.st = gather_to_cpu(unsharded, encoder.st)
    else:
        trainer.accelerator.unwrap_model(encoder.st, keep_fp32_wrapper=False)  # removes the autocast wrapper
        vars(encoder.st).pop("_is_accelerate_prepared", None)  # so that later training uses autocast again


def _restore_encoder(encoder: CaptionEncoder, lora: LoraSession | None) -> None:
    """Restore an ordinary encoder after training: merge LoRA and disable gradient checkpointing."""
    if getattr(encoder.llm, "is_gradient_checkpointing", False):
        encoder.llm.gradient_checkpointing_disable()
        encoder.llm.disable_input_require_grads()
    if lora is not None:
        lora.finish()
    encoder.eval()


def _make_training_arguments(
    config: TuneConfig, run_dir: Path, precision: str, batch_size: int
) -> SentenceTransformerTrainingArguments:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(run_dir / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=batch_size,
        learning_rate=config.lr,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=max(1, round(config.warmup_ratio * config.steps)),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=process_state().device.type == "cpu",
        seed=config.seed,
        batch_sampler=cast(Any, _make_sequential_sampler),
        save_steps=config.save_steps,
        logging_steps=1,
        report_to="none",
        dataloader_drop_last=True,
        logging_nan_inf_filter=False,
        # The number of forward passes depends on the text lengths and may differ between ranks, so forward passes must
        # not run collective operations.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=False,
    )
    args._n_gpu = 1  # one device per process; never use torch.nn.DataParallel
    return args


class _TuneTrainer(TrainingStateMixin, SentenceTransformerTrainer):
    """Sentence-transformers trainer for batches from `PairCollator`."""

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], None]:
        """Pass a batch from `PairCollator` to the loss unchanged."""
        return [inputs], None

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Do nothing, because the callback would encode examples for a model card that is never saved."""


def _make_sequential_sampler(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    """Return a batch sampler that keeps the order of the rows."""
    return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

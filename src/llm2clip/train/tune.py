"""The `tune` stage: contrastive training of a decoder LLM on captions, with LoRA or full fine-tuning.

Two captions of the same image form a positive pair (called "CC" in the paper). The negatives of an anchor are the
positives of all other pairs in the batch. With `symmetric`, each positive must also retrieve its anchor from all
anchors. General text pairs ("TC") can be added or used instead. LoRA is merged into the LLM after training, so the
result is an ordinary sentence-transformers model.

Captions have 10 to 200 tokens, so padding a complete batch to its longest text would waste half the compute. Texts are
therefore sorted by length and encoded in several forward passes, each with a limited number of tokens. With gradient
caching, the activations of only one forward pass are in memory at a time.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import BatchSampler, SequentialSampler

from llm2clip.config import TuneConfig
from llm2clip.cpu_tuning import keep_freed_memory, use_onednn_matmul
from llm2clip.data.pairs import TuningItems, iter_pair_batches, resolve_pairs_per_step
from llm2clip.io_utils import atomic_dir, hash_text_to_int64, require_extra
from llm2clip.models.precision import Precision, get_llm_layers, resolve_precision
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import TokenizedTexts, copy_to_device, get_default_batch_tokens
from llm2clip.models.text.sentence_transformer import LoraSession
from llm2clip.runs.checkpoint import CheckpointManager, TrainingLogCallback, TrainingStateMixin, hash_texts
from llm2clip.runs.ranks import (
    RaggedGather,
    all_reduce_max,
    copy_to_meta_device,
    enable_fp32_gradient_reduction,
    gather_to_cpu,
    is_fsdp_enabled,
    print_once,
    process_state,
    set_fsdp_wrap_policy,
    set_mixed_precision,
    wait_for_everyone,
)
from llm2clip.train.optim import ForwardPass, compute_cached_loss

PAIR_SCHEMA = pa.schema(
    [
        ("anchor", pa.string()),
        ("positive", pa.string()),
        ("negatives", pa.list_(pa.string())),
        ("instruction", pa.string()),
    ]
)


def tune(sources: Sequence[TuningItems], encoder: CaptionEncoder, config: TuneConfig, run_dir: Path) -> Path:
    """Tune a caption encoder in place, resuming from the latest checkpoint if one exists. Return `run_dir/encoder`.

    Args:
        sources: Image captions or text pairs, one list per source.
        encoder: Caption encoder, which is saved without tuning if `steps` is 0.
        run_dir: Output folder for checkpoints/, metrics.jsonl and, after training, encoder/ in the
            sentence-transformers format. The caller must hold the run lock.

    Raises:
        ValueError: A source has too few items, settings contradict each other, or the existing checkpoints were saved
            with different data, `steps`, `batch_size` or precision. Other settings, such as `lr`, are not compared.
        FloatingPointError: The loss or a gradient is not finite.
    """
    encoder_dir = run_dir / "encoder"
    if not encoder_dir.exists():
        checkpoints = CheckpointManager(run_dir / "checkpoints")
        if config.qlora:
            require_extra("qlora", "--tune.qlora")
            if is_fsdp_enabled():
                raise ValueError("--tune.qlora does not support FSDP: remove --use_fsdp")
        if config.steps > 0:
            pairs = _sample_pairs(sources, encoder, config, checkpoints.get_saved_items_per_step("pairs per step"))
            precision, lora = _select_trainable_weights(encoder, config)
            _train(pairs, encoder, config, run_dir, precision, checkpoints)
            if config.gradient_checkpointing:
                encoder.llm.gradient_checkpointing_disable()
                encoder.llm.disable_input_require_grads()
            if lora is not None:
                lora.finish()
            encoder.eval()
        if process_state().is_main_process:
            with atomic_dir(encoder_dir) as folder:
                encoder.save_pretrained(folder)
    wait_for_everyone()
    return encoder_dir


def _sample_pairs(
    sources: Sequence[TuningItems], encoder: CaptionEncoder, config: TuneConfig, pairs_per_step: int | None
) -> pa.Table:
    """Sample the text pairs for all steps, identically on all ranks. `pairs_per_step` is None for a new run."""
    if pairs_per_step is None:
        world_size = process_state().num_processes
        pairs_per_step = resolve_pairs_per_step(sources, config.batch_size, world_size)
        if pairs_per_step < config.batch_size * world_size:
            print_once(
                f"Using {pairs_per_step:,} text pairs per step instead of {config.batch_size * world_size:,}, because "
                "there is too little data"
            )
    options = {"seed": config.seed, "hard_negative_group_size": config.hard_negative_group_size}
    batches = iter_pair_batches(sources, pairs_per_step, config.steps, **options)
    pairs = pa.Table.from_batches(
        (pa.RecordBatch.from_pylist(list(map(asdict, batch)), PAIR_SCHEMA) for batch in batches), PAIR_SCHEMA
    )
    instructions = set(pc.unique(pairs["instruction"]).to_pylist()) - {""}
    if instructions:
        encoder.exclude_prompts_from_pooling(sorted(instructions))
    return pairs


def _select_trainable_weights(encoder: CaptionEncoder, config: TuneConfig) -> tuple[Precision, LoraSession | None]:
    """Add trainable LoRA layers or, without LoRA, unfreeze all LLM weights except the token embeddings.

    With LoRA, the frozen weight matrices take up nearly all memory, so the matrices are stored in the training
    precision or, with QLoRA, in 4 bits.
    """
    torch.manual_seed(config.seed)
    device = process_state().device
    precision = resolve_precision("tune", config.precision, device)
    llm = encoder.llm
    pooler = getattr(llm, "pooler", None)  # llm2clip does not use the pooler of BERT-like models
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
        lora = LoraSession(encoder, lora_config, precision.dtype, device, config.qlora)
    else:
        llm.requires_grad_(True)
        llm.get_input_embeddings().requires_grad_(False)  # each step uses few rows of this large matrix
        if pooler is not None:
            pooler.requires_grad_(False)
    encoder.to(device)
    if config.gradient_checkpointing:
        encoder.llm.gradient_checkpointing_enable({"use_reentrant": False})
        encoder.llm.enable_input_require_grads()
    return precision, lora


@use_onednn_matmul()
def _train(
    pairs: pa.Table,
    encoder: CaptionEncoder,
    config: TuneConfig,
    run_dir: Path,
    precision: str,
    checkpoints: CheckpointManager,
) -> None:
    pairs_per_step = len(pairs) // config.steps  # total over all ranks
    batch_size = pairs_per_step // process_state().num_processes
    set_mixed_precision(precision)
    set_fsdp_wrap_policy(list(get_llm_layers(encoder.llm)))
    args = _make_training_arguments(config, run_dir, precision, batch_size)
    keep_freed_memory(args.device)
    rows = (row for batch in pairs.to_batches() for row in batch.to_pylist())
    texts = (text for r in rows for text in (r["instruction"], r["anchor"], r["positive"], *r["negatives"]))
    signature = {
        "steps": config.steps,
        "pairs per step": pairs_per_step,
        "--tune.batch_size": config.batch_size,
        "precision": precision,
        "texts": hash_texts(texts),
    }
    checkpoints.check_signature(signature)
    loss = PairLoss(
        encoder,
        config.temperature,
        config.batch_tokens or get_default_batch_tokens(encoder.device),
        symmetric=config.symmetric,
        # A run that is resumed on fewer ranks has larger batches per rank, which must not use more memory.
        grad_cache=config.grad_cache or batch_size > config.batch_size,
    )
    trainer = _TuneTrainer(
        model=encoder.st,
        args=args,
        train_dataset=Dataset(pairs),
        loss=loss,
        data_collator=cast(Any, PairCollator(preprocess_fn=encoder.tokenize)),
    )
    advice = "Lower --tune.lr, or use --tune.precision fp32"
    TrainingLogCallback(run_dir / "metrics.jsonl", checkpoints, "tune", advice).add_to_trainer(trainer)
    enable_fp32_gradient_reduction(trainer.accelerator)
    unsharded = copy_to_meta_device(encoder.st) if trainer.is_fsdp_enabled else None
    # On CPUs, PyTorch's fused attention has a slow bf16 backward pass for short captions.
    with sdpa_kernel(SDPBackend.MATH) if args.device.type == "cpu" else nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoints.latest) if checkpoints.latest else None)
    if unsharded is not None:
        encoder.st = gather_to_cpu(unsharded, encoder.st)
    else:
        trainer.accelerator.unwrap_model(encoder.st, keep_fp32_wrapper=False)  # removes the autocast wrapper
        vars(encoder.st).pop("_is_accelerate_prepared", None)  # a later call to prepare() must add autocast again


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
        # Ranks may run different numbers of forward passes, so forward passes must not contain collective operations.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=False,
    )
    args._n_gpu = 1  # one device per process, without torch.nn.DataParallel
    return args


class _TuneTrainer(TrainingStateMixin, SentenceTransformerTrainer):
    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], None]:
        return [inputs], None

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Do nothing: the callback would encode examples for a model card that is never saved."""


def _make_sequential_sampler(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    """Keep the order of the sampled pairs. When training is resumed, the Trainer skips the pairs of completed steps."""
    return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


# ---- loss ------------------------------------------------------------------------------------------------------------


def pair_loss(
    anchor: Tensor,
    positive: Tensor,
    scale: float,
    text_ids: Tensor,
    negatives: Tensor | None = None,
    symmetric: bool = True,
    gather: bool = True,
) -> Tensor:
    """Compute InfoNCE over text pairs. Each anchor must retrieve its positive from all positives and hard negatives.

    Candidates that are identical to the anchor or its positive are not used as negatives. In a distributed run, the
    candidates of all ranks are gathered with gradients. Averaged over ranks, as in DDP, the gradients equal those of a
    single process with the complete batch.

    Args:
        anchor, positive: Embeddings of this rank's pairs, of shape (N, D), L2-normalised. Row i of `anchor` and row i
            of `positive` form a pair. N must be the same on all ranks.
        scale: Factor applied to the cosine similarities (1 / temperature).
        text_ids: Ids of the anchors, positives and negatives, in this order, of shape (2 N + M,), int64. Identical
            texts must have the same id.
        negatives: Embeddings of the hard negatives (`Pair.negatives`), of shape (M, D), L2-normalised, used for all
            anchors. M may differ between ranks. Similar captions (see `hard_negative_group_size`) are ordinary pairs.
        symmetric: If True, each positive must also retrieve its anchor from all anchors.
        gather: Use the candidates of all ranks. All ranks must then call this function.

    Returns:
        The loss as a float32 scalar, averaged over this rank's pairs and, if symmetric, over both directions.
    """
    n = len(anchor)
    if negatives is None:
        negatives = anchor[:0]
    anchor, positive, negatives = anchor.float(), positive.float(), negatives.float()
    anchor_ids, positive_ids, negative_ids = text_ids[:n], text_ids[n : 2 * n], text_ids[2 * n :]

    # Gather the texts of all ranks.
    pairs = RaggedGather(n, anchor.device, gather)
    extra = RaggedGather(len(negatives), anchor.device, gather)
    all_anchors, all_positives = pairs.gather(anchor, gradients=True), pairs.gather(positive, gradients=True)
    all_negatives = extra.gather(negatives, gradients=True)
    all_anchor_ids, all_positive_ids = pairs.gather(anchor_ids), pairs.gather(positive_ids)
    candidate_ids = torch.cat([all_positive_ids, extra.gather(negative_ids)])
    target = torch.arange(n, device=anchor.device) + pairs.offset  # index of each pair among the pairs of all ranks

    def retrieval_loss(query: Tensor, query_ids: Tensor, answer_ids: Tensor, items: Tensor, item_ids: Tensor) -> Tensor:
        excluded = (item_ids[None, :] == query_ids[:, None]) | (item_ids[None, :] == answer_ids[:, None])
        excluded = excluded.scatter(1, target[:, None], False)  # never exclude the target itself
        logits = scale * query @ items.T  # (queries, items)
        return F.cross_entropy(logits.masked_fill(excluded, -torch.inf), target)

    with torch.autocast(anchor.device.type, enabled=False):
        candidates = torch.cat([all_positives, all_negatives])
        loss = retrieval_loss(anchor, anchor_ids, positive_ids, candidates, candidate_ids)
        if symmetric:
            loss = (loss + retrieval_loss(positive, positive_ids, anchor_ids, all_anchors, all_anchor_ids)) / 2
    return loss


@dataclass
class PairCollator(SentenceTransformerDataCollator):
    """Collator that tokenizes a batch of pairs without padding: the anchors, then the positives and the hard negatives.

    `preprocess_fn` must be the encoder's `tokenize` method.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        anchors = [row["anchor"] for row in rows]
        others = [row["positive"] for row in rows]
        others += [text for row in rows for text in row["negatives"]]
        instructions = [row["instruction"] for row in rows] + [""] * len(others)
        tokenized = self.preprocess_fn(anchors + others, instructions)
        return {
            "tokens": tokenized.ids,
            "prompt_lengths": tokenized.prompt_lengths,
            "text_ids": torch.tensor([hash_text_to_int64(text) for text in anchors + others]),
            "pairs": len(rows),
        }


class PairLoss(nn.Module):
    """Loss module for the sentence-transformers trainer: `pair_loss` on batches from `PairCollator`."""

    def __init__(
        self,
        encoder: CaptionEncoder,
        temperature: float,
        batch_tokens: int,
        *,
        symmetric: bool = True,
        grad_cache: bool = False,
    ) -> None:
        """
        Args:
            temperature: Value by which cosine similarities are divided.
            batch_tokens: Maximum number of tokens per forward pass, including padding.
            grad_cache: Use gradient caching for batches that take several forward passes.
        """
        super().__init__()
        self.model = encoder.st  # the trainer replaces this model with its distributed wrapper
        self._encoder = [encoder]  # in a list, so that the encoder is not registered as a submodule
        self.scale, self.batch_tokens = 1 / temperature, batch_tokens
        self.symmetric, self.grad_cache = symmetric, grad_cache

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch. `features` must contain exactly one element, the batch."""
        batch, device = next(iter(features)), self._encoder[0].device
        tokens: list[list[int]] = batch["tokens"]
        passes: list[ForwardPass] = []
        rows_in_order: list[int] = []
        tokenized = TokenizedTexts(tokens, [], batch["prompt_lengths"])
        for prompt_length, rows in tokenized.batches(self.batch_tokens):
            passes.append(partial(self._encode_tokens, [tokens[row] for row in rows], prompt_length))
            rows_in_order += rows
        order = copy_to_device(torch.tensor(rows_in_order).argsort(), device)  # restores the order of the batch
        sharded, most_passes, last_pass = isinstance(self.model, FSDPModule), len(passes), passes[-1]
        if sharded or self.grad_cache:
            most_passes = all_reduce_max(len(passes), device)
        if sharded:  # all ranks must run the same number of passes, so some ranks rerun the last pass
            passes += [lambda: (last_pass()[0][:0],)] * (most_passes - len(passes))

        def loss_function(embeddings: Tensor) -> Tensor:
            return self._compute_loss(embeddings[order], batch["pairs"], batch["text_ids"].to(embeddings.device))

        # With a single pass, gradient caching would only repeat the pass.
        # Caching changes the order of collective operations, so all ranks must make the same choice.
        if self.grad_cache and most_passes > 1 and torch.is_grad_enabled():
            return compute_cached_loss(passes, loss_function, self.model, device)
        return loss_function(torch.cat([run()[0] for run in passes]))

    def _encode_tokens(self, tokens: list[list[int]], prompt_length: int) -> tuple[Tensor]:
        return (self.model(self._encoder[0].collate(tokens, prompt_length))["sentence_embedding"].float(),)

    def _compute_loss(self, embeddings: Tensor, pairs: int, text_ids: Tensor) -> Tensor:
        unit = F.normalize(embeddings, dim=-1)
        anchor, positive, negatives = unit[:pairs], unit[pairs : 2 * pairs], unit[2 * pairs :]
        return pair_loss(anchor, positive, self.scale, text_ids, negatives, self.symmetric)

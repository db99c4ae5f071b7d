"""Stage 1, tune: a decoder LLM learns to tell captions apart (caption-contrastive fine-tuning, "CC").

Two captions of one image are a positive pair, the captions of the other images of the batch its negatives; general
text pairs ("TC") may come between or instead. First, if asked, masked next-token prediction gets the LLM used to
reading both ways. Each of the two is a run of the trainer of its own; what they leave is an ordinary encoder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel

from llm2clip.checkpoint import hash_texts
from llm2clip.config import TuneConfig
from llm2clip.data.hashing import unique_captions
from llm2clip.data.pairs import TuningItem, pair_batches
from llm2clip.distributed import fsdp_enabled, process_state
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.length_batching import default_batch_tokens
from llm2clip.models.lora import LoraSession, check_qlora_available, merge_adapter
from llm2clip.models.precision import DTYPES, resolve_device_precision
from llm2clip.store.lock import folder_lock
from llm2clip.train.mntp import HIDDEN, MASK, MaskedTokenLoss, MaskingCollator
from llm2clip.train.pair_loss import PairCollator, PairLoss
from llm2clip.train.tune_trainer import train_captions


def tune(sources: Sequence[Sequence[TuningItem]], encoder: CaptionEncoder, recipe: TuneConfig, folder: Path) -> Path:
    """Tune `encoder` on pairs of texts and save it to `folder/encoder`; a killed run goes on.

    Args:
        sources: captions of images or text pairs, source by source: one, or as many as `recipe.source_weights`.
        encoder: the raw caption encoder; changed in place.
        recipe: the settings.
        folder: keeps checkpoints and metrics.jsonl, of the first part in `folder/mntp`; `folder/encoder` appears when
            the work is done.

    Returns:
        The folder of the tuned encoder, in sentence-transformers layout.

    Raises:
        ValueError: a source has too few items for the batch.
    """
    done, state = folder / "encoder", process_state()
    if not done.exists():
        rows = _rows(sources, encoder, recipe)  # what is wrong with the settings shows before any work
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder) if state.is_main_process else nullcontext():
            if recipe.mntp_steps > 0:
                _predict_hidden_tokens(sources, encoder, recipe, folder / "mntp")
            if rows:
                _tell_apart(rows, encoder, recipe, folder)
            if state.is_main_process:
                _save(encoder, done)
    state.wait_for_everyone()
    return done


def _rows(sources: Sequence[Sequence[TuningItem]], encoder: CaptionEncoder, recipe: TuneConfig) -> list[dict[str, Any]]:
    """The pairs of all steps, on every process alike."""
    if not recipe.merge and recipe.steps <= 0:
        raise ValueError("--tune.merge false keeps what caption-contrastive steps change: --tune.steps has none")
    if recipe.qlora:
        check_qlora_available()
    if recipe.qlora and fsdp_enabled():
        raise ValueError("--tune.qlora does not go with weights shared out over processes: leave out --use_fsdp")
    if not recipe.merge and isinstance(encoder.st[0].model, PeftModel):
        raise ValueError("the encoder is LoRA beside an LLM already: a second one beside it needs --tune.merge true")
    if any(not 0 < width < encoder.embed_dim for width in recipe.matryoshka_dims):
        raise ValueError(
            f"--tune.matryoshka_dims are between 1 and {encoder.embed_dim - 1}, below the encoder's own; got {recipe.matryoshka_dims}"
        )
    if recipe.steps <= 0:
        return []
    batch = recipe.batch_size * process_state().num_processes
    batches = pair_batches(
        sources,
        recipe.source_weights,
        batch,
        recipe.steps,
        recipe.seed,
        recipe.hard_negative_group_size,
    )
    rows = [asdict(pair) for batch in batches for pair in batch]
    if prompts := {row["instruction"] for row in rows} - {""}:
        encoder.exclude_prompts_from_pooling(sorted(prompts))
    return rows


def _tell_apart(rows: list[dict[str, Any]], encoder: CaptionEncoder, recipe: TuneConfig, folder: Path) -> None:
    """Caption-contrastive tuning."""
    precision, lora = _prepare(encoder, recipe)
    loss = PairLoss(
        encoder,
        recipe.temperature,
        recipe.batch_tokens or default_batch_tokens(encoder.device),
        symmetric=recipe.symmetric,
        widths=recipe.matryoshka_dims,
        grad_cache=recipe.grad_cache,
    )
    texts = hash_texts(
        text for row in rows for text in (row["instruction"], row["anchor"], row["positive"], *row["negatives"])
    )
    plan = {
        "steps": recipe.steps,
        "pairs": recipe.batch_size * process_state().num_processes,
        "precision": precision,
        "captions": texts,
    }
    collator = PairCollator(preprocess_fn=encoder.tokenize)
    train_captions(
        rows, encoder, loss, collator, recipe, folder, name="tune", steps=recipe.steps, precision=precision, plan=plan
    )
    _finish(encoder, lora, recipe.merge)


def _predict_hidden_tokens(
    sources: Sequence[Sequence[TuningItem]], encoder: CaptionEncoder, recipe: TuneConfig, folder: Path
) -> None:
    """Masked next-token prediction on the same texts, each as often as any other."""
    if (folder / "encoder").exists():
        options: dict[str, Any] = {"device": encoder.device, "attention": encoder.attention}
        encoder.st = None  # one LLM in memory at a time
        encoder.st = CaptionEncoder.from_pretrained(folder / "encoder", **options).st
        return
    texts = unique_captions(text for source in sources for item in source for text in item.texts)
    per_step = recipe.batch_size * process_state().num_processes
    rng = np.random.default_rng(recipe.seed)
    if not texts:
        raise ValueError("there is no text to predict hidden tokens of: leave out --tune.mntp_steps")
    order = (int(i) for _ in count() for i in rng.permutation(len(texts)))
    chosen = list(islice(order, recipe.mntp_steps * per_step))
    rows = [{"text": texts[i], "seed": f"{recipe.seed} {n}"} for n, i in enumerate(chosen)]
    mask = encoder.tokenizer(MASK, add_special_tokens=False)["input_ids"][0]
    collator = MaskingCollator(preprocess_fn=encoder.tokenize, share=HIDDEN, mask=mask)
    precision, lora = _prepare(encoder, recipe)
    loss = MaskedTokenLoss(encoder, recipe.batch_tokens or default_batch_tokens(encoder.device))
    plan = {
        "steps": recipe.mntp_steps,
        "texts": per_step,
        "precision": precision,
        "captions": hash_texts(row["text"] for row in rows),
    }
    train_captions(
        rows, encoder, loss, collator, recipe, folder, name="mntp", steps=recipe.mntp_steps, precision=precision,
        plan=plan,
    )  # fmt: skip
    _finish(encoder, lora, merge=True)
    if process_state().is_main_process:
        _save(encoder, folder / "encoder")
    process_state().wait_for_everyone()
    encoder.llm.name_or_path = str(folder / "encoder")  # what LoRA belongs to from here on


def _prepare(encoder: CaptionEncoder, recipe: TuneConfig) -> tuple[str, LoraSession | None]:
    """Choose which weights are trained; the precision they are trained in, and LoRA if that is what is trained.

    Under LoRA the matrices that stay as they are, nearly all of the memory, are held in that precision, or less.
    """
    torch.manual_seed(recipe.seed)
    merge_adapter(encoder)
    precision, lora = resolve_device_precision(recipe.precision, process_state().device), None
    encoder.st.requires_grad_(False)  # what comes after the LLM, such as a cut to fewer numbers, stays
    pooler = getattr(encoder.llm, "pooler", None)  # of BERT and its kin: no vector of ours goes through it
    if recipe.lora_r:
        config = LoraConfig(
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules=recipe.lora_targets if isinstance(recipe.lora_targets, str) else list(recipe.lora_targets),
            exclude_modules=["pooler.dense"] if pooler is not None else None,
        )
        lora = LoraSession(encoder, config, DTYPES[precision], process_state().device, recipe.qlora)
    else:  # the table is large, and captions read few rows of it
        encoder.llm.requires_grad_(True)
        encoder.llm.get_input_embeddings().requires_grad_(False)
        if pooler is not None:
            pooler.requires_grad_(False)
    encoder.to(process_state().device)
    if recipe.gradient_checkpointing:
        encoder.llm.gradient_checkpointing_enable({"use_reentrant": False})
        encoder.llm.enable_input_require_grads()
    return precision, lora


def _finish(encoder: CaptionEncoder, lora: LoraSession | None, merge: bool) -> None:
    """An ordinary LLM again: LoRA merged or beside it, nothing recomputed."""
    if getattr(encoder.llm, "is_gradient_checkpointing", False):
        encoder.llm.gradient_checkpointing_disable()
        encoder.llm.disable_input_require_grads()
    if lora is not None:
        lora.finish(merge)
    encoder.eval()


def _save(encoder: CaptionEncoder, folder: Path) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    encoder.save_pretrained(part)
    part.replace(folder)

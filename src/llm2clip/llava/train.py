"""Training a multimodal model as LLaVA-1.5 does (arXiv 2310.03744): the projector alone on captions, then the language
model with it on conversations. The vision tower stays as it is.

transformers' Trainer does the work, so `torchrun`, `accelerate launch` with DDP or FSDP, and bf16 are as everywhere.

    RUN/features/     the tower's patch features, where they are kept
    RUN/pretrain/     checkpoints and metrics.jsonl of the first stage; projector.safetensors, its result
    RUN/instruct/     those of the second
    RUN/model/        the result: opened by AutoModelForImageTextToText.from_pretrained
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from llm2clip.cache.store import EmbeddingStore
from llm2clip.cpu import quick_products, reuse_memory
from llm2clip.data.skips import SkipLog
from llm2clip.llava.batches import Collate, Conversations
from llm2clip.llava.build import save
from llm2clip.llava.pixels import keep_features, without_tower
from llm2clip.llava.prompts import Conversation
from llm2clip.models.precision import chosen_precision
from llm2clip.processes import processes, say
from llm2clip.recipes import LlavaRecipe

WHOLE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")  # of a checkpoint that was written to its end


def train(
    source: str,
    pretrain: Sequence[Conversation],
    instruct: Sequence[Conversation],
    recipe: LlavaRecipe,
    out: Path,
    log: SkipLog,
) -> Path:
    """Both stages, each going on where it was stopped; the folder of the result, `out/model`.

    Args:
        source: folder or hub id of a model that `build` made, or another of its kind.
        pretrain: what the projector learns from alone; may be empty.
        instruct: what the language model learns from with it; may be empty.
        recipe: the settings.
        out: run folder.
        log: where pictures that cannot be decoded are listed.

    Raises:
        ValueError: there is nothing to learn from.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if not pretrain and not instruct:
        raise ValueError("there are no conversations to train on")
    result = out / "model"
    if (result / "config.json").is_file():
        return result
    dtype = torch.float32 if not recipe.lora_r or not torch.cuda.is_available() else torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    state = processes()
    model.to(state.device)
    reuse_memory(state.device)
    store = _kept([*pretrain, *instruct], model, processor, recipe, out / "features", log)
    if store is not None:
        pretrain, instruct = (_readable(some, store) for some in (pretrain, instruct))
        log.check()
    _freeze(model.model.vision_tower)
    with quick_products(), without_tower(model) if store is not None else nullcontext():
        projector = out / "pretrain" / "projector.safetensors"
        if pretrain and recipe.pretrain_epochs and not projector.is_file():
            _freeze(model.model.language_model, model.lm_head)
            _stage(model, processor, pretrain, recipe, out / "pretrain", store)
            if state.is_main_process:
                _save(model.model.multi_modal_projector, projector)
            state.wait_for_everyone()
        if projector.is_file():
            model.model.multi_modal_projector.load_state_dict(load_file(projector))
        if instruct and recipe.epochs:
            model = _instructed(model, processor, instruct, recipe, out / "instruct", store)
    if state.is_main_process:
        tmp = out / ".model.tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        save(model, processor, tmp)
        os.replace(tmp, result)
        for stage in ("pretrain", "instruct"):
            for checkpoint in (out / stage).glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
    state.wait_for_everyone()
    return result


def _kept(
    conversations: Sequence[Conversation], model: Any, processor: Any, recipe: LlavaRecipe, folder: Path, log: SkipLog
) -> EmbeddingStore | None:
    """The store of patch features, where it is not too large."""
    refs = list({one.image.key: one.image for one in conversations if one.image is not None}.values())
    vision: int = model.config.vision_config.hidden_size
    size = len(refs) * model.config.image_seq_length * vision * 2 / 1e9
    if not refs or size > recipe.cache_gb:
        return None
    say(f"the tower's features of {len(refs):,} pictures: {size:.1f} GB in {folder}")
    for _ in refs:
        log.seen_one()
    return keep_features(refs, model, processor, folder, log, recipe.workers or None)[0]


def _readable(conversations: Sequence[Conversation], store: EmbeddingStore) -> list[Conversation]:
    """Those whose picture is in the store, and those without one."""
    from llm2clip.cache.features import image_name

    return [one for one in conversations if one.image is None or image_name(one.image) in store]


def _instructed(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    recipe: LlavaRecipe,
    out: Path,
    store: EmbeddingStore | None,
) -> Any:
    model.model.multi_modal_projector.requires_grad_(True)
    if not recipe.lora_r:
        for module in (model.model.language_model, model.lm_head):
            module.requires_grad_(True)
        _stage(model, processor, conversations, recipe, out, store)
        return model
    from peft import LoraConfig, get_peft_model

    linear = [
        f"model.language_model.{name}"
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        target_modules=f"({'|'.join(map(re.escape, linear))})",
        modules_to_save=["multi_modal_projector"],
    )
    torch.manual_seed(recipe.seed)
    with_lora = get_peft_model(model, config)
    _stage(with_lora, processor, conversations, recipe, out, store)
    return with_lora.merge_and_unload()


def _stage(
    model: Any,
    processor: Any,
    conversations: Sequence[Conversation],
    recipe: LlavaRecipe,
    out: Path,
    store: EmbeddingStore | None,
) -> None:
    """Train what asks for gradients, from the last whole checkpoint on."""
    first = out.name == "pretrain"
    tokenizer = processor.tokenizer
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    data = Conversations(conversations, processor, inner.config.image_seq_length, recipe.max_length, store)
    state, device = processes(), processes().device
    batch = recipe.pretrain_batch if first else recipe.batch
    micro = min(recipe.micro_batch, max(1, batch // state.num_processes))
    precision = chosen_precision(recipe.precision, device)
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, batch // (micro * state.num_processes)),
        num_train_epochs=recipe.pretrain_epochs if first else recipe.epochs,
        learning_rate=recipe.pretrain_lr if first else recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        bf16=precision == "bf16",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=recipe.recompute,
        logging_steps=10,
        save_steps=recipe.checkpoint_every,
        save_total_limit=2,
        dataloader_num_workers=recipe.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=any(one.image is None for one in conversations),
        label_names=["labels"],
        report_to="none",
        seed=recipe.seed,
    )
    collate = Collate(tokenizer.pad_token_id, features=store is not None)
    trainer = _Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[_Metrics(out)]
    )
    trainer.lengths = data.lengths() if recipe.grouped else None
    if recipe.recompute:
        inner.config.use_cache = False
    with _training(inner):
        trainer.train(resume_from_checkpoint=_last(out))
    if not math.isfinite(trainer.state.log_history[-1].get("train_loss", math.nan)):
        raise FloatingPointError(f"the loss is not finite; see {out / 'metrics.jsonl'}")
    trainer.accelerator.wait_for_everyone()


class _Trainer(Trainer):
    """transformers' own, with batches of conversations of similar length."""

    lengths: list[int] | None = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint of the first stage holds the projector alone: the rest is as it was."""
        if isinstance(self.model, PreTrainedModel):
            learned = {name for name, p in self.model.named_parameters() if p.requires_grad}
            state = self.model.state_dict() if state_dict is None else state_dict
            if any("multi_modal_projector" not in name for name in learned):
                learned = set(state)
            state_dict = {name: tensor for name, tensor in state.items() if name in learned}
        super()._save(output_dir, state_dict)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=self.lengths)


class _Metrics(TrainerCallback):
    """A line of metrics.jsonl for each log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _last(out: Path) -> str | None:
    """The last checkpoint that was written to its end; the others are of no use."""
    steps = {int(folder.name.rpartition("-")[2]): folder for folder in out.glob("checkpoint-*")}
    whole = [step for step, folder in steps.items() if all((folder / name).is_file() for name in WHOLE)]
    return str(steps[max(whole)]) if whole else None


def _freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)


@contextmanager
def _training(model: Any) -> Iterator[None]:
    """The tower stays in eval mode whatever the trainer asks of the model: batch norms are not to move."""
    tower = model.model.vision_tower
    tower.eval()
    tower.train = MethodType(lambda self, mode=True: self, tower)
    try:
        yield
    finally:
        del tower.train
        model.eval()


def _save(module: nn.Module, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_suffix(".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}, tmp)
    os.replace(tmp, file)

"""Training a multimodal model as LLaVA-1.5 does (arXiv 2310.03744): the projector alone on captions, then the language
model with it on conversations. The vision tower stays as it is.

transformers' Trainer does the work, so `torchrun`, `accelerate launch` with DDP or FSDP, and bf16 are as everywhere.
Each stage begins with the model as it was and what the stage before it learned, and leaves what it learned itself.

    RUN/features/     the tower's patch features, where they are kept
    RUN/pretrain/     checkpoints and metrics.jsonl of the first stage; learned.safetensors, its result
    RUN/instruct/     those of the second
    RUN/model/        the result: opened by AutoModelForImageTextToText.from_pretrained
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
)

from llm2clip.checkpoint import Checkpoints, TrainingLog, hash_texts
from llm2clip.config import LlavaConfig
from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.skip_log import SkipLog
from llm2clip.distributed import print_once, process_state, set_fsdp_wrap_policy, set_mixed_precision
from llm2clip.llava.build import save_llava
from llm2clip.llava.chat_template import IMAGE, Conversation
from llm2clip.llava.collator import ConversationDataset, LengthGroupedSampler, LlavaCollator
from llm2clip.llava.image_features import PatchFeatures, PrecomputedVision, cache_patch_features, patch_feature_size
from llm2clip.models.precision import resolve_device_precision
from llm2clip.store.image_features import image_keys
from llm2clip.store.lock import folder_lock
from llm2clip.store.store import EmbeddingStore

TRAINED_WEIGHTS = "learned.safetensors"  # in a stage's folder, and in each of its checkpoints
STAGES = ("pretrain", "instruct")


def train_llava(
    source: str,
    pretrain: Sequence[Conversation],
    instruct: Sequence[Conversation],
    config: LlavaConfig,
    out: Path,
    log: SkipLog,
) -> Path:
    """Both stages, each going on where it was stopped; the folder of the result, `out/model`.

    Args:
        source: folder or hub id of a model that `build` made, or another of its kind.
        pretrain: what the projector learns from alone; may be empty. Those without a picture teach it nothing, and
            are left out.
        instruct: what the language model learns from with it; may be empty.
        recipe: the settings.
        out: run folder.
        log: where pictures that cannot be decoded are listed, if their features are kept; else they are warned of.

    Raises:
        ValueError: there is nothing to learn from, or a setting does not fit.
        StoreError: another run is at work in the folder.
    """
    pretrain = [one for one in pretrain if one.image is not None]
    work = {"pretrain": pretrain if config.pretrain_epochs else [], "instruct": instruct if config.epochs else []}
    if not any(work.values()):
        raise ValueError("there are no conversations to train on, or no epochs")
    result, state = out / "model", process_state()
    if (result / "config.json").is_file():
        return result
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory(state.device)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    with folder_lock(out) if state.is_main_process else nullcontext(), onednn_matmul():
        store = _kept(source, [*work["pretrain"], *work["instruct"]], processor, config, out / "features", log)
        for stage in STAGES:
            some = _readable(work[stage], store) if store is not None else work[stage]
            if work[stage] and not some:
                raise ValueError(f"no picture of the {stage} conversations can be decoded")
            if some and not (out / stage / TRAINED_WEIGHTS).is_file():
                _Stage(source, processor, stage, config, out, store).run(some)
        if state.is_main_process:
            tmp = out / ".model.tmp"
            shutil.rmtree(tmp, ignore_errors=True)
            save_llava(_result(source, config, out), processor, tmp)
            os.replace(tmp, result)
            for checkpoint in out.glob("*/checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
    state.wait_for_everyone()
    return result


# ---- the model of a stage -------------------------------------------------------------------------------------------


def _opened(source: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, trust_remote_code=False)


def _learning(model: Any, stage: str, config: LlavaConfig, out: Path) -> Any:
    """The model with what the stage before it learned, and with gradients for what learns now; with LoRA on it, where
    that is asked for."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)  # it learns, whatever the others are rounded to
    if stage == "pretrain":
        return model
    if (out / "pretrain" / TRAINED_WEIGHTS).is_file():
        _put(model, out / "pretrain" / TRAINED_WEIGHTS)
    if not config.lora_r:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    linear = [
        re.escape(f"model.language_model.{name}")
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    config = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=f"({'|'.join(linear)})",
        modules_to_save=["multi_modal_projector"],
    )
    torch.manual_seed(config.seed)
    with_lora: Any = get_peft_model(model, config)
    for parameter in with_lora.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return with_lora


def _learned(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict what learns."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: state[name].detach().cpu().contiguous() for name in sorted(names)}


def _put(model: nn.Module, file: Path) -> None:
    """Put what was learned back into a model, whose parameters have the same names.

    Raises:
        ValueError: they have not.
    """
    own, there = dict(model.named_parameters()), load_file(file)
    if not there.keys() <= own.keys() or any(own[name].shape != tensor.shape for name, tensor in there.items()):
        raise ValueError(f"{file} is not of this model: begin again in another folder")
    with torch.no_grad():
        for name, tensor in there.items():
            own[name].copy_(tensor)


def _result(source: str, config: LlavaConfig, out: Path) -> Any:
    """The whole model in float32, with what both stages learned; LoRA is merged."""
    model = _opened(source)
    last = "instruct" if (out / "instruct" / TRAINED_WEIGHTS).is_file() else "pretrain"
    if not (out / last / TRAINED_WEIGHTS).is_file():
        return model
    model = _learning(model, last, config, out)
    _put(model, out / last / TRAINED_WEIGHTS)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


# ---- pictures -------------------------------------------------------------------------------------------------------


def _kept(
    source: str,
    conversations: Sequence[Conversation],
    processor: Any,
    config: LlavaConfig,
    folder: Path,
    log: SkipLog,
) -> EmbeddingStore | None:
    """The store of patch features, where it is not too large."""
    refs = list({one.image.key: one.image for one in conversations if one.image is not None}.values())
    if not refs or not config.cache_gb:
        return None
    config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
    size = len(refs) * config.image_seq_length * patch_feature_size(config) * 2 / 1e9
    if size > config.cache_gb:
        return None
    model = _opened(source)
    model.model.vision_tower.to(process_state().device)  # the language model has nothing to do here
    side = PatchFeatures(model, processor)
    del model
    print_once(f"the tower's features of {len(refs):,} pictures: {size:.1f} GB in {folder}")
    for _ in refs:
        log.count_row()
    store = cache_patch_features(refs, side, folder, log, config.workers or None)
    log.check()
    return store


def _readable(conversations: Sequence[Conversation], store: EmbeddingStore) -> list[Conversation]:
    """Those whose picture is in the store, and those without one."""
    pictured = [one.image for one in conversations if one.image is not None]
    there = iter(store.find(image_keys(pictured)) >= 0)
    return [one for one in conversations if one.image is None or next(there)]


# ---- a stage --------------------------------------------------------------------------------------------------------


class _Stage:
    """One stage: its model, its batches, its trainer."""

    def __init__(
        self, source: str, processor: Any, stage: str, config: LlavaConfig, out: Path, store: EmbeddingStore | None
    ) -> None:
        self.stage, self.config, self.out, self.store, self.processor = stage, config, out / stage, store, processor
        self.batch = config.pretrain_batch_size if stage == "pretrain" else config.batch_size
        device = process_state().device
        self.precision = resolve_device_precision(config.precision, device)
        low = bool(config.lora_r) and self.precision == "bf16" and device.type == "cuda"
        model = _opened(source, torch.bfloat16 if low else torch.float32)
        self.seeing = None
        if store is None:
            model.model.vision_tower.to(device)
            self.seeing = PatchFeatures(model, processor, self.precision == "bf16" and device.type == "cuda")
        self.tokens: int = model.config.image_seq_length
        self.width: int = model.model.multi_modal_projector.linear_1.in_features
        model.model.vision_tower = PrecomputedVision(maps=model.config.model_type == "fast_vlm")
        model.config.get_text_config().use_cache = False
        self.model = _learning(model, stage, config, out)
        set_fsdp_wrap_policy(model.model.language_model.layers)

    def run(self, conversations: Sequence[Conversation]) -> None:
        """Train from the last whole checkpoint on, and leave what was learned."""
        config, tokenizer = self.config, self.processor.tokenizer
        data = ConversationDataset(conversations, self.processor, self.tokens, config.max_length, self.store)
        empty = torch.zeros(self.tokens, self.width)
        if self.seeing is not None:
            size = self.seeing.transform.preprocess.size
            empty = torch.zeros(3, size, size)
        plan = {
            "batch": self.batch,
            "conversations": hash_texts(json.dumps([one.id, *one.turns]) for one in conversations),
            "processes": process_state().num_processes,
        }
        checkpoints = Checkpoints(self.out, plan)
        log = TrainingLog(self.out / "metrics.jsonl", checkpoints, "Lower the learning rate", log_summary=True)
        trainer = _Trainer(
            model=self.model,
            args=self._arguments(),
            train_dataset=data,
            data_collator=LlavaCollator(
                tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(IMAGE), self.tokens, empty
            ),
            callbacks=[log],
        )  # fmt: skip
        trainer.seeing = self.seeing
        if config.group_by_length:
            trainer.sampler = LengthGroupedSampler(data.lengths(), self.batch, config.seed)
        trainer.train(resume_from_checkpoint=str(checkpoints.latest) if checkpoints.latest else None)
        state = trainer.accelerator.get_state_dict(trainer.model)  # of all processes, where weights are shared out
        if process_state().is_main_process:
            learned = _learned(self.model, state)
            if not all(tensor.isfinite().all() for tensor in learned.values()):
                raise FloatingPointError(f"what was learned is not finite; see {self.out / 'metrics.jsonl'}")
            _save(learned, self.out / TRAINED_WEIGHTS)
        process_state().wait_for_everyone()

    def _arguments(self) -> TrainingArguments:
        config, state = self.config, process_state()
        first = self.stage == "pretrain"
        if self.batch % state.num_processes:
            raise ValueError(f"a batch of {self.batch} cannot be shared out to {state.num_processes} processes evenly")
        own = self.batch // state.num_processes
        micro = max(n for n in range(1, min(config.micro_batch_size, own) + 1) if own % n == 0)
        set_mixed_precision(self.precision)
        arguments = TrainingArguments(
            output_dir=str(self.out),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=own // micro,
            num_train_epochs=config.pretrain_epochs if first else config.epochs,
            learning_rate=config.pretrain_lr if first else config.lr,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_ratio,
            bf16=self.precision == "bf16",
            use_cpu=state.device.type == "cpu",
            gradient_checkpointing=config.gradient_checkpointing,
            logging_steps=10,
            logging_nan_inf_filter=False,
            save_steps=config.save_steps,
            save_total_limit=2,
            dataloader_num_workers=config.workers,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            label_names=["labels"],
            report_to="none",
            accelerator_config={"use_configured_state": True},  # the processes are joined already
            seed=config.seed,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # or one process would take all devices, and so many times the batch
        return arguments


class _Trainer(Trainer):
    """transformers' own, with batches of conversations of similar length, the tower beside the model, and checkpoints
    that hold what learns, under the names that it has here."""

    sampler: LengthGroupedSampler | None = None
    seeing: PatchFeatures | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = super()._prepare_inputs(inputs)
        if self.seeing is not None:
            found["pixel_values"] = self.seeing(found["pixel_values"])
        return found

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # all processes come here
            return
        model: Any = self.model
        state = model.state_dict() if state_dict is None else state_dict
        _save(_learned(model, state), Path(str(output_dir)) / TRAINED_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            own: Any = self.model
            _put(own, Path(resume_from_checkpoint) / TRAINED_WEIGHTS)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_suffix(".tmp")
    save_file(tensors, tmp)
    os.replace(tmp, file)

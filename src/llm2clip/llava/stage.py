"""One stage of LLaVA training with transformers' Trainer: trained weights, data, checkpoints and metrics.

The `pretrain` stage trains the projector. The `instruct` stage starts from the result of `pretrain`, if there is one,
and trains the projector and the LLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from llm2clip.io_utils import atomic_path
from llm2clip.llava.chat_template import IMAGE_TOKEN, Conversation
from llm2clip.llava.collator import ConversationDataset, LengthGroupedSampler, LlavaCollator
from llm2clip.llava.config import LlavaConfig
from llm2clip.llava.image_features import PatchFeatures, PrecomputedVision
from llm2clip.models.hub.loading import load_config
from llm2clip.models.precision import resolve_precision
from llm2clip.runs.checkpoint import Checkpoints, TrainingLog, hash_texts, show_progress
from llm2clip.runs.fsdp import set_fsdp_wrap_policy, set_mixed_precision
from llm2clip.runs.ranks import process_state, wait_for_everyone
from llm2clip.runs.training_state import TrainingStateMixin
from llm2clip.store.store import EmbeddingStore

TRAINED_WEIGHTS = "learned.safetensors"  # file name within each stage's folder


def load_llava(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a LLaVA model from a folder or hub id."""
    config = load_config(source)
    return AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=dtype, trust_remote_code=False)


class TrainingStage:
    """The `pretrain` or `instruct` stage of a training run."""

    def __init__(
        self, source: str, processor: Any, stage: str, config: LlavaConfig, out: Path, store: EmbeddingStore | None
    ) -> None:
        """
        Args:
            source: folder or hub id of the untrained model.
            stage: `pretrain` or `instruct`.
            out: run directory; the stage writes to `out/STAGE`.
            store: cached patch features. If None, the vision tower computes the features in each step.
        """
        self.stage = stage
        self.config = config
        self.folder = out / stage
        self.store = store
        self.processor = processor
        self.batch_size = config.pretrain_batch_size if stage == "pretrain" else config.batch_size
        device = process_state().device
        self.precision = resolve_precision("tune", config.precision, device)
        bf16_on_gpu = self.precision == "bf16" and device.type == "cuda"
        model = load_llava(source, torch.bfloat16 if config.lora_r and bf16_on_gpu else torch.float32)
        self.features: PatchFeatures | None = None
        if store is None:
            model.model.vision_tower.to(device)
            self.features = PatchFeatures(model, processor, bf16=bf16_on_gpu)
        self.image_tokens: int = model.config.image_seq_length
        self.feature_size: int = model.model.multi_modal_projector.linear_1.in_features
        model.model.vision_tower = PrecomputedVision(feature_maps=model.config.model_type == "fast_vlm")
        model.config.get_text_config().use_cache = False
        self.model = set_trainable_parts(model, stage, config, out)
        set_fsdp_wrap_policy(model.model.language_model.layers)

    def run(self, conversations: Sequence[Conversation]) -> None:
        """Train the stage and save the trained weights to `out/STAGE/learned.safetensors`.

        Training resumes from the latest checkpoint, if there is one.

        Raises:
            ValueError: the data, batch size or number of processes has changed since the checkpoint was saved.
            FloatingPointError: the loss, gradient norm or weights are not finite.
        """
        trained_on = hash_texts(json.dumps([conversation.id, *conversation.turns]) for conversation in conversations)
        signature = {
            "batch_size": self.batch_size,
            "conversations": trained_on,
            "processes": process_state().num_processes,
        }
        checkpoints = Checkpoints(self.folder)
        checkpoints.check(signature)
        trainer = self._make_trainer(conversations, checkpoints)
        trainer.train(resume_from_checkpoint=str(checkpoints.latest) if checkpoints.latest else None)
        full_state = trainer.accelerator.get_state_dict(trainer.model)  # gathered from all ranks under FSDP
        if process_state().is_main_process:
            names = sorted(name for name, weight in self.model.named_parameters() if weight.requires_grad)
            trained = {name: full_state[name].detach().cpu().contiguous() for name in names}
            if not all(tensor.isfinite().all() for tensor in trained.values()):
                raise FloatingPointError(f"the trained weights are not finite: see {self.folder / 'metrics.jsonl'}")
            with atomic_path(self.folder / TRAINED_WEIGHTS) as file:
                save_file(trained, file)
        wait_for_everyone()

    def _make_trainer(self, conversations: Sequence[Conversation], checkpoints: Checkpoints) -> _LlavaTrainer:
        config = self.config
        tokenizer = self.processor.tokenizer
        dataset = ConversationDataset(
            conversations, self.processor, self.image_tokens, max_length=config.max_length, store=self.store
        )
        collator = LlavaCollator(
            pad_id=tokenizer.pad_token_id,
            image_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_tokens=self.image_tokens,
            empty_image=self._make_blank_image(),
        )
        sampler = None
        if config.group_by_length:
            sampler = LengthGroupedSampler(dataset.lengths(), self.batch_size, config.seed)
        lr_setting = "--llava.pretrain_lr" if self.stage == "pretrain" else "--llava.lr"
        log = TrainingLog(self.folder / "metrics.jsonl", checkpoints, advice=f"Lower {lr_setting}", log_summary=True)
        trainer = _LlavaTrainer(
            model=self.model,
            args=self._make_training_arguments(),
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[log],
            sampler=sampler,
            features=self.features,
        )
        show_progress(trainer, self.stage)
        return trainer

    def _make_blank_image(self) -> Tensor:
        """Return all-zero patch features if features are cached, otherwise the pixels of a blank image."""
        if self.features is None:
            return torch.zeros(self.image_tokens, self.feature_size)
        size = self.features.transform.preprocess.size
        return torch.zeros(3, size, size)

    def _make_training_arguments(self) -> TrainingArguments:
        """Return the arguments for the Trainer.

        Raises:
            ValueError: the batch size is not divisible by the number of processes.
        """
        config, state = self.config, process_state()
        pretrain = self.stage == "pretrain"
        if self.batch_size % state.num_processes:
            name = "--llava.pretrain_batch_size" if pretrain else "--llava.batch_size"
            raise ValueError(
                f"{name} must be divisible by the number of processes (got {self.batch_size} and {state.num_processes})"
            )
        per_device = self.batch_size // state.num_processes
        largest = min(config.micro_batch_size, per_device)
        micro_batch_size = max(n for n in range(1, largest + 1) if per_device % n == 0)
        set_mixed_precision(self.precision)
        arguments = TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=per_device // micro_batch_size,
            num_train_epochs=config.pretrain_epochs if pretrain else config.epochs,
            learning_rate=config.pretrain_lr if pretrain else config.lr,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_ratio,  # a value below 1 is a fraction of all steps
            bf16=self.precision == "bf16",
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
            accelerator_config={"use_configured_state": True},  # the process group already exists
            seed=config.seed,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # otherwise, one process would use all GPUs through DataParallel
        return arguments


class _LlavaTrainer(TrainingStateMixin, Trainer):
    """Trainer that batches by length and runs the vision tower outside the model."""

    def __init__(
        self, *, sampler: LengthGroupedSampler | None, features: PatchFeatures | None, **arguments: Any
    ) -> None:
        """
        Args:
            sampler: if None, the Trainer's default sampler is used.
            features: function that computes patch features from pixels in each step. If None, batches already contain
                patch features.
        """
        super().__init__(**arguments)
        self.sampler = sampler
        self.features = features

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        if self.features is not None:
            prepared["pixel_values"] = self.features(prepared["pixel_values"])
        return prepared


def set_trainable_parts(model: Any, stage: str, config: LlavaConfig, out: Path) -> Any:
    """Freeze all parameters that a stage does not train. Return the model, wrapped in a PEFT model if LoRA is used.

    The `pretrain` stage trains the projector. The `instruct` stage also trains the LLM, either all weights or LoRA
    adapters. The projector and LoRA weights are converted to float32.

    Args:
        model: LLaVA model; modified in place. For the `instruct` stage, any weights in `out/pretrain` are loaded.
        stage: `pretrain` or `instruct`.
    """
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    if stage == "pretrain":
        return model
    pretrained = out / "pretrain" / TRAINED_WEIGHTS
    if pretrained.is_file():
        load_trained_weights(model, pretrained)
    if config.lora_r:
        return _add_lora(model, config)
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    return model


def load_trained_weights(model: nn.Module, file: Path) -> None:
    """Copy trained weights into the parameters of a model.

    Raises:
        ValueError: the names or shapes in the file do not match the model's parameters.
    """
    parameters = dict(model.named_parameters())
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(
                f"{file} does not match this model: the name or shape of {name} differs. "
                "Use another --out to start over"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _add_lora(model: Any, config: LlavaConfig) -> Any:
    """Add float32 LoRA adapters to all linear layers of the LLM. All weights of the projector are trained."""
    from peft import LoraConfig, get_peft_model

    linear_layers = [
        re.escape(f"model.language_model.{name}")
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    lora_config = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=f"({'|'.join(linear_layers)})",
        modules_to_save=["multi_modal_projector"],
    )
    torch.manual_seed(config.seed)
    peft_model: Any = get_peft_model(model, lora_config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model

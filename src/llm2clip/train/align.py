"""The `align` stage: train the vision tower, its projection and the adapter against cached caption embeddings.

Each step minimises a contrastive loss between a batch of images and one or more captions per image. The LLM is not
loaded, because its caption embeddings are read from the embedding store. If the tower is frozen (`tower_lr` is 0), its
image features are computed once and cached in a second store, which training then reads instead of the images.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from torch import Tensor, nn

from llm2clip.checkpoint import Checkpoints, MetricsLog, check_finite, hash_texts
from llm2clip.config import AlignConfig
from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.distributed import fsdp_enabled, process_state, set_fsdp_wrap_policy, set_mixed_precision
from llm2clip.models.fingerprint import fingerprint
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.precision import resolve_device_precision
from llm2clip.models.tower_lora import merge_tower_lora
from llm2clip.progress import ProgressBar
from llm2clip.run_config import RESUME_SAFE
from llm2clip.store.image_features import TowerEncoder, store_image_features
from llm2clip.store.lock import folder_lock
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.best_checkpoint import BestCheckpoint, Validate
from llm2clip.train.distributed import empty_copy, full_tensor, gather_to_cpu
from llm2clip.train.grad_cache import cached_backward
from llm2clip.train.losses import info_nce, sigmoid_loss
from llm2clip.train.optim import MAX_GRAD_NORM, cosine_schedule, make_optimizer, set_trainable
from llm2clip.train.sampling import AlignBatches, Batch, CaptionSource, decoding_workers

# In fp16, the gradient scaler skips every step whose gradients are not finite, and then halves its scale factor. After
# this many consecutive skipped steps, the scale factor cannot be the cause, so training stops with an error.
MAX_SKIPPED_STEPS = 20


@onednn_matmul()
def align(
    records: Sequence[Record],
    store: CaptionSource,
    model: LLM2CLIP,
    config: AlignConfig,
    run_dir: Path,
    log: SkipLog,
    validate: Validate | None = None,
    features: Path | None = None,
) -> LLM2CLIP:
    """Train a model on the images and captions of `records`, resuming from the latest checkpoint if one exists.

    Args:
        records: Training data. All captions must be in the store.
        store: Cached caption embeddings.
        model: Model with a pretrained tower and newly initialised heads. The model is modified in place.
        config: Settings for the `align` stage.
        run_dir: Output folder for checkpoints/, metrics.jsonl, evaluations.jsonl and best/.
        log: Log of skipped rows and images, to which images that cannot be decoded are added.
        validate: Function that evaluates the model on held-out images. If None, the model is not evaluated during
            training.
        features: Folder of the feature store, which caches the frozen tower's features. It is only used if `tower_lr`
            is 0. Default: a folder in `run_dir`.

    Returns:
        The trained model in eval mode. With FSDP, this is an unsharded copy; otherwise, it is `model` itself.

    Raises:
        ValueError: There are too few images for one step, or settings contradict each other. Also raised if the
            existing checkpoints were saved with different settings or data.
        TooManySkipped: Too many images cannot be decoded.
        FloatingPointError: The loss or a gradient is not finite.
    """
    if config.load_best_at_end and validate is None:
        raise ValueError("--align.load_best_at_end needs held-out images to evaluate on: set --held_out")
    state = process_state()  # must be called before Accelerator(), which would set up the ranks differently
    run_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(run_dir) if state.is_main_process else nullcontext():
        return _train(records, store, model, config, run_dir, log, validate, features)


def _train(
    records: Sequence[Record],
    store: CaptionSource,
    model: LLM2CLIP,
    config: AlignConfig,
    run_dir: Path,
    log: SkipLog,
    validate: Validate | None,
    features: Path | None,
) -> LLM2CLIP:
    """Run the training loop. Takes the same arguments as `align`."""
    # Trainable parameters, precision and device. `set_trainable` also initialises the LoRA layers.
    set_seed(config.seed)
    set_trainable(model, config)
    set_fsdp_wrap_policy(model.tower.blocks())
    precision = resolve_align_precision(config.precision, process_state().device)
    trackers = _tracker_options(config.report_to, run_dir)
    accelerator = Accelerator(
        mixed_precision=set_mixed_precision(precision),
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(str(run_dir), str(run_dir / "logs")),
    )
    if precision == "fp16" and accelerator.scaler is None:
        raise ValueError(f"--align.precision fp16 needs a GPU: use bf16 or fp32 on this device ({accelerator.device})")
    keep_freed_memory(accelerator.device)

    # Data: batches contain pixels or, if the tower is frozen, the tower's features.
    feature_store = None
    if config.tower_lr == 0:
        feature_store = _compute_features(records, model, config, precision, features, run_dir, log)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    data = AlignBatches(records, store, model, config, world_size, rank, feature_store)
    steps = len(data)

    # Find the checkpoint to resume from and the best weights so far.
    checkpoints = Checkpoints(run_dir / "checkpoints", _run_signature(data, store, config, precision))
    eval_steps = data.steps_per_epoch if config.eval_steps is None else config.eval_steps
    best = BestCheckpoint(run_dir, checkpoints.step, validate if eval_steps else None, accelerator)
    metrics = MetricsLog(run_dir / "metrics.jsonl", checkpoints.step) if accelerator.is_main_process else None
    _start_trackers(accelerator, trackers, config, checkpoints.step)

    # Model and optimizer.
    optimizer = make_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(steps, config.warmup_ratio))
    unsharded = empty_copy(model) if fsdp_enabled() else None
    if config.gradient_checkpointing:
        model.tower.set_grad_checkpointing()
    net, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    load_options: dict[str, Any] = {}
    if unsharded is None:  # do not save frozen weights in checkpoints
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        accelerator.register_save_state_pre_hook(partial(_drop_frozen_weights, frozen))
        load_options["strict"] = False
    set_seed(config.seed, device_specific=True)  # each rank uses different dropout masks
    if checkpoints.latest is not None:
        accelerator.load_state(str(checkpoints.latest), **load_options)

    model.train()
    batches = data.batches(checkpoints.step)
    skipped_steps = 0  # consecutive steps with non-finite gradients
    progress = ProgressBar(total=steps, initial=checkpoints.step, desc="align", unit="step", disable=metrics is None)
    clock = time.perf_counter()
    for step in range(checkpoints.step + 1, steps + 1):
        # Batch.
        batch = next(batches)
        data_seconds = time.perf_counter() - clock
        _log_failures(batch, log, accelerator)

        # Forward and backward.
        local_loss, logit_scale = _batch_loss(net, batch, store, config, accelerator)
        loss = accelerator.reduce(local_loss.detach(), "mean").item()
        _check_finite("loss", loss, step, batch, checkpoints, run_dir)
        accelerator.backward(local_loss)
        grad_norm = float(full_tensor(accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)))
        skipped_steps = 0 if math.isfinite(grad_norm) else skipped_steps + 1
        if accelerator.scaler is None or skipped_steps >= MAX_SKIPPED_STEPS:
            _check_finite("grad_norm", grad_norm, step, batch, checkpoints, run_dir)

        # Optimizer step.
        lr = config.lr * schedule.lr_lambdas[0](step - 1)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        model.clamp_logit_scale()

        # Metrics.
        step_seconds = time.perf_counter() - clock
        line = {
            "loss": loss,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "logit_scale": logit_scale.item(),
            "lr": lr,
            "images_per_second": len(batch.images) * world_size / step_seconds,
            "data_wait": data_seconds / step_seconds,  # fraction of the step spent waiting for the batch
        }
        if metrics is not None:
            metrics.write(step, **line)
        accelerator.log({name: value for name, value in line.items() if value is not None}, step)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        progress.update()

        # Evaluation and checkpoint.
        if best.validate and (step % eval_steps == 0 or step == steps):
            accelerator.log(best.evaluate(model, step), step)
            model.train()
        if step % config.save_steps == 0 or step == steps:
            accelerator.save_state(str(checkpoints.path(step)))
            checkpoints.commit(step)
        clock = time.perf_counter()
    progress.close()
    batches.close()
    for tracker in accelerator.trackers:
        tracker.finish()  # accelerator.end_training() would also destroy the process group

    # Restore the original model structure: remove the wrappers, gradient checkpointing and the LoRA layers.
    accelerator.unwrap_model(net, keep_fp32_wrapper=False)
    if unsharded is not None:
        model = gather_to_cpu(unsharded, model).to(accelerator.device)  # type: ignore[assignment]
    if config.load_best_at_end:
        best.restore(model)
    if config.gradient_checkpointing:
        model.tower.set_grad_checkpointing(False)
    merge_tower_lora(model.tower)
    return model.requires_grad_(True).eval()


def resolve_align_precision(precision: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16. `auto` means bf16 on GPUs that support bf16, otherwise fp32."""
    if precision == "auto" and device.type == "cpu":
        return "fp32"
    return resolve_device_precision(precision, device)


def _compute_features(
    records: Sequence[Record],
    model: LLM2CLIP,
    config: AlignConfig,
    precision: str,
    folder: Path | None,
    run_dir: Path,
    log: SkipLog,
) -> EmbeddingStore:
    """Compute the frozen tower's features for all images not yet in the feature store, and return that store."""
    refs = [record.image for record in records if record.image is not None]
    encoder = TowerEncoder(model.tower, precision)
    identity = encoder.identity()
    folder = folder or run_dir / f"features-{fingerprint(identity)[:8]}"
    return store_image_features(refs, encoder, identity, folder, log, workers=decoding_workers(config))


def _run_signature(data: AlignBatches, store: CaptionSource, config: AlignConfig, precision: str) -> dict[str, Any]:
    """Return the properties of a run that must be equal to those saved in a checkpoint before the run can resume."""
    settings = {**vars(config), "precision": precision}
    return {
        "steps": len(data),
        "images per step": data.images_per_step,
        "images": data.image_hash,
        "captions": data.caption_hash,
        "caption encoder": store.manifest["fingerprint"],
        **{f"--align.{name}": value for name, value in settings.items() if name not in RESUME_SAFE},
    }


def _log_failures(batch: Batch, log: SkipLog, accelerator: Accelerator) -> None:
    """Log images that could not be decoded. Every rank counts the failures of all ranks, so all ranks stop together."""
    failures = list(batch.failures.items())
    if accelerator.num_processes > 1:
        failures = gather_object(failures)
    for name, reason in failures:
        log.skip(name, 0, "undecodable image", reason)
        log.check()


def _batch_loss(
    net: nn.Module, batch: Batch, store: CaptionSource, config: AlignConfig, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch, and the logit scale. With gradient caching, this takes several forward passes."""
    device = accelerator.device
    embeddings = torch.from_numpy(store.take(batch.caption_rows))  # (M, text_dim)
    image_of_text = torch.from_numpy(batch.image_of_caption).to(device)
    text_ids = torch.from_numpy(batch.caption_rows).to(device)
    image_argument = "pixels" if batch.images.dtype == torch.uint8 else "features"

    # Part n of the batch contains images image_bounds[n] to image_bounds[n + 1] - 1, and all of their captions.
    size = config.micro_batch_size or len(batch.images)
    image_bounds = [*range(0, len(batch.images), size), len(batch.images)]
    text_bounds = np.searchsorted(batch.image_of_caption, image_bounds).tolist()

    def forward(part: int) -> tuple[Tensor, ...]:
        images = batch.images[image_bounds[part] : image_bounds[part + 1]].to(device)
        texts = embeddings[text_bounds[part] : text_bounds[part + 1]].to(device)
        with accelerator.autocast():
            image, text, scale, bias = net(**{image_argument: images, "embeddings": texts})
        return image, text, scale[None], bias[None]

    logit_scale = torch.zeros(())

    def loss_function(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        nonlocal logit_scale
        logit_scale = scale.detach().mean()  # all parts return the same scale
        if config.loss == "sigmoid":
            return sigmoid_loss(image, text, scale.mean(), bias.mean(), image_of_text, text_ids)
        assert config.loss == "infonce"
        return info_nce(image, text, scale.mean(), image_of_text, text_ids)

    parts = range(len(image_bounds) - 1)
    if len(parts) == 1:
        loss = loss_function(*forward(0))
    else:
        loss = cached_backward([partial(forward, part) for part in parts], loss_function, net, device)
    return loss, logit_scale


def _check_finite(name: str, value: float, step: int, batch: Batch, checkpoints: Checkpoints, run_dir: Path) -> None:
    """Raise FloatingPointError if `value` is not finite. The step's images are then listed in a file."""
    if math.isfinite(value):
        return
    file = run_dir / f"not-finite-{step}-{process_state().process_index}.json"
    file.write_text(json.dumps({"step": step, "images": batch.image_names}, indent=1))
    advice = f"The images of this step are listed in {file}. Lower --align.lr or --align.tower_lr, or use fp32"
    check_finite(name, value, step, checkpoints, advice)


def _drop_frozen_weights(
    frozen: set[str], models: list[nn.Module], states: list[dict[str, Tensor]], _folder: str
) -> None:
    """Remove the frozen weights from the state dicts before a checkpoint is saved."""
    for state in states:
        for name in list(state):
            if name.removeprefix("module.") in frozen:  # DDP adds the prefix "module."
                del state[name]


def _tracker_options(names: list[str], run_dir: Path) -> dict[str, Any]:
    """Return Accelerate's options for each tracker, keyed by tracker name. A resumed run continues its tracker run.

    Raises:
        ValueError: A tracker name is unknown.
        ModuleNotFoundError: The package for a tracker is not installed.
    """
    run_id = hash_texts([str(run_dir.resolve())])
    options: dict[str, Any] = {
        "tensorboard": {},
        "wandb": {"id": run_id, "resume": "allow"},
        "trackio": {"name": f"{run_dir.parent.name}-{run_id}", "resume": "allow"},
    }
    for name in names:
        if name not in options:
            raise ValueError(f"--align.report_to must be one of {', '.join(options)} (got {name!r})")
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"--align.report_to {name} needs the package {name}: pip install {name}")
    return {name: options[name] for name in names}


def _start_trackers(accelerator: Accelerator, options: dict[str, Any], config: AlignConfig, resume_step: int) -> None:
    if not options:
        return
    if "tensorboard" in options and resume_step:
        options["tensorboard"]["purge_step"] = resume_step + 1  # training will repeat the steps from here on
    settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(config).items()}
    accelerator.init_trackers("llm2clip", settings, options)

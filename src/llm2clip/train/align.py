"""The `align` stage, which trains the vision tower, its projection and the adapter on cached caption embeddings.

Each step minimises a contrastive loss between a batch of images and one or more captions per image. The LLM is not
loaded: its caption embeddings are read from the embedding store. If the tower is frozen (`tower_lr` is 0), its image
features are computed once, cached in a second store and read from there during training.

With self-distillation (`distill_weight`), an additional loss keeps the tower's features close to those of the
pretrained tower (see `proclip.py`).
"""

import copy
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor, nn

from llm2clip.config import RESUME_SAFE, AlignConfig
from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.models.hub.fingerprint import fingerprint
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.precision import Precision, resolve_precision, tf32_matmul
from llm2clip.models.vision.vision_tower import VisionTower, merge_tower_lora
from llm2clip.prefetch import prefetch
from llm2clip.progress import ProgressBar
from llm2clip.runs.checkpoint import Checkpoints, MetricsLog
from llm2clip.runs.fsdp import (
    copy_to_meta_device,
    enable_fp32_gradient_reduction,
    full_tensor,
    gather_to_cpu,
    is_fsdp_enabled,
    set_fsdp_wrap_policy,
    set_mixed_precision,
)
from llm2clip.runs.ranks import print_once, process_state
from llm2clip.runs.training_state import load_training_state, save_training_state
from llm2clip.store.caption_rows import CaptionSource
from llm2clip.store.image_features import TowerEncoder, store_image_features
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.grad_cache import compute_cached_loss
from llm2clip.train.losses import get_loss, matryoshka_loss
from llm2clip.train.monitoring import BestCheckpoint, Step, StepReport, Validator, make_tracker_options, start_trackers
from llm2clip.train.optim import (
    MAX_GRAD_NORM,
    compile_blocks,
    make_cosine_schedule,
    make_optimizer,
    restore_blocks,
    select_trainable_weights,
    should_compile,
)
from llm2clip.train.proclip import distillation_loss
from llm2clip.train.sampling import AlignBatches, Batch, resolve_decoding_workers


@onednn_matmul()
def align(
    records: RecordTable,
    store: CaptionSource,
    model: LLM2CLIP,
    config: AlignConfig,
    run_dir: Path,
    log: SkipLog,
    validate: Validator | None = None,
    features: Path | None = None,
) -> LLM2CLIP:
    """Train a model on the images and captions of `records`, resuming from the latest checkpoint if one exists.

    Args:
        records: Training data. All captions must be in the store, except for captions that the tokenizer could not
            encode. Phrases that are not in the store are not used.
        store: Cached caption embeddings.
        model: Model with a pretrained tower and newly initialised heads. The model is modified in place.
        run_dir: Output folder for checkpoints/, metrics.jsonl, evaluations.jsonl and best/. No other process may write
            to this folder (see `run_lock`).
        log: Log of images that cannot be decoded.
        validate: Function that evaluates the model on held-out images. If None, the model is not evaluated during
            training.
        features: Folder of the feature store, which caches the pretrained tower's features. The store is used only if
            `tower_lr` is 0, or for self-distillation without random crops. Default: a folder in `run_dir`.

    Returns:
        The trained model in eval mode. With FSDP, the returned model is an unsharded copy of `model`; otherwise, it is
        `model` itself. `training_images` is set on the main process only.

    Raises:
        ValueError: There are too few images, settings contradict each other, or the existing checkpoints were saved
            with different settings or data.
        TooManySkipped: Too many images cannot be decoded.
        FloatingPointError: The loss or a gradient is not finite.
    """
    if config.load_best_at_end and validate is None:
        raise ValueError("--align.load_best_at_end requires held-out images to evaluate on: set --held_out")
    state = process_state()  # must precede Accelerator(), which would set up the ranks differently

    # Pretrained tower for self-distillation.
    frozen_tower = copy.deepcopy(model.tower).requires_grad_(False).eval() if config.distill_weight else None

    # Trainable parameters, precision and device. `select_trainable_weights` also initialises the LoRA layers.
    set_seed(config.seed)
    select_trainable_weights(model, config)
    set_fsdp_wrap_policy(model.tower.get_blocks())
    precision = resolve_precision("align", config.precision, state.device)
    trackers = make_tracker_options(config.report_to, run_dir)
    accelerator = Accelerator(
        mixed_precision=set_mixed_precision(precision),
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(str(run_dir), str(run_dir / "logs")),
    )
    if precision == "fp16" and accelerator.scaler is None:
        raise ValueError(f"--align.precision fp16 requires a GPU: use bf16 or fp32 on {accelerator.device}")
    enable_fp32_gradient_reduction(accelerator)
    keep_freed_memory(accelerator.device)

    # Data. Batches contain pixels or, if the tower is frozen, its features. With self-distillation and no random crops,
    # they contain both.
    feature_store = None
    if config.caches_features:
        tower = frozen_tower or model.tower  # has no LoRA layers
        feature_store = _compute_features(records, tower, config, precision, features, run_dir, log)
        frozen_tower = None
    rank, world_size = accelerator.process_index, accelerator.num_processes
    checkpoints = Checkpoints(run_dir / "checkpoints", config.batch_size)
    images_per_step = checkpoints.get_saved_items_per_step("images per step")
    image_order = checkpoints.get_saved_property("image order")
    data = AlignBatches(records, store, model, config, world_size, rank, feature_store, images_per_step, image_order)
    steps = len(data)
    if images_per_step is None and data.images_per_step < config.batch_size * world_size:
        print_once(
            f"{data.image_count:,} images: using {data.images_per_step:,} images per step instead of "
            f"{config.batch_size * world_size:,}, in {steps:,} steps. To train longer, raise --align.epochs"
        )

    # Check that the run can resume from its latest checkpoint, and find the best weights so far.
    checkpoints.check_signature(_make_run_signature(data, store, config, precision))
    eval_steps = data.steps_per_epoch if config.eval_steps is None else config.eval_steps
    best = BestCheckpoint(run_dir, checkpoints.step, validate if eval_steps else None, accelerator)
    metrics = MetricsLog(run_dir / "metrics.jsonl", checkpoints.step) if accelerator.is_main_process else None
    start_trackers(accelerator, trackers, config, checkpoints.step)

    # Model and optimizer.
    optimizer = make_optimizer(model, config, accelerator.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, make_cosine_schedule(steps, config.warmup_ratio))
    unsharded = copy_to_meta_device(model) if is_fsdp_enabled() else None
    if config.gradient_checkpointing:
        model.tower.set_grad_checkpointing()
    net, optimizer = accelerator.prepare(model, optimizer)
    if checkpoints.latest is not None:
        load_training_state(checkpoints.latest, model, optimizer, schedule, accelerator.scaler)
    if should_compile(model.tower, accelerator.device, steps - checkpoints.step):
        compile_blocks(model.tower)

    model.train()
    progress = ProgressBar(total=steps, initial=checkpoints.step, desc="align", unit="step", disable=metrics is None)
    report = StepReport(accelerator, log, metrics, checkpoints, run_dir, progress)
    prepared = prefetch(_pin_batches(data, checkpoints.step, accelerator.device), accelerator.device)
    with closing(prepared) as batches:
        clock = time.perf_counter()
        for step in range(checkpoints.step + 1, steps + 1):
            # Batch.
            data_start = time.perf_counter()
            batch = next(batches)
            data_seconds = time.perf_counter() - data_start

            # Forward and backward.
            _seed_dropout(config.seed, step, rank)
            batch = batch.to(accelerator.device)
            if frozen_tower is not None:
                batch = _add_frozen_features(batch, frozen_tower, config, accelerator)
            local_loss, logit_scale = _compute_loss(net, batch, config, accelerator)
            loss = accelerator.reduce(local_loss.detach(), "mean")
            with tf32_matmul():
                accelerator.backward(local_loss)
            grad_norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))

            # Optimizer step.
            lr = config.lr * schedule.lr_lambdas[0](step - 1)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            model.clamp_logit_scale()

            # Metrics. On a GPU, `report.add` waits for the previous step, so the time between two steps is measured.
            now = time.perf_counter()
            step_seconds, clock = now - clock, now
            step_metrics = {
                "lr": lr,
                "images_per_second": len(batch.images) * world_size / step_seconds,
                "data_wait": data_seconds / step_seconds,  # fraction of the step spent waiting for the batch
            }
            report.add(Step(step, batch.image_names, batch.failures, step_metrics), loss, grad_norm, logit_scale)
            progress.update()

            # Evaluation and checkpoint.
            is_last = step == steps
            evaluates = best.validate is not None and (step % eval_steps == 0 or is_last)
            saves = step % config.save_steps == 0 or is_last
            if evaluates or saves:
                report.flush()  # raises an error if a loss or gradient was not finite
            if evaluates:
                accelerator.log(best.evaluate(model, step), step)
                model.train()
            if saves:
                save_training_state(checkpoints.path(step), model, optimizer, schedule, accelerator.scaler)
                checkpoints.commit(step)
            if evaluates or saves:
                clock = time.perf_counter()
    progress.close()
    for tracker in accelerator.trackers:
        tracker.finish()  # accelerator.end_training() would also destroy the process group

    # Restore the original model structure: remove the wrappers, compilation, gradient checkpointing and LoRA layers.
    accelerator.unwrap_model(net, keep_fp32_wrapper=False)
    restore_blocks(model.tower)
    if unsharded is not None:
        model = gather_to_cpu(unsharded, model).to(accelerator.device)  # type: ignore[assignment]
    if config.load_best_at_end:
        best.restore(model)
    if config.gradient_checkpointing:
        model.tower.set_grad_checkpointing(False)
    merge_tower_lora(model.tower)
    if state.is_main_process:
        model.training_images = records.hash_images()
    return model.requires_grad_(True).eval()


def _compute_features(
    records: RecordTable,
    tower: VisionTower,
    config: AlignConfig,
    precision: Precision,
    folder: Path | None,
    run_dir: Path,
    log: SkipLog,
) -> EmbeddingStore:
    """Compute the frozen tower's features for all images that are not yet in the feature store. Return the store."""
    refs: Any = records.select(records.has_image).get_images()
    encoder = TowerEncoder(tower, precision)
    identity = encoder.identity()
    folder = folder or run_dir / f"features-{fingerprint(identity)[:8]}"
    return store_image_features(refs, encoder, identity, folder, log, workers=resolve_decoding_workers(config))


def _make_run_signature(
    data: AlignBatches, store: CaptionSource, config: AlignConfig, precision: str
) -> dict[str, Any]:
    """Return the run properties that must match the latest checkpoint when the run is resumed."""
    settings = {**vars(config), "precision": precision}
    return {
        "steps": len(data),
        "images per step": data.images_per_step,
        "image order": data.orders.image_order,
        "images": data.image_hash,
        "captions": data.caption_hash,
        "caption encoder": store.manifest["fingerprint"],
        **{f"--align.{name}": value for name, value in settings.items() if name not in (*RESUME_SAFE, "batch_size")},
    }


def _pin_batches(data: AlignBatches, first_step: int, device: torch.device) -> Generator[Batch]:
    """Yield the batches, in pinned memory if the device is a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # in this thread; otherwise, pinning would also use memory on the first GPU
    with closing(data.batches(first_step)) as batches:
        for batch in batches:
            yield batch.pin_memory() if device.type == "cuda" else batch


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed the dropout of a step, so that a run resumed on the same number of ranks draws the same dropout masks."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


@torch.no_grad()
def _add_frozen_features(
    batch: Batch, frozen_tower: VisionTower, config: AlignConfig, accelerator: Accelerator
) -> Batch:
    """Return a copy of a batch to which the pretrained tower's features have been added."""
    with accelerator.autocast(), tf32_matmul():
        parts = batch.images.split(config.micro_batch_size or config.batch_size)
        return replace(batch, frozen_features=torch.cat([frozen_tower(pixels).float() for pixels in parts]))


def _compute_loss(net: nn.Module, batch: Batch, config: AlignConfig, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch and the logit scale. With gradient caching, this takes several forward passes."""
    images, embeddings = batch.images, batch.embeddings
    image_argument = "pixels" if images.dtype == torch.uint8 else "features"

    # Part n of the batch contains images bounds[n] to bounds[n + 1] - 1 and all of their texts. In a run resumed on
    # fewer ranks, batches larger than `batch_size` are also split, so that the memory per rank does not grow.
    size = config.micro_batch_size or config.batch_size
    bounds = [*range(0, len(images), size), len(images)]

    def forward(start: int, stop: int) -> tuple[Tensor, ...]:
        texts = embeddings[batch.first_caption[start] : batch.first_caption[stop]]
        with accelerator.autocast(), tf32_matmul():
            image, text, scale, bias, *features = net(
                **{image_argument: images[start:stop], "embeddings": texts},
                return_features=batch.frozen_features is not None,
            )
        return image, text, scale[None], bias[None], *features

    contrastive_loss = get_loss(config.loss)
    layout = batch.image_of_caption, None if batch.all_distinct else batch.caption_rows, batch.phrases
    logit_scale = torch.zeros(())

    def loss_function(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, features: Tensor | None = None
    ) -> Tensor:
        nonlocal logit_scale
        logit_scale = scale.detach().mean()  # all parts return the same scale
        loss = matryoshka_loss(
            contrastive_loss, config.matryoshka_dims, image, text, scale.mean(), bias.mean(), *layout
        )
        if features is not None and batch.frozen_features is not None:
            loss = loss + config.distill_weight * distillation_loss(features, batch.frozen_features)
        return loss

    parts = [partial(forward, start, stop) for start, stop in pairwise(bounds)]
    if len(parts) == 1:
        loss = loss_function(*parts[0]())
    else:
        loss = compute_cached_loss(parts, loss_function, net, accelerator.device)
    return loss, logit_scale

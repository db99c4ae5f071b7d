"""The `align` stage: training of the vision tower, its projection and the adapter on cached caption embeddings.

Each step minimises a contrastive loss between a batch of images and one or more captions per image. The LLM is not
loaded, because its caption embeddings are read from the embedding store. The image features of a frozen tower
(`tower_lr` is 0) are also computed only once and cached in a second store.
"""

import copy
from collections.abc import Generator
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from llm2clip.config import AlignConfig
from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.io_utils import format_count
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import fingerprint
from llm2clip.models.precision import use_tf32_matmul
from llm2clip.models.vision.vision_tower import VisionTower, merge_tower_lora
from llm2clip.parallel import prefetch_on_accelerator
from llm2clip.runs.ranks import (
    copy_to_meta_device,
    gather_to_cpu,
    is_fsdp_enabled,
    print_once,
    process_state,
    set_fsdp_wrap_policy,
)
from llm2clip.store.encode import TowerEncoder, store_image_features
from llm2clip.store.store import CaptionSource
from llm2clip.train.loop import StepResult, TrainingLoop, Validator
from llm2clip.train.losses import distillation_loss, get_loss, matryoshka_loss
from llm2clip.train.optim import (
    compile_blocks,
    compute_cached_loss,
    make_optimizer,
    select_trainable_weights,
    should_compile,
    uncompile_blocks,
)
from llm2clip.train.sampling import AlignBatches, Batch, resolve_decoding_workers


@use_onednn_matmul()
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
        records: Training data. Phrases that are not in the store are ignored.
        model: Model with a pretrained tower and newly initialised heads, modified in place.
        run_dir: Output folder for checkpoints/, metrics.jsonl and evaluations.jsonl. The caller must hold the run lock.
        log: Log of undecodable images.
        validate: Function that evaluates the model on held-out images. Default: no evaluation.
        features: Folder of the feature store, used if the tower is frozen. Default: a folder in `run_dir`.

    Returns:
        The trained model in eval mode: `model` itself or, with FSDP, an unsharded copy. Its attribute
            `training_images` is set only on the main process.

    Raises:
        ValueError: There are too few images, settings contradict each other, or the existing checkpoints were saved
            with different settings or data.
        FloatingPointError: The loss or a gradient is not finite.
    """
    pretrained_tower = copy.deepcopy(model.tower).requires_grad_(False).eval() if config.distill_weight else None
    process_state()  # selects this rank's device, so that set_seed seeds it
    set_seed(config.seed)
    select_trainable_weights(model, config)  # also initialises the LoRA layers
    set_fsdp_wrap_policy(model.tower.get_blocks())
    loop = TrainingLoop("align", "images", config, run_dir, config.report_to)
    data = _make_batches(records, store, model, loop, features, log)

    optimizer = make_optimizer(model, config, loop.device)
    unsharded = copy_to_meta_device(model) if is_fsdp_enabled() else None
    eval_steps = data.steps_per_epoch if config.eval_steps is None else config.eval_steps
    loop.start(model, optimizer, config.lr, validate, eval_steps)
    if should_compile(model.tower, loop.device, loop.steps - loop.checkpoints.step):
        compile_blocks(model.tower)
    model.train()
    prepared = prefetch_on_accelerator(_pin_batches(data, loop.checkpoints.step, loop.device), loop.device)
    with closing(prepared) as batches:
        loop.run(batches, partial(_compute_gradients, loop, pretrained_tower), log, model.clamp_logit_scale)

    # Restore the original model structure: remove compilation, sharding and LoRA layers.
    uncompile_blocks(model.tower)
    if unsharded is not None:
        model = gather_to_cpu(unsharded, model).to(loop.device)  # type: ignore[assignment]
    merge_tower_lora(model.tower)
    if loop.accelerator.is_main_process:
        model.training_images = records.get_distinct_image_hashes()
    return model.requires_grad_(True).eval()


def _make_batches(
    records: RecordTable,
    store: CaptionSource,
    model: LLM2CLIP,
    loop: TrainingLoop,
    features: Path | None,
    log: SkipLog,
) -> AlignBatches:
    """Return the batches of a run. Raise ValueError if a resumed run has different data or settings.

    If the tower is frozen, its image features are computed first, and batches contain features instead of pixels.
    """
    config: Any = loop.config
    feature_store = None
    if config.tower_lr == 0:
        refs: Any = records.select(records.has_image).get_images()
        encoder = TowerEncoder(model.tower, loop.precision)
        identity = encoder.identity()
        folder = features or loop.run_dir / f"features-{fingerprint(identity)[:8]}"
        workers = resolve_decoding_workers(config)
        feature_store = store_image_features(refs, encoder, identity, folder, log, workers=workers)
    rank, world_size = loop.accelerator.process_index, loop.accelerator.num_processes
    data = AlignBatches(
        records,
        store,
        model.tower.preprocess,
        config,
        ranks=(rank, world_size),
        features=feature_store,
        images_per_step=loop.items_per_step,
        image_order=loop.checkpoints.get_saved_property("image order"),
    )
    if loop.items_per_step is None and data.images_per_step < config.batch_size * world_size:
        print_once(
            f"Using {data.images_per_step:,} images per step instead of {config.batch_size * world_size:,}, because "
            f"the data has only {format_count(data.image_count, 'image')}. The run has "
            f"{format_count(len(data), 'step')}. To train longer, raise --align.epochs"
        )
    properties = {
        "image order": data.orders.image_order,
        "images": data.image_hash,
        "captions": data.caption_hash,
        "caption encoder": store.manifest["fingerprint"],
    }
    loop.check_signature(len(data), data.images_per_step, properties)
    return data


def _pin_batches(data: AlignBatches, first_step: int, device: torch.device) -> Generator[Batch]:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # by default, pinning in a new thread allocates memory on GPU 0
    with closing(data.iterate_batches(first_step)) as batches:
        for batch in batches:
            yield batch.pin_memory() if device.type == "cuda" else batch


def _compute_gradients(loop: TrainingLoop, pretrained_tower: VisionTower | None, step: int, batch: Batch) -> StepResult:
    config: Any = loop.config
    # A run resumed on the same number of ranks must use the same dropout masks as an uninterrupted run.
    seed = np.random.SeedSequence([config.seed, step, loop.accelerator.process_index])
    torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
    batch = batch.to(loop.device)
    pretrained_features = None
    if pretrained_tower is not None:
        with torch.no_grad(), loop.accelerator.autocast(), use_tf32_matmul():
            parts = batch.images.split(config.micro_batch_size or config.batch_size)
            pretrained_features = torch.cat([pretrained_tower(part).float() for part in parts])  # (N, feature_dim)
    loss, logit_scale = _compute_loss(loop.net, batch, pretrained_features, config, loop.accelerator)
    with use_tf32_matmul():
        loop.accelerator.backward(loss)
    metrics = {"logit_scale": logit_scale}
    return StepResult(loss.detach(), len(batch.images), metrics, batch.image_refs, batch.failures)


def _compute_loss(
    net: nn.Module,
    batch: Batch,
    pretrained_features: Tensor | None,
    config: AlignConfig,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch and the logit scale, using gradient caching if the batch takes several forward passes.

    `pretrained_features` are the pretrained tower's features for self-distillation, of shape (N, feature_dim).
    """
    images, embeddings = batch.images, batch.embeddings
    image_argument = "pixels" if images.dtype == torch.uint8 else "features"

    # Part n of the batch contains images bounds[n] to bounds[n + 1] - 1 and all of their texts.
    # If a run is resumed on fewer ranks, batches with more than `batch_size` images per rank are also split.
    size = config.micro_batch_size or config.batch_size
    bounds = [*range(0, len(images), size), len(images)]

    def forward(start: int, stop: int) -> tuple[Tensor, ...]:
        texts = embeddings[batch.first_caption[start] : batch.first_caption[stop]]
        with accelerator.autocast(), use_tf32_matmul():
            image, text, scale, bias, *features = net(
                **{image_argument: images[start:stop], "embeddings": texts},
                return_features=pretrained_features is not None,
            )
        return image, text, scale[None], bias[None], *features

    contrastive_loss = get_loss(config.loss)
    # image_of_text, text_ids and other_texts of the losses
    text_arguments = batch.image_of_caption, None if batch.all_distinct else batch.caption_rows, batch.phrases
    logit_scale = torch.zeros(())

    def loss_function(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, features: Tensor | None = None
    ) -> Tensor:
        nonlocal logit_scale
        logit_scale = scale.detach().mean()  # all parts of the batch return the same scale
        loss = matryoshka_loss(
            contrastive_loss, config.matryoshka_dims, image, text, scale.mean(), bias.mean(), *text_arguments
        )
        if features is not None and pretrained_features is not None:
            loss = loss + config.distill_weight * distillation_loss(features, pretrained_features)
        return loss

    parts = [partial(forward, start, stop) for start, stop in pairwise(bounds)]
    if len(parts) == 1:
        loss = loss_function(*parts[0]())
    else:
        loss = compute_cached_loss(parts, loss_function, net, accelerator.device)
    return loss, logit_scale

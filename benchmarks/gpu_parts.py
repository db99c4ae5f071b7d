"""Measurements for `gpu.py`. Each function yields one row, a dict, per measurement.

Models have random weights. FLOPs are counted with PyTorch's FlopCounterMode on one forward and backward pass. A second
forward pass, as in gradient caching, is not counted, so it lowers the MFU (model FLOPs utilisation, relative to the
peak FLOP/s in the GPU's data sheet).
"""

import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import register_model
from timm.models.vision_transformer import LayerNorm, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from data import PREPROCESS, write_store
from llm2clip.config import AlignConfig, EncoderConfig, FitConfig, TuneConfig
from llm2clip.data.image_refs import FileImage
from llm2clip.data.pairs import Pair
from llm2clip.data.records import Record
from llm2clip.data.table import RecordTable
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import get_default_batch_tokens
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.search.sqlite_backend import CHUNK, MIN_CANDIDATES, QuantizedVectors
from llm2clip.tools.plan import plan_fit
from llm2clip.tools.plan_costs import LLMS, count_flops
from llm2clip.tools.plan_memory import DEVICES, Machine
from llm2clip.train.losses import info_nce
from llm2clip.train.optim import MAX_GRAD_NORM, compile_blocks, compute_cached_loss, make_optimizer
from llm2clip.train.sampling import AlignBatches
from llm2clip.train.tune import PairCollator, PairLoss
from search import K
from shared import read_rows
from vectors import add_noise, vector_chunks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_GPU = DEVICE.type == "cuda"
TINY_LLM = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 8, "vocab_size": 260}
TINY_LLM |= {"num_attention_heads": 6, "num_key_value_heads": 2}
LLM_SIZES = {
    "135M": LLMS["smollm2-135m"],
    "1B": LLMS["meta-llama/llama-3.2-1b"],
    "8B": LLMS["meta-llama/meta-llama-3-8b"],
}
TOWERS = {  # name -> (timm model, open_clip model, images per step)
    "ViT-B/16": ("vit_base_patch16_clip_quickgelu_224", "ViT-B-16", 512),
    "ViT-L/14": ("vit_large_patch14_clip_quickgelu_224", "ViT-L-14", 256),
    "ViT-L/14-336": ("vit_large_patch14_clip_quickgelu_336", "ViT-L-14-336", 128),
}
TINY_TOWER = {"tiny": ("vit_tiny_clip_quickgelu_32", "tiny", 4)}
TINY_OPEN_CLIP = {  # open_clip config with the tower in TINY_TOWER and 64 dimensions per attention head
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}
WORDS = "a the dog cat two red blue on in snow street runs sits with small large man woman tree house"
TEXT_DIM = 2048


@dataclass
class PartSettings:
    tiny: bool
    out: Path


def measure_environment(settings: PartSettings) -> Iterator[dict[str, Any]]:
    import transformers

    row = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    row |= {"device": "CPU", "CUDA": torch.version.cuda or "none"}
    if IS_GPU:
        properties = torch.cuda.get_device_properties(DEVICE)
        row |= {"device": properties.name, "memory, GB": properties.total_memory / 1e9}
    size = 256 if settings.tiny else 8192
    a = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    seconds = time_call(lambda: a @ a)
    yield row | {"bf16 matmul, TFLOP/s": 2 * size**3 / seconds / 1e12}


def measure_encode(settings: PartSettings) -> Iterator[dict[str, Any]]:
    """Encode captions with llm2clip, packed and padded, and with sentence-transformers, in bf16.

    The first captions are also encoded in float32 without packing, to measure the cosine similarity to bf16.
    """
    captions = random_captions(64 if settings.tiny else 16_384)
    sample = captions[:64]
    for name, shape in llm_sizes(settings).items():
        folder = save_llm(settings.out / f"llm-{name}", shape)
        encoder = CaptionEncoder.from_pretrained(folder, device=str(DEVICE))
        tokens = sum(len(ids) for ids in encoder.tokenize(captions).ids)
        flops = 2 * count_layer_parameters(encoder) * tokens
        default_attention = encoder.attention
        encoder.llm.set_attn_implementation("sdpa")
        reference = encoder.encode(sample, precision="fp32")
        for attention in dict.fromkeys([default_attention, "sdpa"]):
            encoder.llm.set_attn_implementation(attention)
            similarity = F.cosine_similarity(encoder.encode(sample, precision="bf16"), reference).min()
            reset_memory()
            seconds = time_call(partial(encoder.encode, captions, precision="bf16"), repeats=2)
            row = rate_row(f"{name}, llm2clip, {attention}", tokens, seconds, flops)
            yield row | {"1 - cosine to fp32, max": 1 - float(similarity)}
        del encoder
        reset_memory()
        from sentence_transformers import SentenceTransformer

        st = SentenceTransformer(str(folder), device=str(DEVICE), model_kwargs={"dtype": torch.bfloat16})
        seconds = time_call(partial(st.encode, captions, batch_size=128), repeats=2)
        yield rate_row(f"{name}, SentenceTransformer.encode, bf16 weights", tokens, seconds, flops)
        del st


def measure_align(settings: PartSettings) -> Iterator[dict[str, Any]]:
    """Time a training step of `align` on images in GPU memory, and open_clip's step with the same architecture.

    The gradients of each variant are compared with the gradients in eager mode, and the tower's features with the
    features of open_clip's tower with the same weights.
    """
    for name, (timm_name, open_clip_name, batch) in align_towers(settings).items():
        eager_gradient: Tensor | None = None
        for variant in ("eager", "compiled", "gradient caching"):
            reset_memory()
            torch.manual_seed(0)
            tower = VisionTower.from_pretrained(f"timm:{timm_name}", pretrained=False).to(DEVICE)
            step = align_step(tower, batch, variant)
            gradient = gradient_or_none(step)
            eager_gradient = gradient if variant == "eager" else eager_gradient
            row = step_row(f"{name}, llm2clip, {variant}", step.run, batch, "images", step.flops)
            if gradient is not None and eager_gradient is not None:
                difference = float((gradient - eager_gradient).norm() / eager_gradient.norm())
                row |= {"relative difference": difference, "compared": "gradients, to eager mode"}
            yield row
            flops = step.flops
            del step, tower
        if not find_spec("open_clip"):
            yield {"method": f"{name}, open_clip: skipped, because open_clip is not installed"}
            continue
        reset_memory()
        difference = measure_open_clip_difference(timm_name, open_clip_name)
        for both_towers in (False, True):
            reset_memory()
            open_clip_run = open_clip_step(open_clip_name, batch, both_towers)
            towers_name = "both towers" if both_towers else "image tower only"
            row = step_row(f"{name}, open_clip, {towers_name}", open_clip_run, batch, "images", flops)
            yield row | {"relative difference": difference, "compared": "features in fp32, to llm2clip's"}
            del open_clip_run


def align_towers(settings: PartSettings) -> dict[str, tuple[str, str, int]]:
    """Return (timm model, open_clip model, images per step) for each tower, keyed by the tower's name."""
    if not settings.tiny:
        return TOWERS
    if find_spec("open_clip"):
        import open_clip

        file = settings.out / "tiny.json"
        file.write_text(json.dumps(TINY_OPEN_CLIP))
        open_clip.add_model_config(file)
    return TINY_TOWER


@register_model
def vit_tiny_clip_quickgelu_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Build a tiny vision transformer with the same architecture as CLIP's image tower."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
    options = {name: options[name] for name in options.keys() & {"img_size", "num_classes"}}
    style = {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5), "act_layer": "quick_gelu"}
    tower = VisionTransformer(**(shape | style | options))
    tower.pretrained_cfg = {"input_size": (3, 32, 32)}  # preprocessing uses this image size
    return tower


@dataclass
class AlignStep:
    """A training step in bf16, and its model FLOPs."""

    run: Callable[[], None]
    gradient: Callable[[], Tensor]  # returns the gradients of all N parameters, of shape (N,), float32, on the CPU
    flops: float


def align_step(
    tower: VisionTower, batch: int, variant: str, loss_function: Callable[..., Tensor] | None = None
) -> AlignStep:
    """Return a training step on random images and caption embeddings. The default loss is InfoNCE."""
    with DEVICE:
        model = LLM2CLIP(LLM2CLIPConfig(tower.config, text_dim=TEXT_DIM, embed_dim=512), tower).train()
    optimizer = make_optimizer(model, AlignConfig(), DEVICE)
    size = tower.preprocess.size
    pixels = torch.randint(0, 255, (batch, 3, size, size), dtype=torch.uint8, device=DEVICE)
    embeddings = torch.randn(batch, TEXT_DIM, device=DEVICE)
    index = torch.arange(batch, device=DEVICE)

    def forward(rows: slice) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            image, text, scale, _ = model(pixels=pixels[rows], embeddings=embeddings[rows])
        return image, text, scale[None]

    def infonce_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return info_nce(image, text, scale.mean(), index, index)

    loss_function = loss_function or infonce_loss

    def backward() -> None:
        if variant == "gradient caching":
            parts = [slice(start, start + batch // 4) for start in range(0, batch, batch // 4)]
            loss = compute_cached_loss([partial(forward, part) for part in parts], loss_function, model, DEVICE)
        else:
            loss = loss_function(*forward(slice(None)))
        loss.backward()

    def gradient() -> Tensor:
        backward()
        gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
        return torch.cat(gradients)

    def step() -> None:
        backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    with torch.autocast(DEVICE.type, torch.bfloat16):
        one_image = count_flops(lambda: model(pixels=pixels[:1])[0].sum().backward())
    model.zero_grad()
    if variant == "compiled":
        compile_blocks(tower)
        torch._dynamo.config.suppress_errors = False  # otherwise, PyTorch would run eager mode if compilation fails
    return AlignStep(step, gradient, batch * one_image)


def gradient_or_none(step: AlignStep) -> Tensor | None:
    """Return the gradients of a step, or None if the GPU runs out of memory."""
    try:
        return step.gradient()
    except torch.cuda.OutOfMemoryError:
        return None


def measure_open_clip_difference(timm_name: str, open_clip_name: str) -> float:
    """Return the relative difference between the features of open_clip's and llm2clip's tower with the same weights."""
    import open_clip

    model = open_clip.create_model(open_clip_name, device=DEVICE, force_quick_gelu=True).eval()
    tower = VisionTower.from_pretrained(f"timm:{timm_name}", pretrained=False).to(DEVICE)
    weights = {name: w for name, w in model.state_dict().items() if name.startswith("visual.")}
    weights = checkpoint_filter_fn(weights, tower.backbone)
    tower.backbone.load_state_dict({name: w for name, w in weights.items() if not name.startswith("head.")})
    pixels = torch.rand(4, 3, tower.preprocess.size, tower.preprocess.size, device=DEVICE)
    mean, std = (torch.tensor(x, device=DEVICE)[:, None, None] for x in (tower.preprocess.mean, tower.preprocess.std))
    with torch.no_grad():
        expected = model.encode_image((pixels - mean) / std)
        actual = tower(pixels) @ model.visual.proj
    return float((actual - expected).norm() / expected.norm())


def open_clip_step(name: str, batch: int, both_towers: bool) -> Callable[[], None]:
    """Return a function that runs open_clip's training step with both towers or with fixed text features."""
    import open_clip
    from open_clip.loss import ClipLoss

    model = open_clip.create_model(name, device=DEVICE, force_quick_gelu=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    images = torch.randn(batch, 3, side, side, device=DEVICE)
    tokens = torch.randint(1, 49_000, (batch, 77), device=DEVICE)
    text_features = nn.functional.normalize(torch.randn(batch, model.visual.output_dim, device=DEVICE), dim=-1)
    loss_function = ClipLoss()

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            image = model.encode_image(images, normalize=True)
            text = model.encode_text(tokens, normalize=True) if both_towers else text_features
            loss = loss_function(image, text.to(image.dtype), model.logit_scale.exp())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_tune(settings: PartSettings) -> Iterator[dict[str, Any]]:
    """Time the forward and backward pass of a `tune` step, and of sentence-transformers' loss with gradient caching."""
    pairs = 4 if settings.tiny else 256
    texts = random_captions(2 * pairs)
    rows = [dataclasses.asdict(Pair(a, p)) for a, p in zip(texts[:pairs], texts[pairs:], strict=True)]
    sizes = llm_sizes(settings)
    sizes.pop("8B", None)  # the gradients and float32 weights of an 8B model do not fit in GPU memory
    for name, shape in sizes.items():
        folder = save_llm(settings.out / f"llm-{name}", shape)
        encoder = CaptionEncoder.from_pretrained(folder, device=str(DEVICE)).train()
        encoder.llm.get_input_embeddings().requires_grad_(False)
        batch = PairCollator(preprocess_fn=encoder.tokenize)(rows)
        tokens = sum(len(ids) for ids in batch["tokens"])
        flops = 6 * count_layer_parameters(encoder) * tokens
        for grad_cache in (False, True):
            loss = PairLoss(encoder, 0.05, get_default_batch_tokens(DEVICE), grad_cache=grad_cache)
            label = f"{name}, llm2clip{', gradient caching' if grad_cache else ''}"
            reset_memory()
            yield step_row(label, partial(tune_pass, encoder, loss, [batch]), tokens, "tokens", flops)
        label = f"{name}, CachedMultipleNegativesRankingLoss"
        reset_memory()
        yield step_row(label, sentence_transformers_pass(encoder, texts, pairs), tokens, "tokens", flops)
        del encoder


def tune_pass(encoder: CaptionEncoder, loss_function: nn.Module, batch: list[Any]) -> None:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = loss_function(batch)
    loss.backward()
    encoder.zero_grad()


def sentence_transformers_pass(encoder: CaptionEncoder, texts: list[str], pairs: int) -> Callable[[], None]:
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    encoder.llm.set_attn_implementation("sdpa")
    loss_function = CachedMultipleNegativesRankingLoss(encoder.st, mini_batch_size=64)
    sides = [encoder.tokenizer(side, padding=True, return_tensors="pt") for side in (texts[:pairs], texts[pairs:])]
    features = [{name: side[name].to(DEVICE) for name in ("input_ids", "attention_mask")} for side in sides]

    def run() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = loss_function([dict(side) for side in features], None)
        loss.backward()
        encoder.zero_grad()

    return run


def measure_losses(settings: PartSettings) -> Iterator[dict[str, Any]]:
    """Run benchmarks/losses.py, and yield the rows of its table."""
    if not find_spec("open_clip"):
        yield {"loss": "skipped: open_clip is not installed"}
        return
    script = Path(__file__).with_name("losses.py")
    size = "256" if settings.tiny else "32768"
    command = [sys.executable, str(script), "--sizes", size, "--device", DEVICE.type]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    header, _, *rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("|")]
    for cells in rows:
        yield dict(zip(header, cells, strict=True))


def measure_data(settings: PartSettings) -> Iterator[dict[str, Any]]:
    """Measure how many images per second the loader of `align` decodes, from 500 x 400 pixel JPEG files."""
    count = 8 if settings.tiny else 256
    folder = settings.out / "images"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(count):
        small = rng.integers(0, 255, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(small).resize((500, 400)).save(folder / f"{n}.jpg")
    records = [Record(id=str(n), image=FileImage(str(folder / f"{n}.jpg")), captions=("a",)) for n in range(count)]
    table = RecordTable.from_records(records)
    store = write_store(table, settings.out / "store")
    for workers in [0] if settings.tiny else [0, 8, 16]:
        config = AlignConfig(batch_size=count // 2, epochs=1 if settings.tiny else 8, workers=workers)
        batches = AlignBatches(table, store, PREPROCESS, config).iterate_batches(0)
        first = len(next(batches).images)  # excludes the time to start the workers
        start = time.perf_counter()
        images = sum(len(batch.images) for batch in batches)
        yield {"workers": workers, "images": first + images, "images/s": images / (time.perf_counter() - start)}


def measure_search(settings: PartSettings) -> Iterator[dict[str, Any]]:
    """Search a million vectors with 1,024 dimensions: with a matmul on the device, and with the index on the CPU.

    Recall is measured for the first queries, relative to a search in float64.
    """
    count, dim, queries_count, sample = (2000, 32, 16, 8) if settings.tiny else (1_000_000, 1024, 256, 16)
    vectors = np.concatenate([chunk.astype(np.float16) for chunk in vector_chunks(count, dim)])
    rng = np.random.default_rng(1)
    queries = add_noise(vectors[rng.integers(count, size=queries_count)].astype(np.float32), rng)
    expected = search_float64(vectors, queries[:sample])

    for dtype in (torch.float16, torch.float32):
        items = torch.from_numpy(vectors).to(DEVICE, dtype)
        for batch in (1, queries_count):
            chunks = torch.from_numpy(queries).to(DEVICE, dtype).split(batch)

            def search(items: Tensor = items, chunks: Sequence[Tensor] = chunks) -> np.ndarray:
                return torch.cat([(chunk @ items.T).topk(K).indices for chunk in chunks]).cpu().numpy()

            reset_memory()
            label = f"matmul and top-k on the {DEVICE.type}, {str(dtype).removeprefix('torch.')}"
            yield search_row(label, search, batch, queries_count, expected)
        del items, chunks

    ids = np.arange(count)
    chunks_of_index = [(ids[start : start + CHUNK], vectors[start : start + CHUNK]) for start in range(0, count, CHUNK)]
    quantized = QuantizedVectors(127 / float(np.abs(vectors).max())).with_added_vectors(chunks_of_index)

    def search_index() -> np.ndarray:
        results = []
        for query in queries:
            candidates = quantized.find_nearest_ids(query, MIN_CANDIDATES)
            results.append(candidates[np.argsort(-(vectors[candidates].astype(np.float32) @ query))[:K]])
        return np.stack(results)

    yield search_row("llm2clip's index on the CPU: int8 scan, float16 scores", search_index, 1, queries_count, expected)


def search_float64(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the row numbers of each query's K nearest vectors in float64, as an array of shape (queries, K)."""
    scores = np.empty((len(queries), len(vectors)))
    for start in range(0, len(vectors), 50_000):
        stop = start + 50_000
        scores[:, start:stop] = queries.astype(np.float64) @ vectors[start:stop].astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :K]


def search_row(
    name: str, search: Callable[[], np.ndarray], batch: int, queries: int, expected: np.ndarray
) -> dict[str, Any]:
    """Time a search for all queries, `batch` queries at a time, and measure the recall of the first queries."""
    results = search()[: len(expected)]
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(results.tolist(), expected.tolist(), strict=True)])
    seconds = time_call(search, repeats=2)
    row = {"method": name, "queries at a time": batch, "queries/s": queries / seconds, f"recall@{K}": float(recall)}
    return row | {"peak memory, GB": torch.cuda.max_memory_allocated() / 1e9 if IS_GPU else "not measured"}


def measure_plan(settings: PartSettings) -> Iterator[dict[str, Any]]:
    """Yield the predictions of `llm2clip plan`, and the measurements of the `align` part in eager mode."""
    machine = Machine(find_device_name() or "h100")
    file = settings.out / "align.jsonl"
    measured = {row["method"]: row for row in read_rows(file)} if file.exists() else {}
    for tower, (timm_name, _, batch) in align_towers(settings).items():
        align = AlignConfig(tower=f"timm:{timm_name}", batch_size=batch, captions_per_image=1, embed_dim=512)
        plan = plan_fit(FitConfig(encoder=EncoderConfig(), tune=TuneConfig(), align=align), machine, 1_000_000, 1, 36)
        memory = plan.stage_memory["align"]
        row = measured.get(f"{tower}, llm2clip, eager", {})
        yield {
            "model": tower,
            "device": machine.device,
            "images per step": batch,
            "predicted memory, GB": sum(memory.values()) / 1e9,
            "measured memory, GB": row.get("peak memory, GB", "not measured"),
            "predicted images/s": plan.images_per_second,
            "measured images/s": row.get("images/s", "not measured"),
        }


# ---- helpers ---------------------------------------------------------------------------------------------------------


def find_device_name() -> str | None:
    """Return this GPU's name in the device table of `llm2clip plan`, or None if it is not in the table."""
    if not IS_GPU:
        return None
    words = torch.cuda.get_device_name(DEVICE).lower().replace("geforce rtx ", "rtx").split()
    memory = get_available_memory() / 1e9
    if "a100" in " ".join(words):
        return "a100-80" if memory > 50 else "a100-40"
    return next((name for name in DEVICES if name in words), None)


def get_available_memory() -> float:
    return float(torch.cuda.get_device_properties(DEVICE).total_memory) if IS_GPU else 8e9


def reset_memory() -> None:
    if IS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_call(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median time of a call in seconds, after one warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if IS_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def rate_row(name: str, count: float, seconds: float, flops: float, unit: str = "tokens") -> dict[str, Any]:
    row = {"method": name, "ms": 1e3 * seconds, f"{unit}/s": count / seconds}
    device = find_device_name()
    row["MFU, %"] = 100 * flops / seconds / DEVICES[device].get_peak_flops("bf16") if device else "unknown device"
    row["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9 if IS_GPU else "not measured"
    return row


def step_row(name: str, step: Callable[[], None], count: int, unit: str, flops: float) -> dict[str, Any]:
    """Time a step and return a table row. If the step runs out of memory, the row says so."""
    try:
        return rate_row(name, count, time_call(step), flops, unit)
    except torch.cuda.OutOfMemoryError:
        return {"method": name, "ms": "out of memory"}


def llm_sizes(settings: PartSettings) -> dict[str, dict[str, Any]]:
    """Return the configs of the LLMs that fit in memory, keyed by name. With --tiny, all layers are tiny."""
    if settings.tiny:
        return {f"tiny {name}": {**shape, **TINY_LLM} for name, shape in LLM_SIZES.items()}
    return {name: shape for name, shape in LLM_SIZES.items() if name != "8B" or get_available_memory() > 60e9}


def count_layer_parameters(encoder: CaptionEncoder) -> int:
    """Count the parameters in the weight matrices of all layers, without the token embeddings."""
    return sum(p.numel() for layer in encoder.llm.layers for p in layer.parameters() if p.ndim > 1)


def random_captions(count: int) -> list[str]:
    """Return captions of 4 to 16 words, in which each byte is one token."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS.split(), rng.integers(4, 17))) for _ in range(count)]


def save_llm(folder: Path, shape: dict[str, Any]) -> Path:
    """Save an LLM with random bf16 weights, and a tokenizer with one token per byte, unless they already exist."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return folder
    vocabulary = {"<|end|>": 0, **{c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    config = AutoConfig.for_model(**shape, pad_token_id=0, eos_token_id=0, bos_token_id=None)
    with torch.device(DEVICE) if IS_GPU else nullcontext():
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


MEASUREMENTS: dict[str, Callable[[PartSettings], Iterator[dict[str, Any]]]] = {
    "environment": measure_environment,
    "encode": measure_encode,
    "align": measure_align,
    "tune": measure_tune,
    "losses": measure_losses,
    "data": measure_data,
    "search": measure_search,
    "plan": measure_plan,
}

"""Self-distillation and representation inheritance (ProCLIP, arXiv 2510.18795).

Both methods preserve the capabilities of a pretrained CLIP model.

Self-distillation: in the `align` stage, `distillation_loss` keeps the vision tower's features close to those of the
pretrained tower.

Representation inheritance: before `align`, the adapter learns from text alone to map the LLM embedding of a text to the
embedding of the same text in the tower's CLIP model. The image projection is taken from this CLIP model. Without this
step, the adapter is randomly initialised, and contrastive training against it degrades the features of the pretrained
tower. In the paper, both methods together improve zero-shot accuracy by 6.8 to 13.5 points.

The training texts are the captions, short captions and phrases of the training data. Long captions are used only if
there are no captions and no short captions. Records without an image are also used. Phrases such as "red hat" are
repeated until they make up about half of the texts, so that the adapter learns short texts as well as full captions.
CLIP's embeddings of these texts are cached in a store, and the LLM's embeddings come from the caption store, so each
training step runs only the adapter.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.data.records import Record
from llm2clip.data.table import RecordTable
from llm2clip.io_utils import atomic_path
from llm2clip.models.hub.fingerprint import fingerprint, hash_weights
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.text.clip_text_encoder import ClipTextEncoder
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import RaggedGather, print_once, process_state, wait_for_everyone
from llm2clip.store.image_features import store_text_embeddings
from llm2clip.store.layout import iter_chunks, make_caption_keys
from llm2clip.store.store import LOOKUP_CHUNK_SIZE, EmbeddingStore, read_refused_captions
from llm2clip.train.optim import ADAM_BETAS, MAX_GRAD_NORM, WEIGHT_DECAY, make_cosine_schedule

WEIGHTS = "inherited_adapter.safetensors"
EPOCHS = 4
MIN_STEPS = 500  # minimum number of steps; with few texts, training takes more than `EPOCHS` epochs
BATCH_SIZE = 1024
LR = 1e-3
WARMUP_RATIO = 0.05
MAX_REPEATS = 16  # maximum number of times that a phrase occurs per epoch
MAX_TEST_TEXTS = 1000  # maximum number of held-out texts for measuring the cosine similarity


def distillation_loss(student: Tensor, teacher: Tensor, gather: bool = True) -> Tensor:
    """Return the sum of ProCLIP's instance loss and structure loss between L2-normalised embeddings.

    With student embeddings s_i and teacher embeddings t_i of N items:

        instance loss:   mean over i of |s_i - t_i|^2
        structure loss:  mean over pairs i != j of smooth_l1(|s_i - s_j| - |t_i - t_j|)

    The formulas are taken from `train_one_epoch_stage1` and `train_one_epoch_stage2` in training/train.py of
    https://github.com/VisionXLab/ProCLIP. ProCLIP's code sums over items and over the pairs of each rank. This function
    averages over items and over the pairs of all ranks instead, so that the loss does not scale with the batch size or
    the number of ranks. In its second stage, ProCLIP's code compares image embeddings, whereas `align` compares the
    tower's features before the projection, because a new projection has no teacher. Memory use is quadratic in N.

    Args:
        student, teacher: Embeddings of the same N items, of shape (N, D). This function L2-normalises them. The
            teacher's embeddings receive no gradients.
        gather: If True, use the pairs of all ranks; all ranks must then call this function. If all ranks have the same
            number of items, the loss and its gradients, averaged over ranks, equal those of a single process with all
            items.

    Returns:
        The loss as a float32 scalar. With a single item, the structure loss is 0.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
        instance = (student - teacher).square().sum(-1).mean()

        ranks = RaggedGather(len(student), student.device, gather)
        all_student, all_teacher = ranks.gather(student, gradients=True), ranks.gather(teacher)
        student_distances = _pairwise_distances(student, all_student)  # (items of this rank, items of all ranks)
        teacher_distances = _pairwise_distances(teacher, all_teacher)
        # The pair of an item with itself adds 0 to the sum.
        total = F.smooth_l1_loss(student_distances, teacher_distances, reduction="sum")
        structure = total / max(1, len(student) * (ranks.total_size - 1))
    return instance + structure


def _pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances, of shape (N, M), between L2-normalised vectors of shapes (N, D) and (M, D).

    The distance between nearly identical vectors is set to 0, without a gradient, because the square root has an
    infinite gradient at 0.
    """
    squares = 2 - 2 * a @ b.T
    is_distinct = squares > 1e-6  # in float32, the absolute error is about 1e-7
    return torch.where(is_distinct, squares.where(is_distinct, 1.0).sqrt(), 0.0)


# ---- representation inheritance --------------------------------------------------------------------------------------


@onednn_matmul()
def inherit_text_space(
    model: LLM2CLIP,
    clip: ClipTextEncoder,
    records: Sequence[Record],
    store: EmbeddingStore,
    seed: int,
    precision: str,
    folder: Path,
) -> None:
    """Train the adapter of `model` to reproduce a CLIP model's text embeddings. Must be called by all ranks.

    The main process trains the adapter. The adapter's weights are saved in `folder`, with a signature of everything
    that they depend on. If the folder already contains weights with this signature, these weights are loaded instead.

    Args:
        model: Model with a new adapter and the same `embed_dim` as the CLIP model. The model is modified in place.
        clip: Text tower of the CLIP model.
        store: Store of the LLM embeddings of the captions and phrases of `records`. Captions that the tokenizer could
            not encode and phrases that are not in the store are skipped.
        seed: Seed for the order of the texts.
        precision: "bf16" enables autocast. With "fp32" or "fp16", the adapter is trained in float32.
        folder: Folder for the weights and the store of CLIP text embeddings.
    """
    table = records if isinstance(records, RecordTable) else RecordTable.from_records(records)
    texts = (text for chunk in iterate_training_texts(table, store) for text in chunk.texts)
    identity = {"clip": hash_weights(clip.model), "precision": "fp32"}
    clip_folder = folder / f"clip-texts-{fingerprint(identity)[:8]}"
    clip_store = store_text_embeddings(texts, clip.encode, clip.embed_dim, identity, clip_folder, dtype="float16")
    file = folder / WEIGHTS
    if process_state().is_main_process:
        training_texts = find_training_texts(table, store, clip_store)
        signature = {
            "clip": identity,
            "encoder": store.manifest["fingerprint"],
            "texts": training_texts.text_hash,
            "adapter": hash_weights(model.adapter),  # untrained weights, which depend on the architecture and the seed
            "training": [EPOCHS, MIN_STEPS, BATCH_SIZE, LR, WARMUP_RATIO, MAX_REPEATS, seed, precision],
        }
        if _read_signature(file) != signature:
            load = partial(_load_embeddings, training_texts, store, clip_store, model.device)
            num_texts, num_captions = len(training_texts.rows), training_texts.num_captions
            similarity = _train_adapter(model.adapter, load, num_texts, num_captions, seed, precision)
            state = {name: tensor.cpu().contiguous() for name, tensor in model.adapter.state_dict().items()}
            with atomic_path(file) as temporary:
                save_file(state, temporary, {"signature": json.dumps(signature), "similarity": f"{similarity:.4f}"})
    wait_for_everyone()
    model.adapter.load_state_dict(load_file(file))


@dataclass(frozen=True)
class TextChunk:
    """Some of the training texts: captions or phrases, possibly with duplicates."""

    texts: list[str]
    keys: np.ndarray  # keys of the texts in embedding stores, of shape (N, 16), uint8
    rows: np.ndarray  # row numbers of the LLM embeddings, of shape (N,), int64
    are_captions: bool


@dataclass(frozen=True)
class TrainingTexts:
    """Distinct training texts: first the captions, then the phrases. A phrase that is also a caption is a caption.

    Attributes:
        rows, clip_rows: Row numbers of the LLM embeddings and of the CLIP embeddings, of shape (N,), int64.
        num_captions: Number of captions.
        text_hash: Hash of all texts.
    """

    rows: np.ndarray
    clip_rows: np.ndarray
    num_captions: int
    text_hash: str


def iterate_training_texts(records: RecordTable, store: EmbeddingStore) -> Iterator[TextChunk]:
    """Yield the captions to train on, then the phrases.

    Long captions are used only if there are no other captions, because CLIP's text towers read at most 77 tokens.

    Raises:
        StoreError: A caption is not in the store.
    """
    caption_fields: tuple[str, ...] = ("captions", "short_captions")
    if not any(records.count_texts(field).any() for field in caption_fields):
        caption_fields = ("long_captions",)
    refused = {row["caption"] for row in read_refused_captions(store.folder)}
    for fields in (caption_fields, ("phrases",)):
        for texts in iter_chunks(records.iterate_texts(fields), LOOKUP_CHUNK_SIZE):
            keys = make_caption_keys(texts)
            rows = store.find_keys(keys)
            is_found = rows >= 0
            if fields == caption_fields:
                missing = [texts[n] for n in np.flatnonzero(~is_found).tolist()]
                store.find_rows(caption for caption in missing if caption not in refused)  # raises StoreError
            found = [texts[n] for n in np.flatnonzero(is_found).tolist()]
            yield TextChunk(found, keys[is_found], rows[is_found], fields == caption_fields)


def find_training_texts(records: RecordTable, store: EmbeddingStore, clip_store: EmbeddingStore) -> TrainingTexts:
    """Find the embeddings of all training texts. Memory: about 50 bytes per text, including duplicates."""
    rows, clip_rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    num_captions = 0
    digest = hashlib.sha256()
    for chunk in iterate_training_texts(records, store):
        rows.append(chunk.rows)
        clip_rows.append(clip_store.find_keys(chunk.keys))
        num_captions += len(chunk.texts) if chunk.are_captions else 0
        digest.update(chunk.keys.tobytes())
    all_rows = np.concatenate(rows)
    first = np.sort(np.unique(all_rows, return_index=True)[1])  # first occurrence of each text
    return TrainingTexts(
        rows=all_rows[first],
        clip_rows=np.concatenate(clip_rows)[first],
        num_captions=int(np.searchsorted(first, num_captions)),
        text_hash=f"{digest.hexdigest()} {num_captions}",
    )


def _load_embeddings(
    texts: TrainingTexts, store: EmbeddingStore, clip_store: EmbeddingStore, device: torch.device, items: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Return the LLM and CLIP embeddings of the texts with the given indices, in float32 on the device."""
    embeddings = torch.from_numpy(store.take(texts.rows[items])).to(device)
    return embeddings, torch.from_numpy(clip_store.take(texts.clip_rows[items])).to(device)


def _read_signature(file: Path) -> object:
    if not file.exists():
        return None
    with safe_open(file, "pt") as weights:
        return json.loads(weights.metadata()["signature"])


def _train_adapter(
    adapter: nn.Module,
    load_embeddings: Callable[[np.ndarray], tuple[Tensor, Tensor]],
    num_texts: int,
    num_captions: int,
    seed: int,
    precision: str,
) -> float:
    """Train the adapter. Print and return the mean cosine similarity of its outputs to CLIP's embeddings.

    The similarity is measured on held-out texts or, if there are fewer than 20 texts, on the training texts.
    `load_embeddings` returns the LLM and CLIP embeddings of the texts with the given indices. The first `num_captions`
    texts are captions, and all later texts are phrases.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_texts)
    test_size = min(MAX_TEST_TEXTS, num_texts // 20)
    test, train = order[:test_size], repeat_phrases(order[test_size:], num_captions)
    batch_size = min(BATCH_SIZE, len(train))
    steps_per_epoch = len(train) // batch_size
    steps = max(MIN_STEPS, EPOCHS * steps_per_epoch)

    matrices = [p for p in adapter.parameters() if p.ndim > 1]
    vectors = [p for p in adapter.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=ADAM_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, make_cosine_schedule(steps, WARMUP_RATIO))
    # fp16 would need loss scaling. On GPUs without bf16, the adapter is small enough for fp32.
    autocast = torch.autocast(matrices[0].device.type, torch.bfloat16, enabled=precision == "bf16")
    adapter.train()
    for step in ProgressBar(range(steps), desc="inherit", unit="step"):
        epoch_step = step % steps_per_epoch
        if epoch_step == 0:
            train = rng.permutation(train)
        embeddings, teacher = load_embeddings(train[epoch_step * batch_size :][:batch_size])
        with autocast:
            student = adapter(embeddings)
        distillation_loss(student, teacher, gather=False).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    adapter.eval()
    with torch.no_grad():
        embeddings, teacher = load_embeddings(test if test_size else train)
        similarity = F.cosine_similarity(adapter(embeddings), teacher).mean().item()
    texts = "held-out" if test_size else "training"
    print_once(f"inherit: cosine similarity {similarity:.3f} to the CLIP text embeddings of the {texts} texts")
    return similarity


def repeat_phrases(texts: np.ndarray, num_captions: int) -> np.ndarray:
    """Repeat the phrases until they make up about half of the texts, at most `MAX_REPEATS` times.

    `texts` contains int64 indices. Indices below `num_captions` refer to captions, and the others refer to phrases.
    """
    captions, phrases = texts[texts < num_captions], texts[texts >= num_captions]
    repeats = min(MAX_REPEATS, max(1, len(captions) // max(1, len(phrases))))
    return np.concatenate([captions, np.repeat(phrases, repeats)])

"""The `distill` stage: training of a small text encoder to reproduce a model's text embeddings.

The student replaces the caption encoder and the adapter. Its last layer maps texts directly to the shared embedding
space, so serving needs no LLM, and existing image embeddings remain valid. The loss is the cosine distance to the
teacher's text embeddings, as in LEAF (arXiv 2509.12539) and in NanoVDR (arXiv 2603.12824), where the cosine distance
was the best of six losses. The teacher encodes each text once, before training.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, compress, count
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from torch import Tensor, nn

from llm2clip.config import DistillConfig
from llm2clip.cpu_tuning import free_memory, use_onednn_matmul
from llm2clip.data.records import CAPTION_FIELDS
from llm2clip.data.table import RecordTable
from llm2clip.io_utils import format_count, iterate_lines
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import check_model_source, fingerprint, hash_weights
from llm2clip.models.model_folder import AdapterConfig
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import TokenizedTexts, batch_by_length, get_default_batch_tokens
from llm2clip.runs.ranks import is_fsdp_enabled, print_once, process_state
from llm2clip.store.encode import embed, store_text_embeddings
from llm2clip.store.layout import (
    LOOKUP_CHUNK_SIZE,
    MANIFEST,
    StoreError,
    check_identity,
    iter_chunks,
    make_caption_keys,
)
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.initial_model import repeat_phrases
from llm2clip.train.loop import StepResult, TrainingLoop
from llm2clip.train.optim import ADAM_BETAS

DEFAULT_LR, STATIC_LR = 5e-4, 1e-2
STATIC_LAYER_LR = 0.1  # learning rate of a static student's linear layers, relative to that of its token embeddings
SORTED_STEPS = 64  # texts are sorted by length within groups of this many steps
HEAD_TEXTS = 4096  # maximum number of texts for initialising the student's last layer
RIDGE = 1e-2  # ridge penalty, relative to the mean variance of the inputs
TOKENIZE_CHUNK = 1 << 16


# ---- teacher ---------------------------------------------------------------------------------------------------------


class Teacher:
    """Text encoder of a trained model. Caption embeddings are read from stores if possible.

    Attributes:
        model: llm2clip model. Its caption encoder is loaded only if a text is in none of the stores.
        stores: Stores of embeddings from the model's caption encoder.
    """

    def __init__(self, model: LLM2CLIP, folder: Path, store: str | None = None) -> None:
        """
        Args:
            store: Folder of a store with caption embeddings. Default: the store next to the model folder, if any.

        Raises:
            ValueError: The model has no caption encoder.
            StoreError: The store was created with a different encoder.
        """
        if not model.has_encoder:
            raise ValueError(
                f"{folder} has no caption encoder, so a student cannot learn its text embeddings. Add the encoder "
                f"with which the model was trained: llm2clip convert {folder} --text ENCODER --out MODEL"
            )
        self.model, self.folder = model, folder
        self.stores: list[EmbeddingStore] = []
        neighbour = folder.parent / "store"
        if store is not None:
            self._add_embedding_store(Path(store))
        elif (neighbour / MANIFEST).is_file():
            with suppress(StoreError):  # raised if the store belongs to a different model
                self._add_embedding_store(neighbour)

    def _add_embedding_store(self, folder: Path) -> None:
        """Add a store. Raise StoreError if its encoder differs from the model's encoder in more than the precision."""
        store = EmbeddingStore(folder)
        expected, stored = self.model.config.encoder or self.model.encoder.identity(), store.manifest["identity"]
        names = [name for name in expected if name not in ("precision", "config")]
        check_identity({n: stored.get(n) for n in names}, {n: expected[n] for n in names}, folder)
        self.stores.append(store)

    def embed_missing_texts(self, texts: Iterable[str], folder: Path) -> None:
        """Encode all texts that are not in the stores into a new store in `folder`. Must be called by all ranks."""
        missing = self.select_texts(texts, is_stored=False)
        first = next(missing, None)
        if first is not None:
            encoder = CaptionEncoder.from_pretrained(self.folder, device="cpu")
            self.stores.append(embed(chain([first], missing), encoder, folder, device=process_state().device))
            del encoder
            free_memory()

    def open_store(self, folder: Path) -> None:
        """Open the store that `embed_missing_texts` created in `folder`, if any."""
        if (folder / MANIFEST).is_file():
            self.stores.append(EmbeddingStore(folder))

    def select_texts(self, texts: Iterable[str], is_stored: bool) -> Iterator[str]:
        """Yield the texts that are in any of the stores or, if `is_stored` is False, in none of the stores."""
        for chunk in iter_chunks(texts, LOOKUP_CHUNK_SIZE):
            mask = (self._find_store_rows(chunk)[0] >= 0) == is_stored
            yield from compress(chunk, mask.tolist())

    def _find_store_rows(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return each text's store index and row number: two int64 arrays of shape (N,). Both are -1 for texts that are
        not in any store."""
        numbers, rows = np.full(len(texts), -1), np.full(len(texts), -1)
        keys = make_caption_keys(texts)
        for number, store in enumerate(self.stores):
            store_rows = store.find_keys(keys)
            is_new = (numbers < 0) & (store_rows >= 0)
            numbers[is_new], rows[is_new] = number, store_rows[is_new]
        return numbers, rows

    def encode(self, texts: Sequence[str], progress: bool = False) -> Tensor:
        """Return L2-normalised text embeddings in the shared space as a float32 CPU tensor of shape (N, embed_dim)."""
        numbers, rows = self._find_store_rows(texts)
        embeddings = torch.zeros(len(texts), self.model.config.text_dim)
        for number, store in enumerate(self.stores):
            members = np.flatnonzero(numbers == number)
            embeddings[members] = torch.from_numpy(store.take(rows[members]))
        missing = np.flatnonzero(numbers < 0).tolist()
        if missing:
            precision = self.model.load_encoder("auto", "evaluate")
            missing_texts = [texts[n] for n in missing]
            embeddings[missing] = self.model.encoder.encode(missing_texts, precision=precision, progress=progress)
        return self.model.project_text_embeddings(embeddings)


# ---- student ---------------------------------------------------------------------------------------------------------


def load_student(name: str, teacher_folder: Path, embed_dim: int, config: DistillConfig) -> CaptionEncoder:
    """Load a student on the CPU, and add a new last layer that maps its embeddings to the shared space.

    Args:
        name: Folder, hub id or built-in name of a sentence-transformers model or LLM; `layers:N` for the first N layers
            of the teacher; `static` for one embedding per token in the teacher's vocabulary; or `static:NAME` for one
            embedding per token in another model's vocabulary.
        embed_dim: Dimension of the shared space.

    Raises:
        ValueError: The name or a setting is invalid.
        OSError: The model does not exist.
    """
    set_seed(config.seed)
    kind, _, argument = name.partition(":")
    if kind == "static":
        if config.max_length is not None:
            raise ValueError("--distill.max_length does not apply to static students: remove this setting")
        tokenizer_path = resolve_pretrained_name(argument) or str(teacher_folder / "text")
        return CaptionEncoder(_build_static_model(tokenizer_path, embed_dim))
    layers = None
    if kind == "layers":
        if not argument.isdecimal():
            raise ValueError(f"--student layers:N requires a number of layers, such as layers:4 (got {name!r})")
        name, layers = str(teacher_folder), int(argument)
    encoder = CaptionEncoder.from_pretrained(name, layers=layers, max_length=config.max_length, device="cpu")
    st = encoder.st
    for index in reversed(range(len(st))):
        if isinstance(st[index], Normalize):
            del st[index]
    st.append(Dense(st.get_embedding_dimension(), embed_dim, activation_function=nn.Identity()))
    return encoder


def _build_static_model(tokenizer_path: str, embed_dim: int) -> SentenceTransformer:
    """Build a static student: mean of token embeddings -> residual layer with GELU -> linear layer.

    The token embeddings are zero until `initialize_student` is called.
    """
    from transformers import AutoTokenizer

    check_model_source(tokenizer_path)
    if (Path(tokenizer_path) / "text/tokenizer.json").is_file():  # an llm2clip model folder
        tokenizer_path = str(Path(tokenizer_path) / "text")
    tokenizer = getattr(AutoTokenizer.from_pretrained(tokenizer_path), "backend_tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{tokenizer_path} has no fast tokenizer, which a static student requires: use --student static:NAME"
        )
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.no_truncation()
    weights = torch.zeros(tokenizer.get_vocab_size(), embed_dim)
    identity = torch.eye(embed_dim)
    return SentenceTransformer(
        modules=[
            StaticEmbedding(tokenizer, embedding_weights=weights),
            Dense(embed_dim, embed_dim, activation_function=nn.GELU(), use_residual=True),
            Dense(embed_dim, embed_dim, activation_function=nn.Identity(), init_weight=identity),
        ],
        device="cpu",
    )


def decode_vocabulary(student: CaptionEncoder) -> list[str]:
    """Return the text of each token in a static student's vocabulary, or an empty list for other students.

    The text of a special token or an incomplete UTF-8 character is "".
    """
    if not student.is_static:
        return []
    texts = student.tokenizer.decode_batch([[token] for token in range(student.st[0].num_embeddings)])
    return ["" if "\N{REPLACEMENT CHARACTER}" in text else text.removeprefix("##").strip() for text in texts]


@torch.no_grad()
@use_onednn_matmul()
def initialize_student(student: CaptionEncoder, teacher: Teacher, data: "DistillationTexts") -> None:
    """Initialise the new layers of a student.

    The token embeddings of a static student are initialised with the teacher's embeddings of the tokens' texts. The
    last layer of other students is initialised by ridge regression from the student's embeddings of sampled training
    texts to the teacher's embeddings.
    """
    if student.is_static:
        texts = decode_vocabulary(student)
        tokens = [token for token, text in enumerate(texts) if text]
        weights = student.st[0].embedding.weight
        for chunk in iter_chunks(tokens, TOKENIZE_CHUNK):
            # Scale embeddings to a variance of about 1 per dimension: the GELU is nearly linear for small inputs.
            weights[chunk] = teacher.encode([texts[token] for token in chunk]) * weights.shape[1] ** 0.5
        return
    sample = np.linspace(0, len(data) - 1, min(HEAD_TEXTS, len(data))).astype(np.int64)
    head = student.st.pop(-1)
    ids = data.get_token_ids(sample)
    prompt_length = student.count_prompt_tokens(student.prefix)
    inputs = student.to(process_state().device).encode(
        TokenizedTexts(ids, [], [prompt_length] * len(ids)), progress=True
    )
    student.st.append(head.to(student.device))
    weight, bias = fit_ridge_regression(inputs.double(), data.get_targets(sample).double())
    head.linear.weight.copy_(weight)
    head.linear.bias.copy_(bias)


def fit_ridge_regression(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a linear layer that maps inputs (N, D) to targets (N, E). Return the weight (E, D) and the bias (E,)."""
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    centred = inputs - input_mean
    gram = centred.T @ centred
    penalty = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    regularised = gram + penalty * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(regularised, centred.T @ (targets - target_mean)).T
    return weight, target_mean - weight @ input_mean


def build_student_model(teacher: LLM2CLIP, student: CaptionEncoder) -> LLM2CLIP:
    """Build a model with the teacher's image encoder and the student as its text encoder, without an adapter."""
    config = replace(teacher.config, text_dim=teacher.config.embed_dim, adapter=AdapterConfig(depth=0))
    config.encoder = student.identity()
    model = LLM2CLIP(config, teacher.tower, student)
    model.projection, model.training_images = teacher.projection, teacher.training_images
    model.logit_scale, model.logit_bias = teacher.logit_scale, teacher.logit_bias
    return model.eval()


# ---- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillationTexts:
    """Distinct training texts, tokenized for the student. Captions precede phrases.

    Attributes:
        tokens: Token ids of all texts, of shape (T,), int32, in a memory-mapped file.
        offsets: Index in `tokens` of each text's first token, followed by T, of shape (N + 1,), int64.
        targets: Store of the teacher's text embeddings in the shared space.
        rows: Row number of each text in `targets`, of shape (N,), int64.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    targets: EmbeddingStore
    rows: np.ndarray
    num_captions: int
    text_hash: str

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.rows)

    def get_token_ids(self, items: np.ndarray) -> list[list[int]]:
        return [self.tokens[self.offsets[n] : self.offsets[n + 1]].tolist() for n in items.tolist()]

    def get_targets(self, items: np.ndarray) -> Tensor:
        """Return the teacher's embeddings of the texts with the given indices as a float32 tensor of shape (N, D)."""
        return torch.from_numpy(self.targets.take(self.rows[items]))


def prepare_training_texts(
    records: RecordTable,
    other_texts: Path | None,
    student: CaptionEncoder,
    teacher: Teacher,
    folder: Path,
    max_skipped: float,
) -> DistillationTexts:
    """Embed the training texts with the teacher, and tokenize the texts for the student. Must be called by all ranks.

    Texts that the teacher's or the student's tokenizer cannot encode are skipped. Memory use: 25 bytes per distinct
    text (60 bytes at the peak), plus one chunk of texts (about 100 MB).

    Args:
        other_texts: File with additional texts, one per line, which are treated as captions.
        folder: Folder for targets/, the store of the teacher's text embeddings in the shared space. Each rank also
            writes a temporary file of 4 bytes per token.
        max_skipped: Maximum fraction of texts that the student's tokenizer may fail to encode.

    Raises:
        ValueError: There are no texts, or the student's tokenizer fails to encode too many texts.
    """
    identity: dict[str, Any] = {"precision": "fp32"}
    identity["encoder"] = [fingerprint(store.manifest["identity"]) for store in teacher.stores]
    identity["adapter"] = hash_weights(teacher.model.adapter)
    dim = teacher.model.config.embed_dim
    texts = teacher.select_texts(chain(*iterate_texts(records, other_texts)), is_stored=True)
    targets = store_text_embeddings(texts, teacher.encode, dim, identity, folder / "targets", dtype="float16")
    with TemporaryFile(dir=folder) as file:
        tokenized = _TokenWriter(student, targets, file)
        captions, phrases = iterate_texts(records, other_texts)
        for chunk in iter_chunks(captions, TOKENIZE_CHUNK):
            tokenized.add_texts(chunk)
        num_captions = tokenized.count
        for chunk in iter_chunks(phrases, TOKENIZE_CHUNK):
            tokenized.add_texts(chunk)
        return tokenized.finish(num_captions, max_skipped)


def iterate_texts(records: RecordTable, other_texts: Path | None) -> tuple[Iterator[str], Iterator[str]]:
    """Return an iterator over the captions and the lines of `other_texts`, and an iterator over the phrases."""
    other_lines = iterate_lines(other_texts) if other_texts else ()
    return chain(records.iterate_texts(CAPTION_FIELDS), other_lines), records.iterate_texts(("phrases",))


class _TokenWriter:
    """Writer that tokenizes distinct texts with an embedding in `targets`, and writes the token ids to a file."""

    def __init__(self, student: CaptionEncoder, targets: EmbeddingStore, file: IO[bytes]) -> None:
        self.student, self.targets, self.file = student, targets, file
        self.count = 0
        self._ignored_ids = _list_ignored_token_ids(student)
        self._is_seen = np.zeros(1 + sum(shard.rows for shard in targets.shards), bool)  # one flag per row of `targets`
        self._rows, self._lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        self._hash = hashlib.sha256()
        self._num_failed, self._first_failed = 0, ""

    def add_texts(self, texts: Sequence[str]) -> None:
        """Tokenize the texts that have an embedding and have not been added before."""
        keys = make_caption_keys(texts)
        rows = self.targets.find_keys(keys)
        is_new = np.zeros(len(texts), bool)
        is_new[np.unique(rows, return_index=True)[1]] = True
        is_new &= (rows >= 0) & ~self._is_seen[rows]
        self._is_seen[rows[is_new]] = True

        new = np.flatnonzero(is_new)
        ids = self.student.tokenize([texts[n] for n in new.tolist()]).ids
        is_encodable = np.array([not self._ignored_ids.issuperset(text_ids) for text_ids in ids], bool)
        failed = new[~is_encodable]
        if len(failed) and not self._num_failed:
            self._first_failed = texts[failed[0]]
        self._num_failed += len(failed)

        valid, valid_ids = new[is_encodable], list(compress(ids, is_encodable.tolist()))
        self.file.write(np.fromiter(chain.from_iterable(valid_ids), np.int32).tobytes())
        self._rows.append(rows[valid])
        self._lengths.append(np.array([len(text_ids) for text_ids in valid_ids], np.int64))
        self._hash.update(keys[valid].tobytes())
        self.count += len(valid)

    def finish(self, num_captions: int, max_skipped: float) -> DistillationTexts:
        total, failed = self.count + self._num_failed, self._num_failed
        if not total:
            raise ValueError("there are no texts to train on: the training records have no captions")
        if failed > max_skipped * total or not self.count:
            raise ValueError(
                f"the student's tokenizer cannot encode {failed:,} of {format_count(total, 'text')}, such as "
                f"{self._first_failed[:120]!r}, which has only unknown tokens. Choose a student for the language of "
                "the texts"
            )
        if failed:
            print_once(f"Texts that the student's tokenizer cannot encode: {failed:,}, such as {self._first_failed!r}")
        self.file.flush()
        lengths = np.concatenate(self._lengths)
        return DistillationTexts(
            tokens=np.memmap(self.file, np.int32, "r"),  # stays valid after the file is closed and deleted
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            targets=self.targets,
            rows=np.concatenate(self._rows),
            num_captions=num_captions,
            text_hash=self._hash.hexdigest()[:16],
        )


def _list_ignored_token_ids(student: CaptionEncoder) -> set[int]:
    if not student.is_static:
        return set(student.tokenizer.all_special_ids)
    unknown = getattr(student.tokenizer.model, "unk_token", None)
    ids = {token for token, added in student.tokenizer.get_added_tokens_decoder().items() if added.special}
    return ids | ({student.tokenizer.token_to_id(unknown)} if unknown is not None else set())


def sample_epoch_batches(data: DistillationTexts, texts_per_step: int, seed: int, epoch: int) -> np.ndarray:
    """Return the text indices for all steps of an epoch as an int64 array of shape (steps, texts_per_step).

    The texts of a step have similar lengths, and the steps are in random order. Phrases are repeated (see
    `repeat_phrases`). Each epoch omits a few random texts if the last step would be incomplete.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(repeat_phrases(np.arange(len(data)), data.num_captions))
    order = order[: len(order) // texts_per_step * texts_per_step]
    steps = []
    for start in range(0, len(order), SORTED_STEPS * texts_per_step):
        group = order[start : start + SORTED_STEPS * texts_per_step]
        group = group[np.argsort(data.lengths[group], kind="stable")].reshape(-1, texts_per_step)
        steps.append(rng.permutation(group))
    return np.concatenate(steps)


# ---- training --------------------------------------------------------------------------------------------------------


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean cosine distance, 1 - cos(student_i, teacher_i), between embeddings of shape (N, D)."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


@use_onednn_matmul()
def distill(
    student: CaptionEncoder, teacher: Teacher, data: DistillationTexts, config: DistillConfig, run_dir: Path
) -> CaptionEncoder:
    """Train a student in place on the texts in `data`, resuming from the latest checkpoint if one exists.

    Token embeddings are trained only for static students. Checkpoints and metrics.jsonl are written to `run_dir`.

    Raises:
        ValueError: Settings contradict each other, or the checkpoints were saved with different settings or data.
        FloatingPointError: The loss or a gradient is not finite.
    """
    if is_fsdp_enabled():
        raise ValueError("distill does not support FSDP, because students are small: remove --use_fsdp")
    loop = TrainingLoop("distill", "texts", config, run_dir)
    texts_per_step, world_size = loop.items_per_step, loop.accelerator.num_processes
    if texts_per_step is None:
        texts_per_step = min(config.batch_size, max(1, len(data) // world_size)) * world_size
    if texts_per_step > len(data):
        raise ValueError(f"there are fewer texts ({len(data)}) than processes ({world_size}). Add texts to train on")
    # Phrases are repeated, so an epoch may have more texts than `data`.
    steps_per_epoch = len(sample_epoch_batches(data, texts_per_step, config.seed, 0))
    properties = {
        "texts": data.text_hash,
        "teacher": data.targets.manifest["fingerprint"],
        "student": fingerprint(student.identity()),
    }
    loop.check_signature(max(1, round(config.epochs * steps_per_epoch)), texts_per_step, properties)

    if loop.checkpoints.latest is None:
        initialize_student(student, teacher, data)
    student.to(loop.device)
    # Train without dropout, because small students underfit rather than overfit.
    student.eval()
    groups = _select_trainable_parameters(student, config)
    loop.start(student.st, torch.optim.Adam(groups, betas=ADAM_BETAS), lr=groups[0]["lr"])
    batches = _iterate_batches(data, loop, texts_per_step, steps_per_epoch)
    loop.run(batches, partial(_compute_gradients, loop, student, data))
    student.st.requires_grad_(True)
    return student.eval()


def _iterate_batches(
    data: DistillationTexts, loop: TrainingLoop, texts_per_step: int, steps_per_epoch: int
) -> Iterator[np.ndarray]:
    rank, world_size = loop.accelerator.process_index, loop.accelerator.num_processes
    first_epoch, first_step = divmod(loop.checkpoints.step, steps_per_epoch)
    for epoch in count(first_epoch):
        steps = sample_epoch_batches(data, texts_per_step, loop.config.seed, epoch)
        for items in steps[first_step if epoch == first_epoch else 0 :]:
            yield items[rank::world_size]


def _compute_gradients(
    loop: TrainingLoop, student: CaptionEncoder, data: DistillationTexts, step: int, items: np.ndarray
) -> StepResult:
    # The loss is a mean over texts, so splitting the batch into several forward passes does not change the gradients.
    loss = torch.zeros((), device=loop.device)
    parts = list(batch_by_length(data.lengths[items].tolist(), get_default_batch_tokens(loop.device)))
    for number, part in enumerate(parts, 1):
        batch = student.collate(data.get_token_ids(items[part]))
        targets = data.get_targets(items[part]).to(loop.device)
        with nullcontext() if number == len(parts) else loop.accelerator.no_sync(loop.net):
            part_loss = cosine_loss(loop.net(batch)["sentence_embedding"], targets) * (len(part) / len(items))
            loop.accelerator.backward(part_loss)
        loss += part_loss.detach()
    return StepResult(loss, len(items))


def _select_trainable_parameters(student: CaptionEncoder, config: DistillConfig) -> list[dict[str, Any]]:
    lr = config.lr or (STATIC_LR if student.is_static else DEFAULT_LR)
    student.st.requires_grad_(True)
    if student.is_static:
        embeddings, *layers = student.st
        layer_weights = [parameter for layer in layers for parameter in layer.parameters()]
        return [
            {"params": list(embeddings.parameters()), "lr": lr},
            {"params": layer_weights, "lr": STATIC_LAYER_LR * lr},
        ]
    student.llm.get_input_embeddings().requires_grad_(False)  # each step uses few rows of this large matrix
    pooler = getattr(student.llm, "pooler", None)  # llm2clip does not use the pooler of BERT-like models
    if pooler is not None:
        pooler.requires_grad_(False)
    return [{"params": [p for p in student.st.parameters() if p.requires_grad], "lr": lr}]

"""How fast captions are encoded: ways side by side in one run, turn by turn, with the same captions and weights; and
what the faster ways, and smaller stores, cost in retrieval.

    python benchmarks/embed.py CAPTIONS [CAPTIONS ...] [--encoder smollm2-135m] [--layers N] [--count 4096] [--turns 3]
        [--llm2vec PYTHON] [--cra CAPTIONS@SPLIT]

The captions of all sources are mixed. The ways: batches of 32 as they come, padded to their longest, as a loop does;
`SentenceTransformer.encode` at its defaults; LLM2Vec's `encode` at its defaults, in the environment whose interpreter
is PYTHON (`pip install torch llm2vec==0.2.3` there); and ours, padded and packed, in fp32, in bf16, and in what `auto`
chooses. The peers run in processes of their own. Each is said with its spread over the turns and with what its vectors
are worth: the least cosine with fp32's. With --cra, caption retrieval accuracy by precision and by the store's dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.records import open_records
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.models.batch_size_tuner import tune_batch_tokens
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.length_batching import default_batch_tokens
from llm2clip.models.precision import calibrate_precision
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.store.writer import stored_bytes

LLM2VEC = """
import torch
from transformers import PreTrainedTokenizerFast
from llm2vec import LLM2Vec
from llm2vec.models import LlamaBiModel
# The transformers that it pins reads merges, and the base of positions, only as they were once written.
state = json.load(open(folder + "/tokenizer.json"))
state["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
json.dump(state, open(folder + "/merges.json", "w"))
end = json.load(open(folder + "/tokenizer_config.json"))["eos_token"]
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=folder + "/merges.json", eos_token=end, pad_token=end, padding_side="left",
    model_input_names=["input_ids", "attention_mask"],
)
theta = json.load(open(folder + "/config.json"))["rope_parameters"]["rope_theta"]
model = LlamaBiModel.from_pretrained(folder, torch_dtype=torch.float32, rope_theta=theta)
encoder = LLM2Vec(model, tokenizer, pooling_mode="mean", max_length=512, skip_instruction=False)
ways = {"LLM2Vec.encode": lambda: encoder.encode(texts, show_progress_bar=False).numpy()}
"""
SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer
st = SentenceTransformer(folder)
ways = {
    "batches of 32 as they come": lambda: np.concatenate(
        [st.encode(texts[i:i + 32]) for i in range(0, len(texts), 32)]
    ),
    "SentenceTransformer.encode": lambda: st.encode(texts),
}
"""
PEER = """
import json, sys, time
import numpy as np
folder, texts, out = sys.argv[1:]
texts = json.load(open(texts))
{ways}
for line in sys.stdin:
    start = time.perf_counter()
    vectors = ways[line.strip()]()
    took = time.perf_counter() - start
    np.save(out, vectors)
    print(json.dumps(took), flush=True)
"""


class Peer:
    """Another's encoder in a process of its own."""

    def __init__(self, python: str, ways: str, folder: Path) -> None:
        self.out = folder / "theirs.npy"
        arguments = [str(folder / "encoder"), str(folder / "texts.json"), str(self.out)]
        self.process = subprocess.Popen(
            [python, "-c", PEER.replace("{ways}", ways), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, way: str) -> tuple[np.ndarray, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(way, file=self.process.stdin, flush=True)
        took = float(json.loads(self.process.stdout.readline()))
        return np.load(self.out), took


class Stored:
    """Vectors of texts, as they come back from a store."""

    def __init__(self, vectors: dict[str, np.ndarray], dtype: str) -> None:
        self.vectors, self.dtype = vectors, dtype

    def encode(self, captions: Sequence[str], *, progress: bool = False) -> Tensor:
        rows, scales = stored_bytes(np.stack([self.vectors[c] for c in captions]), self.dtype)
        return torch.from_numpy(rows.astype(np.float32) if scales is None else rows * scales[:, None])

    def count_truncated(self, captions: Sequence[str]) -> None:
        return None


def retrieval(encoder: CaptionEncoder, images: list[list[str]], precisions: Sequence[str]) -> Iterator[str]:
    texts = list(dict.fromkeys(c for captions in images for c in captions))
    for precision in precisions:
        vectors = encoder.encode(texts, precision=precision, progress=True).numpy()
        for dtype in ("float16", "int8"):
            found = caption_retrieval_accuracy(
                images, Stored(dict(zip(texts, vectors, strict=True)), dtype), progress=False
            )
            recalls = (found["first to second"]["R@10"] + found["second to first"]["R@10"]) / 2
            yield f"| {precision} | {dtype} | {found['CRA']:.2f} | {recalls:.2f} |"


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    padded = sum(max(lengths[i] for i in rows) * len(rows) for rows in batches)
    return 1 - sum(lengths) / padded


@onednn_matmul()
def product_peak(precision: str, tokens: int, width: int) -> float:
    """FLOP/s of a plain product of the sizes that the encoder's are."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(tokens, width, dtype=dtype), torch.randn(width, 4 * width, dtype=dtype)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * tokens * width * 4 * width / min(times)


def captions_of(sources: Sequence[str]) -> list[list[str]]:
    return [list(r.texts) for source in sources for r in open_records(source, image_check="ignore")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", nargs="*")
    parser.add_argument("--encoder", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--llm2vec", help="interpreter of an environment with llm2vec 0.2.3")
    parser.add_argument("--cra", help="captions to measure retrieval on")
    given = parser.parse_args()

    encoder = CaptionEncoder.from_pretrained(resolve_pretrained(given.encoder), layers=given.layers)
    auto = calibrate_precision(encoder)
    print(f"auto is {auto} for this encoder")
    if given.cra:
        print("| precision | store | CRA | R@10 |\n| --- | --- | --- | --- |")
        for row in retrieval(encoder, captions_of([given.cra]), list(dict.fromkeys(["fp32", "bf16", auto]))):
            print(row, flush=True)
    if not given.captions:
        sys.exit()

    everything = list(dict.fromkeys(text for texts in captions_of(given.captions) for text in texts))
    order = np.random.default_rng(0).permutation(len(everything))[: given.count]
    texts = [everything[i] for i in order]
    tokens = encoder.tokenize(texts)
    lengths = [len(ids) for ids in tokens.ids]
    print(f"{len(texts)} of {len(everything)} captions, {sum(lengths) / len(texts):.1f} tokens each; {encoder.device}")

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    encoder.save_pretrained(folder / "encoder")
    (folder / "texts.json").write_text(json.dumps(texts))
    keep_freed_memory(encoder.device)
    budgets: dict[str, int] = {}

    def ours(attention: str, precision: str) -> Callable[[], tuple[np.ndarray, float]]:
        def run() -> tuple[np.ndarray, float]:
            encoder.llm.set_attn_implementation(attention)
            start = time.perf_counter()
            budget = budgets.get(f"{attention}, {precision}")
            vectors = encoder.encode(texts, precision=precision, batch_tokens=budget)
            return vectors.numpy(), time.perf_counter() - start

        encoder.llm.set_attn_implementation(attention)
        budgets[f"{attention}, {precision}"] = tune_batch_tokens(encoder, tokens, precision)
        return run

    theirs = Peer(sys.executable, SENTENCE_TRANSFORMERS, folder)
    ways: dict[str, Callable[[], tuple[np.ndarray, float]]] = {
        name: lambda name=name: theirs.run(name)  # type: ignore[misc]
        for name in ("batches of 32 as they come", "SentenceTransformer.encode")
    }
    if given.llm2vec:
        llm2vec = Peer(given.llm2vec, LLM2VEC, folder)
        ways["LLM2Vec.encode"] = lambda: llm2vec.run("LLM2Vec.encode")
    ways |= {
        "here, padded, fp32": ours("sdpa", "fp32"),
        "here, packed, fp32": ours("packed", "fp32"),
        "here, padded, bf16": ours("sdpa", "bf16"),
        "here, packed, bf16": ours("packed", "bf16"),
    }
    if auto not in ("fp32", "bf16"):
        ways[f"here, packed, {auto}"] = ours("packed", auto)
    print("tokens in a batch, tried:", ", ".join(f"{way}: {n}" for way, n in budgets.items()))

    times: dict[str, list[float]] = {name: [] for name in ways}
    vectors: dict[str, np.ndarray] = {}
    for _ in range(given.turns):
        for name, run in ways.items():
            vectors[name], took = run()
            times[name].append(took)
            print(f"{name}: {len(texts) / took:.1f} captions/s", file=sys.stderr, flush=True)

    exact = torch.from_numpy(vectors["here, padded, fp32"])
    peers = [name for name in ways if not name.startswith("here")]
    columns = ["way", "captions/s, median (least to most)", *(f"against {p}" for p in peers), "least cosine with fp32"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, all_times in times.items():
        rates = sorted(len(texts) / t for t in all_times)
        cells = [name, f"{statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"]
        for peer in peers:
            ratios = sorted(p / t for p, t in zip(times[peer], all_times, strict=True))
            cells.append(f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        cosine = F.cosine_similarity(torch.from_numpy(vectors[name]).float(), exact).min()
        print(f"| {' | '.join([*cells, f'{cosine:.6f}'])} |")

    edges = [*range(0, len(texts), 32), len(texts)]
    share = 100 * padding_share(lengths, [range(a, b) for a, b in pairwise(edges)])
    budget = budgets["sdpa, fp32"]
    sorted_share = 100 * padding_share(lengths, [rows for _, rows in tokens.batches(budget)])
    print(f"padding: batches of 32 as they come {share:.0f}%; here, padded, {sorted_share:.1f}%; packed, none")
    blocks = sum(p.numel() for layer in encoder.llm.layers for p in layer.parameters() if p.ndim > 1)
    for precision in ("fp32", "bf16"):
        peak = product_peak(precision, default_batch_tokens(encoder.device), encoder.llm.config.hidden_size)
        done = 2 * blocks * sum(lengths) / statistics.median(times[f"here, packed, {precision}"])
        share = 100 * done / peak
        print(f"{precision}: {done / 1e9:.0f} GFLOP/s in the blocks' matrices, {share:.0f}% of a bare product's")

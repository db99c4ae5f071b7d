"""How fast captions are encoded: ways side by side in one run, turn by turn, with the same captions and weights.

    python benchmarks/embed.py CAPTIONS [CAPTIONS ...] [--encoder smollm2-135m] [--layers N] [--count 4096] [--turns 3]
        [--llm2vec PYTHON]

The captions of all sources are mixed. The ways: batches of 32 as they come, padded to their longest, as a loop does;
`SentenceTransformer.encode` at its defaults; LLM2Vec's `encode` at its defaults, in the environment whose interpreter
is PYTHON (`pip install torch llm2vec==0.2.3` there); and ours, padded and packed, in fp32, in bf16, and in what `auto`
chooses. Each is said with its spread over the turns and with what its vectors are worth: the least cosine with fp32's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from llm2clip.data.records import open_records
from llm2clip.models.batches import default_batch_tokens
from llm2clip.models.precision import calibrated
from llm2clip.models.text import CaptionEncoder
from llm2clip.quickstart.assets import resolve

LLM2VEC = """
import json, sys, time
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer
from llm2vec import LLM2Vec
from llm2vec.models import LlamaBiModel
folder, texts, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
tokenizer.model_input_names = ["input_ids", "attention_mask"]
model = LlamaBiModel.from_pretrained(folder, torch_dtype=torch.float32)
encoder = LLM2Vec(model, tokenizer, pooling_mode="mean", max_length=512, skip_instruction=False)
texts = json.load(open(texts))
for line in sys.stdin:
    start = time.perf_counter()
    vectors = encoder.encode(texts, show_progress_bar=False)
    took = time.perf_counter() - start
    np.save(out, vectors.numpy())
    print(json.dumps(took), flush=True)
"""


def padding_share(encoder: CaptionEncoder, texts: list[str], size: int) -> float:
    lengths = [len(ids) for ids in encoder.tokenize(texts).ids]
    padded = sum(max(lengths[i : i + size]) * len(lengths[i : i + size]) for i in range(0, len(lengths), size))
    return 1 - sum(lengths) / padded


def gemm_peak(precision: str, tokens: int, width: int) -> float:
    """FLOP/s of a plain product of the sizes that the encoder's are."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(tokens, width, dtype=dtype), torch.randn(width, 4 * width, dtype=dtype)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * tokens * width * 4 * width / min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--encoder", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--llm2vec", help="interpreter of an environment with llm2vec 0.2.3")
    given = parser.parse_args()

    encoder = CaptionEncoder.from_pretrained(resolve(given.encoder), layers=given.layers)
    everything = [t for source in given.captions for r in open_records(source, images="ignore") for t in r.texts]
    everything = list(dict.fromkeys(everything))
    order = np.random.default_rng(0).permutation(len(everything))[: given.count]
    texts = [everything[i] for i in order]
    tokens = sum(len(ids) for ids in encoder.tokenize(texts).ids)
    print(f"{len(texts)} captions, {tokens / len(texts):.1f} tokens each; {encoder.device}")

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    encoder.save_pretrained(folder / "encoder")
    theirs = SentenceTransformer(str(folder / "encoder"), model_kwargs={"attn_implementation": "sdpa"})

    def loop() -> np.ndarray:
        with torch.inference_mode():
            parts = []
            for start in range(0, len(texts), 32):
                ids = encoder.tokenize(texts[start : start + 32]).ids
                parts.append(encoder.st(encoder.features(ids))["sentence_embedding"])
            return torch.cat(parts).numpy()

    def ours(attention: str, precision: str) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            encoder.llm.set_attn_implementation(attention)
            return encoder.encode(texts, precision=precision).numpy()

        return run

    def padded_loop() -> np.ndarray:
        encoder.llm.set_attn_implementation("sdpa")
        return loop()

    ways: dict[str, Callable[[], np.ndarray]] = {
        "batches of 32 as they come": padded_loop,
        "SentenceTransformer.encode": lambda: theirs.encode(texts, convert_to_numpy=True),
        "here, padded, fp32": ours("sdpa", "fp32"),
        "here, packed, fp32": ours("packed", "fp32"),
        "here, padded, bf16": ours("sdpa", "bf16"),
        "here, packed, bf16": ours("packed", "bf16"),
    }
    if (auto := calibrated(encoder)) != "bf16":
        ways[f"here, packed, {auto}, which is auto"] = ours("packed", auto)
    if given.llm2vec:
        (folder / "texts.json").write_text(json.dumps(texts))
        peer = subprocess.Popen(
            [given.llm2vec, "-c", LLM2VEC, str(folder / "encoder"), str(folder / "texts.json"), str(folder / "l.npy")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        ways["LLM2Vec.encode"] = lambda: np.empty(0)

    times: dict[str, list[float]] = {name: [] for name in ways}
    vectors: dict[str, np.ndarray] = {}
    for _ in range(given.turns):
        for name, run in ways.items():
            if name == "LLM2Vec.encode":
                assert peer.stdin is not None and peer.stdout is not None
                print("go", file=peer.stdin, flush=True)
                took = float(json.loads(peer.stdout.readline()))
                vectors[name] = np.load(folder / "l.npy")
            else:
                start = time.perf_counter()
                vectors[name] = run()
                took = time.perf_counter() - start
            times[name].append(took)

    exact = torch.from_numpy(vectors["here, padded, fp32"])
    slowest = statistics.median(times["batches of 32 as they come"])
    print("| way | captions/s, median (least to most) | against the loop | least cosine with fp32 |")
    print("| --- | --- | --- | --- |")
    for name, took in times.items():
        rates = sorted(len(texts) / t for t in took)
        cosine = F.cosine_similarity(torch.from_numpy(vectors[name]).float(), exact).min()
        print(
            f"| {name} | {statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f}) | "
            f"{slowest / statistics.median(took):.2f}x | {cosine:.6f} |"
        )
    share = 100 * padding_share(encoder, texts, 32)
    print(f"padding, batches of 32 as they come: {share:.0f}% of their tokens; packed: none")
    blocks = sum(p.numel() for layer in encoder.llm.layers for p in layer.parameters() if p.ndim > 1)
    for precision in ("fp32", "bf16"):
        peak = gemm_peak(precision, default_batch_tokens(encoder.device), encoder.llm.config.hidden_size)
        done = 2 * blocks * tokens / statistics.median(times[f"here, packed, {precision}"])
        share = 100 * done / peak
        print(f"{precision}: {done / 1e9:.0f} GFLOP/s in the blocks' matrices, {share:.0f}% of a bare product's")

"""Measure the speed of caption encoding compared with other libraries, and the effect on retrieval accuracy.

    python benchmarks/embed.py CAPTIONS [CAPTIONS ...] [--encoder smollm2-135m] [--layers N] [--count 4096]
        [--repeats 3] [--llm2vec PYTHON] [--cra CAPTIONS@SPLIT]

A random sample of the captions from all sources is encoded with the same weights by each of these methods:

- `SentenceTransformer.encode` in unsorted batches of 32, padded to the longest caption, as in a plain loop;
- `SentenceTransformer.encode` with its default settings;
- `LLM2Vec.encode` with its default settings, run with the interpreter PYTHON from a separate environment
  (`pip install torch llm2vec==0.2.3`);
- llm2clip, padded and packed, in fp32, in bf16 and in the precision that `auto` chooses.

The methods alternate, and each of the other libraries runs in its own process. The table shows captions per second
(median and range), the speed relative to the other libraries, and the lowest cosine similarity to the fp32 embeddings.

With --cra, caption retrieval accuracy is measured for each precision and each dtype of the embedding store.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.records import open_records
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.models.precision import calibrate_precision
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import get_default_batch_tokens, tune_batch_tokens
from llm2clip.store.writer import quantize_rows

# Code that runs other libraries' encoders. It defines `methods`, a dict from names to functions that encode `texts`.
LLM2VEC = """
import torch
from transformers import PreTrainedTokenizerFast
from llm2vec import LLM2Vec
from llm2vec.models import LlamaBiModel
# The transformers version that llm2vec pins reads merges and the RoPE base only in their older form.
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
methods = {"LLM2Vec.encode": lambda: encoder.encode(texts, show_progress_bar=False).numpy()}
"""
SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer
st = SentenceTransformer(folder)
methods = {
    "unsorted batches of 32": lambda: np.concatenate(
        [st.encode(texts[i:i + 32]) for i in range(0, len(texts), 32)]
    ),
    "SentenceTransformer.encode": lambda: st.encode(texts),
}
"""
# Read method names from stdin, one per line. For each method, save the embeddings and print the time in seconds.
WORKER = """
import json, sys, time
import numpy as np
folder, texts, out = sys.argv[1:]
texts = json.load(open(texts))
{methods}
for line in sys.stdin:
    start = time.perf_counter()
    embeddings = methods[line.strip()]()
    seconds = time.perf_counter() - start
    np.save(out, embeddings)
    print(json.dumps(seconds), flush=True)
"""

Result = tuple[np.ndarray, float]  # (embeddings, time in seconds)
Method = Callable[[], Result]


class OtherLibrary:
    """Encoder from another library, which runs in its own process."""

    def __init__(self, python: str, methods: str, folder: Path) -> None:
        self.out = folder / "embeddings.npy"
        arguments = [str(folder / "encoder"), str(folder / "texts.json"), str(self.out)]
        code = WORKER.replace("{methods}", methods)
        self.process = subprocess.Popen(
            [python, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, method: str) -> Result:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(method, file=self.process.stdin, flush=True)
        seconds = float(json.loads(self.process.stdout.readline()))
        return np.load(self.out), seconds


def other_methods(folder: Path, llm2vec_python: str | None) -> dict[str, Method]:
    """Start the processes of the other libraries and return their encoding methods."""
    st = OtherLibrary(sys.executable, SENTENCE_TRANSFORMERS, folder)
    methods: dict[str, Method] = {
        "unsorted batches of 32": lambda: st.run("unsorted batches of 32"),
        "SentenceTransformer.encode": lambda: st.run("SentenceTransformer.encode"),
    }
    if llm2vec_python:
        llm2vec = OtherLibrary(llm2vec_python, LLM2VEC, folder)
        methods["LLM2Vec.encode"] = lambda: llm2vec.run("LLM2Vec.encode")
    return methods


def llm2clip_method(encoder: CaptionEncoder, texts: Sequence[str], attention: str, precision: str) -> Method:
    """Tune the number of tokens per batch, and return a function that encodes the texts."""
    encoder.llm.set_attn_implementation(attention)
    batch_tokens = tune_batch_tokens(encoder, encoder.tokenize(texts), precision)
    print(f"{attention}, {precision}: {batch_tokens} tokens per batch")

    def run() -> Result:
        encoder.llm.set_attn_implementation(attention)
        start = time.perf_counter()
        embeddings = encoder.encode(texts, precision=precision, batch_tokens=batch_tokens)
        return embeddings.numpy(), time.perf_counter() - start

    return run


def run_in_turn(
    methods: Mapping[str, Method], repeats: int, count: int
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Run each method `repeats` times. Return the times in seconds and the embeddings for each method."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    embeddings: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for name, method in methods.items():
            embeddings[name], elapsed = method()
            seconds[name].append(elapsed)
            print(f"{name}: {count / elapsed:.1f} captions/s", file=sys.stderr, flush=True)
    return seconds, embeddings


def print_speed_table(seconds: Mapping[str, Sequence[float]], embeddings: Mapping[str, np.ndarray]) -> None:
    exact = torch.from_numpy(embeddings["llm2clip, padded, fp32"])
    others = [name for name in seconds if not name.startswith("llm2clip")]
    columns = ["method", "captions/s, median (range)", *(f"relative to {o}" for o in others), "lowest cosine"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, elapsed in seconds.items():
        rates = sorted(len(exact) / s for s in elapsed)
        cells = [name, f"{statistics.median(rates):.1f} ({rates[0]:.1f} to {rates[-1]:.1f})"]
        for other in others:
            ratios = sorted(o / s for o, s in zip(seconds[other], elapsed, strict=True))
            cells.append(f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        cosine = F.cosine_similarity(torch.from_numpy(embeddings[name]).float(), exact).min()
        print(f"| {' | '.join([*cells, f'{cosine:.6f}'])} |")


def print_padding(encoder: CaptionEncoder, texts: Sequence[str]) -> None:
    """Print the share of padding tokens for unsorted batches of 32 and for batches of texts of similar length."""
    tokens = encoder.tokenize(texts)
    lengths = [len(ids) for ids in tokens.ids]
    unsorted = [range(start, stop) for start, stop in pairwise([*range(0, len(texts), 32), len(texts)])]
    by_length = [rows for _, rows in tokens.batches(get_default_batch_tokens(encoder.device))]
    print(
        f"padding: {padding_share(lengths, unsorted):.0%} in unsorted batches of 32; "
        f"{padding_share(lengths, by_length):.1%} in batches of texts of similar length; none when packed"
    )


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    padded = sum(max(lengths[i] for i in rows) * len(rows) for rows in batches)
    return 1 - sum(lengths) / padded


def print_efficiency(encoder: CaptionEncoder, texts: Sequence[str], seconds: Mapping[str, Sequence[float]]) -> None:
    """Print the FLOP/s in the matmuls with the layers' weights, relative to a plain matmul of similar size."""
    token_count = sum(len(ids) for ids in encoder.tokenize(texts).ids)
    weights = sum(p.numel() for layer in encoder.llm.layers for p in layer.parameters() if p.ndim > 1)
    hidden_size = encoder.llm.config.hidden_size
    for precision in ("fp32", "bf16"):
        peak = matmul_flops(precision, get_default_batch_tokens(encoder.device), hidden_size)
        flops = 2 * weights * token_count / statistics.median(seconds[f"llm2clip, packed, {precision}"])
        print(f"{precision}: {flops / 1e9:.0f} GFLOP/s in the layers' matmuls, {flops / peak:.0%} of a plain matmul")


@onednn_matmul()
def matmul_flops(precision: str, tokens: int, hidden_size: int) -> float:
    """Measure the FLOP/s of (tokens, hidden_size) @ (hidden_size, 4 * hidden_size)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(tokens, hidden_size, dtype=dtype), torch.randn(hidden_size, 4 * hidden_size, dtype=dtype)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * tokens * hidden_size * 4 * hidden_size / min(times)


class QuantizedEncoder:
    """A text encoder that returns precomputed embeddings after a round trip through a storage dtype."""

    def __init__(self, embeddings: dict[str, np.ndarray], dtype: str) -> None:
        self.embeddings, self.dtype = embeddings, dtype

    def encode(self, captions: Sequence[str], *, progress: bool = False) -> Tensor:
        rows, scales = quantize_rows(np.stack([self.embeddings[caption] for caption in captions]), self.dtype)
        return torch.from_numpy(rows.astype(np.float32) if scales is None else rows * scales[:, None])

    def count_truncated(self, captions: Sequence[str]) -> None:
        return None


def retrieval_rows(encoder: CaptionEncoder, images: list[list[str]], precisions: Sequence[str]) -> Iterator[str]:
    """Yield a table row with caption retrieval accuracy and R@10 for each precision and storage dtype."""
    texts = list(dict.fromkeys(caption for captions in images for caption in captions))
    for precision in precisions:
        embeddings = dict(zip(texts, encoder.encode(texts, precision=precision, progress=True).numpy(), strict=True))
        for dtype in ("float16", "int8"):
            result = caption_retrieval_accuracy(images, QuantizedEncoder(embeddings, dtype), progress=False)
            recall = (result["first to second"]["R@10"] + result["second to first"]["R@10"]) / 2
            yield f"| {precision} | {dtype} | {result['CRA']:.2f} | {recall:.2f} |"


def read_captions(sources: Sequence[str]) -> list[list[str]]:
    """Return the captions of each record in all sources."""
    return [list(record.texts) for source in sources for record in open_records(source, image_check="ignore")]


def sample_captions(sources: Sequence[str], count: int) -> list[str]:
    """Return a random sample of the distinct captions from all sources."""
    distinct = list(dict.fromkeys(text for texts in read_captions(sources) for text in texts))
    order = np.random.default_rng(0).permutation(len(distinct))[:count]
    print(f"using {len(order)} of {len(distinct)} distinct captions")
    return [distinct[i] for i in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", nargs="*")
    parser.add_argument("--encoder", default="smollm2-135m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llm2vec", help="Python interpreter from an environment with llm2vec 0.2.3")
    parser.add_argument("--cra", help="caption source for measuring retrieval accuracy")
    args = parser.parse_args()

    encoder = CaptionEncoder.from_pretrained(resolve_pretrained(args.encoder), layers=args.layers)
    auto = calibrate_precision(encoder)
    precisions = list(dict.fromkeys(["fp32", "bf16", auto]))
    print(f"precision chosen by `auto`: {auto}")
    if args.cra:
        print("| precision | store | CRA | R@10 |\n| --- | --- | --- | --- |")
        for row in retrieval_rows(encoder, read_captions([args.cra]), precisions):
            print(row, flush=True)
    if not args.captions:
        return

    texts = sample_captions(args.captions, args.count)
    keep_freed_memory(encoder.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoder.save_pretrained(folder / "encoder")
        (folder / "texts.json").write_text(json.dumps(texts))
        methods = other_methods(folder, args.llm2vec)
        for precision in precisions:
            if precision in ("fp32", "bf16"):
                methods[f"llm2clip, padded, {precision}"] = llm2clip_method(encoder, texts, "sdpa", precision)
            methods[f"llm2clip, packed, {precision}"] = llm2clip_method(encoder, texts, "packed", precision)
        seconds, embeddings = run_in_turn(methods, args.repeats, len(texts))
    print_speed_table(seconds, embeddings)
    print_padding(encoder, texts)
    print_efficiency(encoder, texts, seconds)


if __name__ == "__main__":
    main()

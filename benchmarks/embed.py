"""Measure the speed of caption encoding compared with other libraries.

    python benchmarks/embed.py CAPTIONS [CAPTIONS ...] [--llm2vec PYTHON]

2,048 random captions from all sources are encoded with the weights of SmolLM2-135M by each of these methods:

- `SentenceTransformer.encode` with its default settings;
- `LLM2Vec.encode` with its default settings, run by PYTHON in an environment with torch and llm2vec==0.2.3;
- llm2clip in fp32, in bf16 and in the precision that `auto` chooses.

The methods alternate, and each of the other libraries runs in its own process. The table shows captions per second
(median and range), and the lowest cosine similarity to llm2clip's fp32 embeddings without packing.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.data.records import open_records
from llm2clip.models.precision import calibrate_precision
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import PACKED, tune_batch_tokens
from shared import format_median, make_parser, print_header, print_row

# Code that loads other libraries' encoders. It defines `encode`, a function that encodes `texts`.
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
encode = lambda: encoder.encode(texts, show_progress_bar=False).numpy()
"""
SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer
st = SentenceTransformer(folder)
encode = lambda: st.encode(texts)
"""
# For each line of stdin, encode the texts, save the embeddings and print the time in seconds.
WORKER = """
import json, sys, time
import numpy as np
folder, texts, out = sys.argv[1:]
texts = json.load(open(texts))
{code}
for line in sys.stdin:
    start = time.perf_counter()
    embeddings = encode()
    seconds = time.perf_counter() - start
    np.save(out, embeddings)
    print(json.dumps(seconds), flush=True)
"""

ENCODER, COUNT, REPEATS = "smollm2-135m", 2048, 2
Result = tuple[np.ndarray, float]  # (embeddings, time in seconds)
Method = Callable[[], Result]


class OtherLibrary:
    """Encoder from another library, which runs in its own process."""

    def __init__(self, python: str, code: str, folder: Path) -> None:
        self.out = folder / "embeddings.npy"
        command = [python, "-c", WORKER.replace("{code}", code)]
        command += [str(folder / "encoder"), str(folder / "texts.json"), str(self.out)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def encode(self) -> Result:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        seconds = float(json.loads(self.process.stdout.readline()))
        return np.load(self.out), seconds


def llm2clip_method(encoder: CaptionEncoder, texts: Sequence[str], precision: str) -> Method:
    """Tune the number of tokens per batch, and return a function that encodes the texts."""
    batch_tokens = tune_batch_tokens(encoder, encoder.tokenize(texts), precision)

    def run() -> Result:
        start = time.perf_counter()
        embeddings = encoder.encode(texts, precision=precision, batch_tokens=batch_tokens)
        return embeddings.numpy(), time.perf_counter() - start

    return run


def sample_captions(sources: Sequence[str], count: int) -> list[str]:
    """Return a random sample of the distinct captions from all sources."""
    records = (record for source in sources for record in open_records(source, image_check="ignore"))
    distinct = list(dict.fromkeys(text for record in records for text in record.texts))
    order = np.random.default_rng(0).permutation(len(distinct))[:count]
    return [distinct[i] for i in order]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--llm2vec", help="Python interpreter of an environment with llm2vec 0.2.3")
    args = parser.parse_args()
    encoder = CaptionEncoder.from_pretrained(resolve_pretrained_name(ENCODER))
    texts = sample_captions(args.captions, COUNT)
    keep_freed_memory(encoder.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoder.save_pretrained(folder / "encoder")
        (folder / "texts.json").write_text(json.dumps(texts))
        methods: dict[str, Method] = {}
        methods["SentenceTransformer.encode"] = OtherLibrary(sys.executable, SENTENCE_TRANSFORMERS, folder).encode
        if args.llm2vec:
            methods["LLM2Vec.encode"] = OtherLibrary(args.llm2vec, LLM2VEC, folder).encode
        encoder.llm.set_attn_implementation("sdpa")
        exact = encoder.encode(texts, precision="fp32")
        encoder.llm.set_attn_implementation(PACKED)
        for precision in dict.fromkeys(["fp32", "bf16", calibrate_precision(encoder)]):
            methods[f"llm2clip, {precision}"] = llm2clip_method(encoder, texts, precision)
        rates: dict[str, list[float]] = {name: [] for name in methods}
        cosines: dict[str, float] = {}
        for _ in range(REPEATS):
            for name, method in methods.items():
                embeddings, seconds = method()
                rates[name].append(len(texts) / seconds)
                cosines[name] = float(F.cosine_similarity(torch.from_numpy(embeddings).float(), exact).min())
    print_header("method", "captions/s, median (range)", "lowest cosine")
    for name in methods:
        print_row(name, format_median(rates[name], ".1f"), f"{cosines[name]:.6f}")


if __name__ == "__main__":
    main()

"""What a step of tune costs, side by side, with the same texts and the same loss: passes of a fixed size padded to
their longest, passes of similar length, the same without padding; in fp32 and, where the device multiplies it, in bf16.
Padded ones with plain attention and with PyTorch's fused one; packed ones have an attention of their own.

    python benchmarks/tune.py CAPTIONS [--encoder smollm2-135m] [--layers 12] [--pairs 64] [--steps 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.data.pairs import ImageCaptions, pair_batches
from llm2clip.data.records import open_records
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.length_batching import default_batch_tokens
from llm2clip.models.packing import PACKED
from llm2clip.models.precision import resolve_device_precision
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.train.pair_loss import PairCollator, PairLoss

FIXED = 32  # texts in a pass, as trainers have it


class FixedPasses(PairLoss):
    """As usual: passes of so many texts in the order they come in, padded to the longest."""

    def _passes(self, tokens: list[list[int]], unpooled: list[int]) -> Iterator[tuple[list[int], Callable[[], Any]]]:
        for start in range(0, len(tokens), FIXED):
            rows = list(range(start, min(start + FIXED, len(tokens))))

            def run(rows: list[int] = rows) -> Any:
                return self.model(self._encoder[0].collate([tokens[r] for r in rows], 0))["sentence_embedding"].float()

            yield rows, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", help="source of records with short and long captions")
    parser.add_argument("--encoder", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()

    encoder = CaptionEncoder.from_pretrained(resolve_pretrained(given.encoder), layers=given.layers)
    encoder.llm.get_input_embeddings().requires_grad_(False)
    encoder.train()
    device = encoder.device
    keep_freed_memory(device)
    images = [ImageCaptions(r.captions, r.long_captions) for r in open_records(given.captions, image_check="ignore")]
    batches = list(pair_batches([images], [], given.pairs, given.steps + 1, seed=0))
    collator = PairCollator(preprocess_fn=encoder.tokenize)
    inputs = [collator([dataclasses.asdict(pair) for pair in batch]) for batch in batches]
    lengths = [len(ids) for batch in inputs for ids in batch["tokens"]]
    print(f"{2 * given.pairs} texts a step; tokens: median {statistics.median(lengths)}, longest {max(lengths)}")

    budget = default_batch_tokens(device)
    precisions = ["fp32"] + (["bf16"] if resolve_device_precision("auto", device) == "bf16" else [])
    ways = [
        (f"{kind}, {precision}", cls, attention, precision, "plain" in kind)
        for precision in precisions
        for kind, cls, attention in (
            ("fixed passes, padded, fused attention", FixedPasses, "sdpa"),
            ("fixed passes, padded, plain attention", FixedPasses, "sdpa"),
            ("similar lengths, padded, fused attention", PairLoss, "sdpa"),
            ("similar lengths, padded, plain attention", PairLoss, "sdpa"),
            ("similar lengths, packed: what tune does", PairLoss, PACKED),
        )
    ]
    times: dict[str, list[float]] = {name: [] for name, *_ in ways}
    losses: dict[str, float] = {}
    for step, batch in enumerate(inputs):  # turn by turn, so that whatever else the machine does meets all alike
        for name, cls, attention, precision, plain in ways:
            encoder.llm.set_attn_implementation(attention)
            loss = cls(encoder, 0.05, budget)
            start = time.perf_counter()
            with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    value = loss([batch])
                value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            encoder.zero_grad()
            losses[name] = value.item()
            if step:  # the first warms up
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times[ways[0][0]])
    print(
        "| forward and backward | captions/s | against the first | loss of the last step |\n| --- | --- | --- | --- |"
    )
    for name, *_ in ways:
        took = statistics.median(times[name])
        print(f"| {name} | {2 * given.pairs / took:.1f} | {base / took:.2f}x | {losses[name]:.4f} |")

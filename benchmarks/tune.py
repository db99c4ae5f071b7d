"""Measure the time of a `tune` step for several ways of batching the same texts with the same loss.

    python benchmarks/tune.py CAPTIONS [--pairs 48]

The texts of each step are encoded in three ways: in batches of 32, padded to the longest text; in length buckets,
padded; and in length buckets, packed without padding. Padded batches run with plain attention and with PyTorch's fused
attention. Packed batches use a separate attention function. Everything runs in fp32 and, if the CPU supports bf16
matmuls in hardware, also in bf16.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.data.pairs import ImageCaptions, iter_pair_batches
from llm2clip.data.records import open_records
from llm2clip.models.precision import has_bf16_hardware
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import PACKED, TokenizedTexts, get_default_batch_tokens
from llm2clip.train.tune import PairCollator, PairLoss

ENCODER, LAYERS, STEPS = "smollm2-135m", 12, 3
TEXTS_PER_BATCH = 32


class FixedBatches(TokenizedTexts):
    """Batches of a fixed number of texts, in the given order."""

    def batches(self, max_tokens: int) -> Iterator[tuple[int, list[int]]]:
        for start in range(0, len(self.ids), TEXTS_PER_BATCH):
            yield 0, list(range(start, min(start + TEXTS_PER_BATCH, len(self.ids))))


class FixedBatchLoss(PairLoss):
    """Loss that encodes a fixed number of texts per forward pass, in batch order, padded to the longest text."""

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        with patch("llm2clip.train.tune.TokenizedTexts", FixedBatches):
            return super().forward(features, labels)


@dataclass
class Method:
    """A method of batching the texts of a step, and its measurements."""

    name: str
    loss_class: type[PairLoss]
    attention: str
    precision: str
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0

    def run_step(self, encoder: CaptionEncoder, batch: dict[str, Any]) -> float:
        """Run a forward and a backward pass on a batch. Return the time in seconds."""
        device = encoder.device
        encoder.llm.set_attn_implementation(self.attention)
        loss_function = self.loss_class(encoder, 0.05, get_default_batch_tokens(device))
        start = time.perf_counter()
        with sdpa_kernel(SDPBackend.MATH) if "plain" in self.name else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = loss_function([batch])
            loss.backward()
        elapsed = time.perf_counter() - start
        encoder.zero_grad()
        self.loss = loss.item()
        return elapsed


def make_methods(device: torch.device) -> list[Method]:
    precisions = ["fp32", "bf16"] if has_bf16_hardware(device) else ["fp32"]
    kinds = [
        (f"batches of {TEXTS_PER_BATCH}, padded, fused attention", FixedBatchLoss, "sdpa"),
        (f"batches of {TEXTS_PER_BATCH}, padded, plain attention", FixedBatchLoss, "sdpa"),
        ("length buckets, padded, fused attention", PairLoss, "sdpa"),
        ("length buckets, padded, plain attention", PairLoss, "sdpa"),
        ("length buckets, packed (used by tune)", PairLoss, PACKED),
    ]
    return [
        Method(f"{name}, {precision}", loss_class, attention, precision)
        for precision in precisions
        for name, loss_class, attention in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", help="source with short and long captions")
    parser.add_argument("--pairs", type=int, default=48)
    args = parser.parse_args()

    encoder = CaptionEncoder.from_pretrained(resolve_pretrained_name(ENCODER), layers=LAYERS)
    encoder.llm.get_input_embeddings().requires_grad_(False)
    encoder.train()
    keep_freed_memory(encoder.device)
    images = [ImageCaptions(r.captions, r.long_captions) for r in open_records(args.captions, image_check="ignore")]
    collator = PairCollator(preprocess_fn=encoder.tokenize)
    batches = [
        collator([dataclasses.asdict(pair) for pair in pairs])
        for pairs in iter_pair_batches([images], args.pairs, STEPS + 1, seed=0)
    ]
    lengths = [len(ids) for batch in batches for ids in batch["tokens"]]
    print(
        f"{2 * args.pairs} texts per step; tokens per text: median {statistics.median(lengths)}, maximum {max(lengths)}"
    )

    methods = make_methods(encoder.device)
    for step, batch in enumerate(batches):
        for method in methods:  # alternate, so that other load on the machine affects all methods equally
            elapsed = method.run_step(encoder, batch)
            if step:  # the first step is a warm-up
                method.seconds.append(elapsed)
    base = statistics.median(methods[0].seconds)
    print("| forward and backward | captions/s | ratio | loss of the last step |\n| --- | --- | --- | --- |")
    for method in methods:
        seconds = statistics.median(method.seconds)
        rate = 2 * args.pairs / seconds
        print(f"| {method.name} | {rate:.1f} | {base / seconds:.2f}x | {method.loss:.4f} |")


if __name__ == "__main__":
    main()

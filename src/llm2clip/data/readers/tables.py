"""Readers for tables: Parquet files and Hugging Face data sets. Only the columns selected by `choose` are read."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.columns import UNREADABLE_FILE, BadRow, ColumnChooser, RawRow
from llm2clip.data.image_refs import (
    DatasetImage,
    ImageRef,
    LoadedImage,
    ParquetImage,
    check_row_group_sizes,
    choose_parquet_batch_size,
    compute_content_digest,
    disable_image_decoding,
)
from llm2clip.data.remote import get_local_path
from llm2clip.io_utils import DataFormatError, describe_error


def read_parquet(
    path: str, choose: ColumnChooser, image_bytes: bool, row_groups: range | None = None, first_row: int = 1
) -> Iterator[RawRow]:
    """Yield the rows in a Parquet file. Embedded images are returned as references to their cells.

    Args:
        choose: Function that selects which columns to read.
        image_bytes: If False, image columns that contain bytes are not read. From image columns that contain structs
            with bytes and a path, only the path is read.
        row_groups: Indexes of the row groups to read. Default: all row groups.
        first_row: Row number of the first row of these row groups.
    """
    row = total = first_row - 1
    try:
        with pq.ParquetFile(get_local_path(path), memory_map=True) as file:
            total = file.metadata.num_rows
            if row_groups is not None:
                total = row + sum(file.metadata.row_group(group).num_rows for group in row_groups)
            schema = file.schema_arrow
            selected = list(dict.fromkeys(choose(path, schema.names).values()))
            for name in selected:
                if schema.names.count(name) > 1:
                    problem = f"several columns are named {name!r}"
                    yield path, first_row, BadRow(UNREADABLE_FILE, problem, max(1, total - row))
                    return
            image_columns = {name for name in selected if _is_image_type(schema.field(name).type)}
            skipped: set[str] = set()
            if not image_bytes:
                skipped = {name for name in image_columns if not pa.types.is_struct(schema.field(name).type)}
            columns = []
            for name in selected:
                if name not in skipped:
                    columns.append(name if image_bytes or name not in image_columns else f"{name}.path")
            if image_bytes and image_columns:
                check_row_group_sizes(file.metadata)
            batch_size = choose_parquet_batch_size(file.metadata)
            for batch in file.iter_batches(batch_size, row_groups=row_groups, columns=columns, use_threads=False):
                for cells in zip(*map(_to_list, batch.columns), strict=True):
                    fields = dict(zip(batch.schema.names, cells, strict=True))
                    for name in image_columns - skipped:
                        make_ref = partial(ParquetImage, path, row, name)
                        fields[name] = _convert_image_cell(make_ref, fields[name], bytes_skipped=not image_bytes)
                    row += 1
                    yield path, row, fields
    except (pa.ArrowException, OSError, MemoryError) as error:
        yield path, row + 1, BadRow(UNREADABLE_FILE, describe_error(error), max(1, total - row))


def read_huggingface(name: str, saved: bool, choose: ColumnChooser, splits: Sequence[str] | None) -> Iterator[RawRow]:
    """Yield the rows in a Hugging Face data set. No code from the Hub is run.

    If `saved` is True, `name` is a folder written by `save_to_disk`, which supports random access. Otherwise, it
    is the name of a Hub data set, optionally followed by `:CONFIG`. Hub data sets are streamed: only the selected
    splits are downloaded, and the images are kept in memory. For `splits`, see `read_source`.
    """
    import datasets

    if saved:
        loaded = datasets.load_from_disk(name)
    else:
        hub_name, _, config = name.partition(":")
        loaded = datasets.load_dataset(hub_name, config or None, streaming=True)
    has_splits = isinstance(loaded, dict)
    parts = dict(loaded) if has_splits else {str(loaded.split) if loaded.split else None: loaded}
    selected = [split for split in splits or () if has_splits and split != "none"]
    if missing := [split for split in selected if split not in parts]:
        raise DataFormatError(f"{name} has no split {', '.join(missing)}; its splits: {', '.join(map(str, parts))}")
    for split, part in parts.items():
        if selected and split not in selected:
            continue
        file = os.path.join(name, split or "") if saved else f"hf:{name}/{split}"
        names = part.column_names or list(next(iter(part), {}))  # streamed data sets may not list their columns
        columns = list(dict.fromkeys(choose(file, names).values()))
        image_columns = [c for c in columns if part.features and isinstance(part.features.get(c), datasets.Image)]
        for row, fields in enumerate(disable_image_decoding(part.select_columns(columns))):
            if saved:
                for column in image_columns:
                    make_ref = partial(DatasetImage, name, split if has_splits else None, row, column)
                    fields[column] = _convert_image_cell(make_ref, fields[column])
            if splits is not None and split is not None:
                fields["split"] = split
            yield file, row + 1, fields


def _is_image_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _to_list(column: pa.Array) -> list[Any]:
    """Return the values of a column, as `Array.to_pylist` does, but faster for texts, lists of texts and images."""
    kind = column.type
    try:
        if _is_text_or_bytes(kind):
            return cast(list[Any], column.to_numpy(zero_copy_only=False).tolist())
        if pa.types.is_list(kind) and _is_text_or_bytes(kind.value_type) and not column.null_count:
            texts = _to_list(column.flatten())
            ends = np.cumsum(column.value_lengths().to_numpy()).tolist()
            return [texts[start:end] for start, end in pairwise([0, *ends])]
        if _is_image_type(kind) and kind.num_fields == 2 and not column.null_count:
            names = [kind.field(0).name, kind.field(1).name]
            cells = map(_to_list, column.flatten())
            return [dict(zip(names, values, strict=True)) for values in zip(*cells, strict=True)]
    except Exception:  # `to_pylist` raises the exception that describes the corrupt values
        pass
    return cast(list[Any], column.to_pylist())


def _is_text_or_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_binary(kind)


def _convert_image_cell(make_ref: Callable[[str], ImageRef], value: Any, bytes_skipped: bool = False) -> Any:
    """Convert a cell's value to None, the path of an image file, or a `LoadedImage` that refers to the cell.

    Args:
        make_ref: Function that creates a reference to the cell from the hash of its bytes.
        bytes_skipped: Whether the bytes were not read.
    """
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if value is None:
        return None
    if data is None and not bytes_skipped:
        return name  # the struct has no bytes, so its path refers to an image file
    if data is None:
        return LoadedImage(make_ref(""), None, name)
    return LoadedImage(make_ref(compute_content_digest(data)), data, name)

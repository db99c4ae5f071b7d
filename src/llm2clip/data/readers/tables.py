"""Tables as raw rows: parquet files and Hugging Face data sets. Only the columns that `choose` names are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.image_refs import DatasetImage, ParquetImage, content_digest, disable_image_decoding
from llm2clip.data.raw_rows import BadRow, ColumnChooser, LoadedImage, RawRow


def read_parquet(path: str, choose: ColumnChooser, image_bytes: bool) -> Iterator[RawRow]:
    """Rows in batches, the chosen columns only. An embedded image comes as a reference to its cell."""
    row = total = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            total = file.metadata.num_rows
            schema = file.schema_arrow
            wanted = list(dict.fromkeys(choose(path, schema.names).values()))
            cells = {name for name in wanted if _holds_bytes(schema.field(name).type)}
            unread = set() if image_bytes else {c for c in cells if not pa.types.is_struct(schema.field(c).type)}
            columns = [c if image_bytes or c not in cells else f"{c}.path" for c in wanted if c not in unread]
            size = 64 if cells and image_bytes else 1024
            for batch in file.iter_batches(batch_size=size, columns=columns, use_threads=False):
                for fields in batch.to_pylist():
                    for column in cells - unread:
                        fields[column] = _held(ParquetImage(path, row, column), fields[column], not image_bytes)
                    row += 1
                    yield path, row, fields
    except (pa.ArrowException, OSError) as error:
        yield path, row + 1, BadRow("unreadable file", str(error), max(1, total - row))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _held(ref: ParquetImage | DatasetImage, value: Any, unread: bool = False) -> Any:
    """The cell's value as records take it: nothing, a path, or bytes that `ref` finds again."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if value is None or (data is None and not unread):
        return name  # without bytes, a struct's path is that of a file
    return LoadedImage(ref if data is None else replace(ref, digest=content_digest(data)), data, name)


def read_huggingface(name: str, saved: bool, choose: ColumnChooser, splits: Sequence[str] | None) -> Iterator[RawRow]:
    """A folder written by `save_to_disk` (random access), or a hub name (streamed; images stay in memory).

    Of a hub data set only the splits asked for are fetched. No code from the hub is run.
    """
    import datasets

    if saved:
        loaded = datasets.load_from_disk(name)
    else:
        hub, _, config = name.partition(":")
        loaded = datasets.load_dataset(hub, config or None, streaming=True)
    several = isinstance(loaded, dict)
    parts = dict(loaded) if several else {str(loaded.split) if loaded.split else None: loaded}
    wanted = [split for split in splits or () if several and split != "none"]
    if absent := [split for split in wanted if split not in parts]:
        raise ValueError(f"{name} has no split {', '.join(absent)}; it has {', '.join(map(str, parts))}")
    for split, part in parts.items():
        if wanted and split not in wanted:
            continue
        file = os.path.join(name, split or "") if saved else f"hf:{name}/{split}"
        names = part.column_names or list(next(iter(part), {}))  # a stream may not know its columns
        columns = list(dict.fromkeys(choose(file, names).values()))
        images = [c for c in columns if part.features and isinstance(part.features.get(c), datasets.Image)]
        for row, fields in enumerate(disable_image_decoding(part.select_columns(columns))):
            for column in images:
                if saved:
                    fields[column] = _held(DatasetImage(name, split if several else None, row, column), fields[column])
            if splits is not None and split is not None:
                fields["split"] = split
            yield file, row + 1, fields

"""Readers for Parquet files and for datasets on the Hugging Face Hub.

Only the columns selected by `ReadOptions.choose_columns` are read.
"""

import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.formats import UNREADABLE_FILE, BadRow, FilePart, RawRow, ReadOptions, SourceFormat
from llm2clip.data.image_refs import LoadedImage, ParquetImage, compute_content_digest
from llm2clip.data.remote import open_file
from llm2clip.data.storage import is_remote
from llm2clip.data.table_cells import check_row_group_sizes, choose_parquet_batch_size
from llm2clip.io_utils import DataFormatError, describe_error


class ParquetFormat(SourceFormat):
    """Parquet file. Embedded images are yielded as references to their cells."""

    name = "parquet"
    suffixes = (".parquet",)
    is_shard = is_table = True

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        row = total = part.first_row - 1
        try:
            # The file is kept open while it is read, because open files are not removed from the remote file cache.
            with open_file(part.path) as source, pq.ParquetFile(source.name, memory_map=True) as file:
                total = file.metadata.num_rows
                row_groups = None
                if part.start or part.stop is not None:
                    row_groups = range(part.start, file.metadata.num_row_groups if part.stop is None else part.stop)
                    total = row + sum(file.metadata.row_group(group).num_rows for group in row_groups)
                schema = file.schema_arrow
                selected = list(dict.fromkeys(options.choose_columns(part.path, schema.names).values()))
                for name in selected:
                    if schema.names.count(name) > 1:
                        problem = f"several columns are named {name!r}"
                        yield part.path, part.first_row, BadRow(UNREADABLE_FILE, problem, max(1, total - row))
                        return
                image_columns = {name for name in selected if _is_image_column_type(schema.field(name).type)}
                columns = _list_leaf_columns(schema, selected, image_columns, options.image_bytes)
                if options.image_bytes and image_columns:
                    check_row_group_sizes(file.metadata)
                batch_size = choose_parquet_batch_size(file.metadata)
                for batch in file.iter_batches(batch_size, row_groups=row_groups, columns=columns, use_threads=False):
                    images_in_batch = image_columns.intersection(batch.schema.names)
                    for fields in batch.to_pylist():
                        for name in images_in_batch:
                            image = ParquetImage(part.path, row, name)
                            fields[name] = _convert_image_cell(image, fields[name], not options.image_bytes)
                        row += 1
                        yield part.path, row, fields
        except (pa.ArrowException, OSError, MemoryError) as error:
            yield part.path, row + 1, BadRow(UNREADABLE_FILE, describe_error(error), max(1, total - row))

    def find_part_starts(self, path: str, target_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (row group, row number) at the start of each part of at least `target_bytes` uncompressed bytes."""
        yield 0, 1
        if is_remote(path):  # splitting a remote file would require a download
            return
        metadata = pq.read_metadata(path)
        num_bytes, row = 0, 1
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            if group.num_rows < 0 or group.total_byte_size < 0:
                raise DataFormatError(f"{path}: row group {index} has a negative size")
            if num_bytes >= target_bytes:
                yield index, row
                num_bytes = 0
            row += group.num_rows
            num_bytes += group.total_byte_size


class HubDatasetFormat(SourceFormat):
    """Dataset on the Hugging Face Hub, specified as `NAME` or `NAME:CONFIG`. No code from the Hub is executed.

    The dataset is streamed, so only the selected splits are downloaded. The images are kept in memory.
    """

    name = "hf"
    is_table = True

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        import datasets

        hub_name, _, config = part.path.partition(":")
        splits = datasets.load_dataset(hub_name, config or None, streaming=True)
        selected = [split for split in options.splits or () if split != "none"]
        if missing := [split for split in selected if split not in splits]:
            raise DataFormatError(
                f"{part.path} has no split {', '.join(missing)}. Available splits: {', '.join(map(str, splits))}"
            )
        for split in (name for name in splits if not selected or name in selected):
            dataset, file = splits[split], f"hf:{part.path}/{split}"
            names = dataset.column_names or list(next(iter(dataset), {}))  # streamed datasets can lack column names
            columns = list(dict.fromkeys(options.choose_columns(file, names).values()))
            dataset = dataset.select_columns(columns)
            for column, feature in (dataset.features or {}).items():
                if isinstance(feature, datasets.Image):  # yield images as dicts with the keys "bytes" and "path"
                    dataset = dataset.cast_column(column, datasets.Image(decode=False))
            for row, fields in enumerate(dataset):
                if options.splits is not None:
                    fields["split"] = split
                yield file, row + 1, fields

    def compute_version(self, path: str) -> str:
        """Return the commit hash of the dataset, or "offline" if the Hub cannot be reached."""
        from huggingface_hub import HfApi

        repository = path.partition(":")[0]
        if os.path.isdir(repository):
            return super().compute_version(repository)
        try:
            return str(HfApi().dataset_info(repository).sha)
        except Exception:  # reading the dataset reports the error, unless the dataset is cached
            return "offline"


def _list_leaf_columns(schema: pa.Schema, names: Sequence[str], images: Set[str], image_bytes: bool) -> list[str]:
    """Return the Parquet columns to read. If `image_bytes` is False, read only the paths in image columns."""
    leaves = []
    for name in names:
        if image_bytes or name not in images:
            leaves.append(name)
        elif pa.types.is_struct(schema.field(name).type):
            leaves.append(f"{name}.path")
    return leaves


def _is_image_column_type(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _convert_image_cell(image: ParquetImage, value: Any, bytes_skipped: bool) -> Any:
    """Convert the value of an image cell to None, the path of an image file, or a `LoadedImage`."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if value is None:
        return None
    if data is not None:
        return LoadedImage(replace(image, digest=compute_content_digest(data)), data, name)
    # A struct without bytes contains the path of an image file.
    return LoadedImage(image, None, name) if bytes_skipped else name

"""Random access to images in the cells of Parquet and Arrow files.

The size of decoded data is limited, because a file of a few hundred bytes can expand to many gigabytes. Decoded cells
are cached per version of a file; see `image_refs.get_file_version`.
"""

import functools
import io
import os
from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.remote import open_file
from llm2clip.io_utils import CHECKSUM_BYTES

MAX_ROW_GROUP_BYTES = 2 << 30  # limit on the number of bytes that are decoded to reach a cell in a row group
MAX_BATCH_BYTES = 256 << 20  # approximate limit on the size of the rows decoded in one batch
MAX_WINDOW_BYTES = 128 << 20  # approximate limit on the size of the adjacent cells that are cached with a cell
MAX_CACHE_BYTES = 256 << 20  # limit on the total size of the cached cells, per process
MAX_CELL_BYTES = 256 << 20  # size limit for an image in a table cell


@dataclass(frozen=True)
class _DecodedCellWindow:
    """Consecutive decoded cells in a row group."""

    start: int  # index of the first cell in the row group
    cells: pa.ChunkedArray
    num_bytes: int


_windows: OrderedDict[tuple[object, ...], _DecodedCellWindow] = OrderedDict()  # from least to most recently used


def read_parquet_cell(path: str, version: object, row: int, column: str) -> pa.Scalar:
    """Return a cell of a Parquet file. Decoded cells are cached up to a total size of `MAX_CACHE_BYTES`.

    No lock is used, because a process that is forked while another thread holds the lock would wait forever.
    """
    starts, batch_size = _read_row_group_layout(path, version)
    group = bisect_right(starts, row) - 1
    row -= starts[group]
    key = (path, version, group, column)
    window = _windows.pop(key, None)
    if window is None or not window.start <= row < window.start + len(window.cells):
        window = _decode_cell_window(path, group, column, row, batch_size)
    _windows[key] = window
    while len(_windows) > 64 or sum(w.num_bytes for w in list(_windows.values())) > MAX_CACHE_BYTES:
        _windows.popitem(last=False)
    return window.cells[row - window.start]


@functools.lru_cache(maxsize=1024)
def _read_row_group_layout(path: str, version: object) -> tuple[list[int], int]:
    """Return the number of the first row in each row group, and the number of rows to decode at a time."""
    with open_file(path) as source, pq.ParquetFile(source) as file:
        metadata = file.metadata
    starts = [0]
    for group in range(metadata.num_row_groups - 1):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return starts, choose_parquet_batch_size(metadata)


def _decode_cell_window(path: str, group: int, column: str, row: int, batch_size: int) -> _DecodedCellWindow:
    """Decode a row group up to the given row, plus as many of the following rows as fit in `MAX_WINDOW_BYTES`."""
    # The file is reopened and read without threads, because shared file handles and threads can deadlock after a fork.
    batches: deque[pa.Array] = deque()
    start = num_bytes = num_decoded = 0
    with open_file(path) as source, pq.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size, row_groups=[group], columns=[column], use_threads=False):
            index = batch.schema.get_field_index(column)  # the batch may contain other columns, such as "image.x"
            if index < 0:
                raise OSError(f"{path} must have exactly one column named {column!r}")
            cells = batch.column(index)
            batches.append(cells)
            num_bytes += cells.nbytes
            num_decoded += cells.nbytes
            while num_bytes > MAX_WINDOW_BYTES and start + len(batches[0]) <= row:
                start += len(batches[0])
                num_bytes -= batches.popleft().nbytes
            is_decoded = row < start + sum(map(len, batches))
            if is_decoded and num_bytes > MAX_WINDOW_BYTES:
                break
            if not is_decoded and num_decoded > MAX_ROW_GROUP_BYTES:
                raise _build_row_group_error(group)
    if row >= start + sum(map(len, batches)):
        raise FileNotFoundError(f"{path} no longer has row {row} in row group {group}")
    return _DecodedCellWindow(start, pa.chunked_array(batches), num_bytes)


def choose_parquet_batch_size(metadata: pq.FileMetaData) -> int:
    """Return a safe number of rows to decode at a time, at most 64. A value can be as large as its row group."""
    return max(1, min(64, MAX_BATCH_BYTES // max([1, *_list_row_group_bytes(metadata)])))


def check_row_group_sizes(metadata: pq.FileMetaData) -> None:
    """Raise OSError if, according to its metadata, a Parquet file has a row group larger than `MAX_ROW_GROUP_BYTES`."""
    for group, num_bytes in enumerate(_list_row_group_bytes(metadata)):
        if num_bytes > MAX_ROW_GROUP_BYTES:
            raise _build_row_group_error(group)


def _list_row_group_bytes(metadata: pq.FileMetaData) -> list[int]:
    # Column sizes are not used, because `RowGroupMetaData.column` crashes the process if the metadata is corrupt.
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def _build_row_group_error(group: int) -> OSError:
    return OSError(
        f"the images in row group {group} take more than {MAX_ROW_GROUP_BYTES:,} bytes. Rewrite the file with smaller "
        "row groups, such as 100 rows each"
    )


def memory_map_arrow_file(path: str) -> pa.RecordBatchFileReader:
    """Memory-map an Arrow file that ends with a checksum; see `append_checksum`."""
    return pa.ipc.open_file(pa.memory_map(path), footer_offset=os.path.getsize(path) - CHECKSUM_BYTES)


def map_batches(path: str) -> list[pa.RecordBatch]:
    reader = memory_map_arrow_file(path)
    return [reader.get_batch(n) for n in range(reader.num_record_batches)]


memory_map_cached_batches = functools.lru_cache(maxsize=1024)(map_batches)


def open_image_cell(cell: pa.Scalar, name: str) -> BinaryIO:
    """Open the image in a table cell, which contains bytes or a struct with bytes. Raise OSError if it has no bytes.

    Paths in cells are not opened, because they could refer to any file on the machine.
    """
    data = cell.get("bytes") if isinstance(cell, pa.StructScalar) else cell
    if data is None or not data.is_valid:
        raise FileNotFoundError(f"{name} does not contain the bytes of an image")
    data = data.as_buffer()
    size = data.size
    if size > MAX_CELL_BYTES:
        raise OSError(f"image too large: {size:,} bytes; the limit for a table cell is {MAX_CELL_BYTES:,} bytes")
    return io.BytesIO(data)

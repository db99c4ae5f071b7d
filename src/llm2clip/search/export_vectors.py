"""Export of an index to a Parquet file, for import into other vector databases."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from llm2clip.io_utils import atomic_path
from llm2clip.progress import ProgressBar
from llm2clip.search.backends import INDEX_FILE, open_backend
from llm2clip.search.metadata import CONTENT_FIELDS, IMAGE_FIELDS

ROWS_PER_GROUP = 2000  # only one row group is in memory at a time
TYPES = {float: pa.float64(), int: pa.int64(), str: pa.string()}


def export_vectors(index: str, out: str | Path, with_private: bool = False) -> int:
    """Write one row per distinct image to a new Parquet file. Return the number of rows.

    Captions and metadata come from the first location of each image. If `with_private` is True, GPS positions are
    also exported. The metadata of the index, such as the model name, is stored in the Parquet schema. Raise
    FileExistsError if `out` exists.
    """
    if Path(out).exists():
        raise FileExistsError(f"{out} already exists. Choose another file")
    backend, file = open_backend(index), Path(index, INDEX_FILE)  # an index in PostgreSQL does not have this file
    inode = file.exists() and file.stat().st_ino
    metadata, texts = backend.read_metadata(), pa.list_(pa.string())
    columns: dict[str, Any] = {"id": pa.int64(), "vector": pa.list_(pa.float32(), int(metadata["embed_dim"]))}
    columns |= {"name": pa.string(), "names": texts, "captions": texts, "text": pa.string()}
    content_fields, image_fields = (
        [field for field in fields if with_private or not field.is_private] for fields in (CONTENT_FIELDS, IMAGE_FIELDS)
    )
    columns |= {field.name: TYPES[field.type] for field in (*content_fields, *image_fields)}
    schema = pa.schema(list(columns.items()), {"llm2clip": json.dumps(metadata)})
    bar = ProgressBar(total=backend.count_images()[1], desc="export", unit="image")
    count, last_id = 0, "0"
    with bar, atomic_path(out) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        while ids := backend.list_hit_ids(last_id, ROWS_PER_GROUP):
            rows, vectors = [], backend.read_vectors(ids)
            for hit in backend.read_hits(ids):
                image = hit.images[0]
                row: dict[str, Any] = {"id": int(hit.id), "vector": vectors.get(hit.id), "text": hit.text}
                row |= {"name": image.name, "names": [image.name for image in hit.images], "captions": image.captions}
                row |= {field.name: getattr(hit, field.name) for field in content_fields}
                row |= {field.name: getattr(image, field.name) for field in image_fields}
                rows.append(row)
            writer.write_table(pa.Table.from_pylist(rows, schema))
            bar.update(len(rows))
            count, last_id = count + len(rows), ids[-1]
        if inode != (file.exists() and file.stat().st_ino):
            raise OSError(f"{index} was replaced during the export. Run the export again")
    return count

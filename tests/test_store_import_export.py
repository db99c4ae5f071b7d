"""Export and import of stores as Parquet files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.store.encode import embed
from llm2clip.store.import_export import export_parquet, import_parquet
from llm2clip.store.layout import StoreError
from llm2clip.store.store import EmbeddingStore

CAPTIONS = [f"caption number {i} of some" for i in range(50)]
IDENTITY = {"weights": "abc", "layers": 3}


def test_parquet_round_trip_and_damage(encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(CAPTIONS, encoder, tmp_path / "store", shard_size=16)
    export_parquet(store, tmp_path / "all.parquet")
    imported = import_parquet(tmp_path / "all.parquet", tmp_path / "imported")
    assert imported.manifest["identity"] == store.manifest["identity"]
    assert np.array_equal(imported.take(imported.find_rows(CAPTIONS)), store.take(store.find_rows(CAPTIONS)))
    again = import_parquet(tmp_path / "all.parquet", tmp_path / "imported")
    assert len(again.shards) == len(imported.shards), "importing again adds nothing"
    with pytest.raises(StoreError, match="different encoder"):
        import_parquet(tmp_path / "all.parquet", tmp_path / "other", IDENTITY)

    file = tmp_path / "store/embeddings-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="corrupt"):
        export_parquet(store, tmp_path / "damaged.parquet")
    assert not (tmp_path / "damaged.parquet").exists()


def test_import_parquet_reads_captions_without_metadata(tmp_path: Path) -> None:
    file = tmp_path / "captions.parquet"
    pq.write_table(pa.table({"caption": [" a", "b "], "embedding": [[1.0, 2.0], [3.0, 4.0]]}), file)
    with pytest.raises(StoreError, match="does not name the encoder"):
        import_parquet(file, tmp_path / "unnamed")
    store = import_parquet(file, tmp_path / "store", IDENTITY)
    assert store.take(store.find_rows(["b"])).tolist() == [[3, 4]], "captions are stripped, as in records"


def test_import_parquet_rejects_incomplete_rows(tmp_path: Path) -> None:
    file = tmp_path / "bad.parquet"
    ragged, null = [[1.0, 2.0, 3.0], [4.0]], pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    for embedding in (ragged, null):
        pq.write_table(pa.table({"caption": ["a", "b"], "embedding": embedding}), file)
        with pytest.raises(StoreError, match="a row without an embedding"):
            import_parquet(file, tmp_path / "store", IDENTITY)
    pq.write_table(pa.table({"key": [b"short"], "embedding": [[1.0]]}), file)
    with pytest.raises(StoreError, match="keys must be the first 16 bytes"):
        import_parquet(file, tmp_path / "store", IDENTITY)
    pq.write_table(pa.table({"caption": ["a", "b"]}), file)
    with pytest.raises(StoreError, match="must have an embedding column and a key or caption column"):
        import_parquet(file, tmp_path / "store")

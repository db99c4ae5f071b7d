"""A store as parquet and as the official tars, there and back."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.store.encode import embed
from llm2clip.store.import_export import export_official_tars, export_parquet, import_official_tars, import_parquet
from llm2clip.store.layout import StoreError

CAPTIONS = [f"caption number {i} of some" for i in range(50)]
IDENTITY = {"weights": "abc", "layers": 3}


def test_parquet_there_and_back(encoder: CaptionEncoder, tmp_path: Path) -> None:
    store = embed(CAPTIONS, encoder, tmp_path / "store", shard_size=16)
    export_parquet(store, tmp_path / "all.parquet")
    back = import_parquet(tmp_path / "all.parquet", tmp_path / "back")
    assert back.manifest["identity"] == store.manifest["identity"]
    assert np.array_equal(back.take(back.rows(CAPTIONS)), store.take(store.rows(CAPTIONS)))
    assert len(import_parquet(tmp_path / "all.parquet", tmp_path / "back").shards) == len(back.shards)
    table = pa.table({"caption": ["a", "b"], "embedding": [[1.0, 2.0], [3.0, 4.0]]})
    pq.write_table(table, tmp_path / "theirs.parquet")
    with pytest.raises(StoreError, match="does not say which encoder"):
        import_parquet(tmp_path / "theirs.parquet", tmp_path / "theirs")
    table = pa.table({"caption": [" a", "b "], "embedding": [[1.0, 2.0], [3.0, 4.0]]})  # records strip captions, too
    pq.write_table(table, tmp_path / "theirs.parquet")
    theirs = import_parquet(tmp_path / "theirs.parquet", tmp_path / "theirs", IDENTITY)
    assert theirs.take(theirs.rows(["b"])).tolist() == [[3, 4]]
    with pytest.raises(StoreError, match="another encoder"):
        import_parquet(tmp_path / "all.parquet", tmp_path / "other", IDENTITY)
    ragged, gap = [[1.0, 2.0, 3.0], [4.0]], pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    for embedding in (ragged, gap):
        pq.write_table(pa.table({"caption": ["a", "b"], "embedding": embedding}), tmp_path / "bad.parquet")
        with pytest.raises(StoreError, match="a row without"):
            import_parquet(tmp_path / "bad.parquet", tmp_path / "bad", IDENTITY)
    pq.write_table(pa.table({"key": [b"short"], "embedding": [[1.0]]}), tmp_path / "bad.parquet")
    with pytest.raises(StoreError, match="a key is 16 bytes"):
        import_parquet(tmp_path / "bad.parquet", tmp_path / "bad", IDENTITY)
    vectors = tmp_path / "store/embeddings-00000.npy"
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="damaged"):
        export_parquet(store, tmp_path / "damaged.parquet")
    assert not (tmp_path / "damaged.parquet").exists()
    pq.write_table(table.select(["caption"]), tmp_path / "bad.parquet")
    with pytest.raises(StoreError, match="needed are embedding"):
        import_parquet(tmp_path / "bad.parquet", tmp_path / "bad")


def test_the_official_tars_there_and_back(encoder: CaptionEncoder, tmp_path: Path) -> None:
    """As their code reads them: the same samples in the same order, raw float32 by name."""
    samples = {f"{n:04d}": {k: [f"{k} {n % 5}"] for k in ("shortSV_captions", "longSV_captions")} for n in range(12)}
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        for name, captions in samples.items():
            for suffix, data in (("jpg", b"..."), ("json", json.dumps(captions).encode())):
                info = tarfile.TarInfo(f"./{name}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    texts = list(dict.fromkeys(c[0] for s in samples.values() for c in s.values()))
    store = embed(texts, encoder, tmp_path / "store")
    assert export_official_tars(store, [tmp_path / "00.tar"]) == [tmp_path / "00_text_embeddings.tar"]
    with tarfile.open(tmp_path / "00_text_embeddings.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert [m.split(".")[0] for m in members][::2] == list(samples)
    raw = np.frombuffer(members["0007.longsv_captions"], np.float32)
    assert np.array_equal(raw, store.take(store.rows(["longSV_captions 2"]))[0])
    back = import_official_tars([tmp_path / "00.tar"], tmp_path / "back", store.manifest["identity"])
    assert len(back) == 10
    assert np.array_equal(back.take(back.rows(texts)), store.take(store.rows(texts)))
    (tmp_path / "01.tar").write_bytes((tmp_path / "00.tar").read_bytes())
    with tarfile.open(tmp_path / "01_text_embeddings.tar", "w"):
        pass
    with pytest.raises(StoreError, match="not a pair"):
        import_official_tars([tmp_path / "01.tar"], tmp_path / "bad", IDENTITY)
    with tarfile.open(tmp_path / "00.tar") as whole, tarfile.open(tmp_path / "00a.tar", "w") as tar:
        for member in list(whole)[:-2]:
            tar.addfile(member, whole.extractfile(member))
    (tmp_path / "00a_text_embeddings.tar").write_bytes((tmp_path / "00_text_embeddings.tar").read_bytes())
    with pytest.raises(StoreError, match="0011, which"):
        import_official_tars([tmp_path / "00a.tar"], tmp_path / "longer", IDENTITY)
    with tarfile.open(tmp_path / "02.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(StoreError, match="0 has no JSON of captions"):
        export_official_tars(store, [tmp_path / "02.tar"])

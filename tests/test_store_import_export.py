"""Export and import of stores: Parquet, and the tar files of the official LLM2CLIP code."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.store.encode import embed
from llm2clip.store.import_export import export_official_tars, export_parquet, import_official_tars, import_parquet
from llm2clip.store.layout import StoreError
from llm2clip.store.store import EmbeddingStore

CAPTIONS = [f"caption number {i} of some" for i in range(50)]
IDENTITY = {"weights": "abc", "layers": 3}
SAMPLES = {f"{n:04d}": {f: [f"{f} {n % 5}"] for f in ("shortSV_captions", "longSV_captions")} for n in range(12)}
SAMPLE_CAPTIONS = list(dict.fromkeys(captions[0] for sample in SAMPLES.values() for captions in sample.values()))


# ---- Parquet -------------------------------------------------------------------------------------------------------


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


# ---- tar files of the official code --------------------------------------------------------------------------------


@pytest.fixture
def store(encoder: CaptionEncoder, tmp_path: Path) -> EmbeddingStore:
    """A store of the captions of SAMPLES."""
    return embed(SAMPLE_CAPTIONS, encoder, tmp_path / "store")


def write_samples(tar: Path, samples: Mapping[str, object]) -> None:
    """Write samples of an image and a JSON of captions each."""
    with tarfile.open(tar, "w") as stream:
        for name, captions in samples.items():
            for suffix, data in (("jpg", b"..."), ("json", json.dumps(captions).encode())):
                info = tarfile.TarInfo(f"./{name}.{suffix}")
                info.size = len(data)
                stream.addfile(info, io.BytesIO(data))


def test_official_tars_round_trip(store: EmbeddingStore, tmp_path: Path) -> None:
    """As the official code reads them: the same samples in the same order, raw float32 by name."""
    write_samples(tmp_path / "00.tar", SAMPLES)
    assert export_official_tars(store, [tmp_path / "00.tar"]) == [tmp_path / "00_text_embeddings.tar"]
    with tarfile.open(tmp_path / "00_text_embeddings.tar") as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert [name.split(".")[0] for name in members][::2] == list(SAMPLES)
    embedding = np.frombuffer(members["0007.longsv_captions"], np.float32)
    assert np.array_equal(embedding, store.take(store.find_rows(["longSV_captions 2"]))[0])
    imported = import_official_tars([tmp_path / "00.tar"], tmp_path / "imported", store.manifest["identity"])
    assert len(imported) == 10
    assert np.array_equal(
        imported.take(imported.find_rows(SAMPLE_CAPTIONS)), store.take(store.find_rows(SAMPLE_CAPTIONS))
    )


def test_export_official_tars_does_not_overwrite_files(store: EmbeddingStore, tmp_path: Path) -> None:
    for name in ("00", "01"):
        write_samples(tmp_path / f"{name}.tar", SAMPLES)
    (tmp_path / "01_text_embeddings.tar").write_bytes(b"from the authors' code")
    with pytest.raises(StoreError, match=r"already exist: .*01_text_embeddings\.tar"):
        export_official_tars(store, [tmp_path / "00.tar", tmp_path / "01.tar"])
    assert (tmp_path / "01_text_embeddings.tar").read_bytes() == b"from the authors' code"
    assert not (tmp_path / "00_text_embeddings.tar").exists()  # nothing is written before all files are checked


def test_import_official_tars_rejects_tars_that_are_not_a_pair(store: EmbeddingStore, tmp_path: Path) -> None:
    write_samples(tmp_path / "00.tar", SAMPLES)
    export_official_tars(store, [tmp_path / "00.tar"])
    embeddings = (tmp_path / "00_text_embeddings.tar").read_bytes()

    write_samples(tmp_path / "01.tar", SAMPLES)
    with tarfile.open(tmp_path / "01_text_embeddings.tar", "w"):
        pass  # no embeddings at all
    with pytest.raises(StoreError, match="two tar files do not match"):
        import_official_tars([tmp_path / "01.tar"], tmp_path / "missing", IDENTITY)

    write_samples(tmp_path / "02.tar", dict(list(SAMPLES.items())[:-1]))
    (tmp_path / "02_text_embeddings.tar").write_bytes(embeddings)
    with pytest.raises(StoreError, match="has sample 0011, which"):
        import_official_tars([tmp_path / "02.tar"], tmp_path / "extra", IDENTITY)


def test_export_official_tars_rejects_a_sample_without_captions(store: EmbeddingStore, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(StoreError, match="sample 0 has no valid JSON file with captions"):
        export_official_tars(store, [tmp_path / "00.tar"])

"""Files that earlier releases have written can be read, and files in newer formats are rejected.

Each folder fixtures/formats-X.Y contains files written by one release; see `stored_format_fixtures.py`.
"""

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModel

from caption_fixtures import FixedCaptioner, read_rows
from llm2clip import CaptionEncoder, Index, __version__
from llm2clip.caption.database import CaptionDatabase
from llm2clip.caption.options import CaptionOptions
from llm2clip.caption.run import caption_images
from llm2clip.cli import build_parser
from llm2clip.data.images import load_image
from llm2clip.data.transforms import EvalTransform, PreprocessConfig
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.runs.checkpoint import CheckpointManager, load_training_state
from llm2clip.runs.output_folder import FormatVersionError
from llm2clip.search.backends import open_backend
from llm2clip.search.index import SearchOptions
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.store.encode import embed
from llm2clip.store.layout import check_identity
from llm2clip.store.maintenance import repair_store
from llm2clip.store.store import EmbeddingStore
from postgres_fixtures import get_postgres_server
from search_fixtures import BACKENDS, index_sources, make_postgres_url
from stored_format_fixtures import (
    CAPTIONS,
    FIXTURES,
    POSTGRES_SCHEMA,
    PROMPT,
    SIGNATURE,
    make_checkpoint,
    make_exports,
    make_layer,
    make_model,
    make_stores,
    make_student,
    train_layer,
)

CPU = torch.device("cpu")
RELEASES = sorted(FIXTURES.glob("formats-*"))


@pytest.fixture(params=RELEASES, ids=lambda folder: folder.name)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the files that a release has written."""
    return Path(shutil.copytree(request.param, tmp_path / "release"))


@pytest.fixture
def expected(release: Path) -> dict[str, np.ndarray]:
    """Embeddings of the photos and captions that the release has computed."""
    return {name: np.array(values) for name, values in json.loads((release / "expected.json").read_text()).items()}


def load_photos(release: Path, transform: Callable[[Any], Any]) -> list[Any]:
    return [transform(load_image(photo)) for photo in sorted((release / "photos").iterdir())]


def test_stored_models_return_the_same_embeddings(release: Path, expected: dict[str, np.ndarray]) -> None:
    for name, texts in (("model", "texts"), ("student", "student")):
        model = open_dual_encoder(str(release / name), CPU)
        assert model.llm2clip is not None and model.llm2clip.training_images.tolist() == [1, 2]
        assert model.encode_texts(CAPTIONS).numpy() == pytest.approx(expected[texts], abs=1e-4)
        images = model.encode_images(load_photos(release, model.transform)).numpy()
        assert images == pytest.approx(expected["images"], abs=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_stored_captions_are_found_and_others_can_be_added(release: Path, dtype: str) -> None:
    folder, encoder = release / f"store-{dtype}", CaptionEncoder.from_pretrained(release / "model", device=CPU)
    store = EmbeddingStore(folder)
    store.verify()
    check_identity(store.manifest["identity"], encoder.identity(), folder)
    embeddings = encoder.encode(CAPTIONS).numpy()
    assert store.take(store.find_rows(CAPTIONS)) == pytest.approx(embeddings, abs=2e-2)
    store = embed([*CAPTIONS, "a blue car"], encoder, folder, dtype=dtype, device=CPU)
    assert len(store) == 4 and store.find_rows(CAPTIONS).tolist() == [0, 1, 2]


def restore_postgres_index(file: Path) -> str:
    """Create the index that a file with SQL statements describes. Return its URL."""
    url = make_postgres_url(file.parent)  # skips the test if there is no server
    import psycopg

    schema = url.rpartition("=")[2]
    with psycopg.connect(get_postgres_server().url("").partition("?")[0]) as connection:
        for extension in ("vector", "pg_trgm"):
            connection.execute(f"CREATE EXTENSION IF NOT EXISTS {extension}")
        connection.execute(file.read_text().replace(POSTGRES_SCHEMA, schema))
    return url


@pytest.mark.parametrize("kind", BACKENDS)
def test_stored_index_is_searched_and_extended(release: Path, expected: dict[str, np.ndarray], kind: str) -> None:
    model = open_dual_encoder(str(release / "model"), CPU)
    is_folder = kind == "sqlite"
    location = str(release / "index") if is_folder else restore_postgres_index(release / "index-postgres.sql")
    index = Index.open(location, model)
    scores = expected["texts"][1] @ expected["images"].T
    order = np.argsort(-scores)
    hits = index.search(CAPTIONS[1], options=SearchOptions(group_similar=False)).hits
    assert [hit.images[0].file_name for hit in hits] == [f"000{n}.png" for n in order]
    assert [hit.score for hit in hits] == pytest.approx(scores[order], abs=1e-3)
    rows = read_rows(release / "captions.jsonl")
    assert [list(hit.images[0].captions) for hit in hits] == [rows[n]["captions"] for n in order]
    backend = open_backend(location, write=True)
    index_sources([release / "photos"], model, backend)
    assert backend.count() == (6, 3)


def test_stored_captioning_run_asks_nothing_again(release: Path) -> None:
    captioner, file = FixedCaptioner(), release / "captions.jsonl"
    written = file.read_text()
    caption_images([str(release / "photos")], file, captioner, [PROMPT], CaptionOptions())
    assert captioner.num_answers == 0 and file.read_text() == written


def test_stored_checkpoint_is_resumed(release: Path) -> None:
    checkpoints = CheckpointManager(release / "run/align/checkpoints")
    checkpoints.check_signature(SIGNATURE)
    assert checkpoints.step == 2 and checkpoints.latest is not None
    resumed, uninterrupted = make_layer(), make_layer()
    train_layer(*uninterrupted, steps=3)
    load_training_state(checkpoints.latest, *resumed)
    train_layer(*resumed, steps=1)
    assert torch.allclose(resumed[0].weight, uninterrupted[0].weight, atol=1e-6)


def test_stored_run_config_is_a_valid_config_file(release: Path) -> None:
    parser, _ = build_parser()
    args = parser.parse_args(["fit", "--out", "out", "--config", str(release / "run/config.yaml")]).fit
    saved = yaml.safe_load((release / "run/config.yaml").read_text())
    for name, value in saved.items():
        settings = args[name].as_dict() if isinstance(value, dict) and name != "columns" else args[name]
        assert settings == value or settings.items() >= value.items(), name


@pytest.mark.usefixtures("modules_cache")
def test_stored_exports_return_the_same_embeddings(release: Path, expected: dict[str, np.ndarray]) -> None:
    exported = SentenceTransformer(str(release / "export-sentence-transformers"), trust_remote_code=True, device="cpu")
    assert exported.encode(CAPTIONS, normalize_embeddings=True) == pytest.approx(expected["texts"], abs=1e-4)
    tower = LLM2CLIP.from_pretrained(release / "model", CPU).tower
    pixels = torch.stack(load_photos(release, EvalTransform(tower.preprocess)))
    clip = AutoModel.from_pretrained(release / "export-sentence-transformers", trust_remote_code=True)
    with torch.no_grad():
        embeddings = F.normalize(clip.get_image_features(tower._normalize_pixels(pixels)).pooler_output, dim=-1)
    assert embeddings.numpy() == pytest.approx(expected["images"], abs=1e-4)
    vision = AutoModel.from_pretrained(release / "export-vision")
    with torch.no_grad():
        features = vision(tower._normalize_pixels(pixels)).last_hidden_state
        assert torch.allclose(features, tower.forward_features(pixels), atol=1e-5)


def test_stored_onnx_graphs_return_the_same_embeddings(release: Path, expected: dict[str, np.ndarray]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = release / "export-onnx"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0, pad_token="")
    texts = tokenizer.encode_batch(CAPTIONS)
    tokens = {"input_ids": [text.ids for text in texts], "attention_mask": [text.attention_mask for text in texts]}
    preprocess = PreprocessConfig.from_dict(json.loads((folder / "preprocessor_config.json").read_text()))
    pixels = torch.stack(load_photos(release, EvalTransform(preprocess))).numpy()
    for name, inputs, values in (
        ("text", tokens, expected["texts"]),
        ("vision", {"pixels": pixels}, expected["images"]),
    ):
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        assert session.run(["embeddings"], inputs)[0] == pytest.approx(values, abs=1e-4)


# Files whose keys only llm2clip chooses. Those of the other JSON files depend on the versions of the libraries.
OWN_FILES = (
    "model/config.json",
    "student/config.json",
    "store-*/*.json",
    "run/align/checkpoints/*/complete",
    "run/align/checkpoints/*/state.json",
    "export-sentence-transformers/config.json",
)


def read_forms(folder: Path) -> dict[str, object]:
    """Return the keys of llm2clip's JSON files and the text of each Python file, keyed by path."""
    forms: dict[str, object] = {}
    for file in [file for pattern in OWN_FILES for file in folder.glob(pattern)]:
        values = json.loads(file.read_text())
        if file.name == "config.json":
            values["tower"].pop("args", None)  # the keys depend on timm's version
        if file.parent.name == "export-sentence-transformers":
            del values["text"]  # transformers' config of the LLM
        forms[file.relative_to(folder).as_posix()] = list_keys(values)
    for file in folder.rglob("*.py"):
        forms[file.relative_to(folder).as_posix()] = file.read_text()
    for file in folder.rglob("config_sentence_transformers.json"):
        forms[file.relative_to(folder).as_posix()] = json.loads(file.read_text()).get("requirements")
    return forms


def list_keys(value: object) -> object:
    if isinstance(value, dict):
        return {key: list_keys(item) for key, item in value.items()}
    return [list_keys(item) for item in value[:1]] if isinstance(value, list) else None


@pytest.mark.skipif(
    RELEASES[-1].name != f"formats-{__version__.rpartition('.')[0]}", reason="the formats belong to an earlier release"
)
def test_stored_files_have_the_form_that_this_version_writes(tmp_path: Path) -> None:
    """Files that were stored before the last change of a format would not test what the release writes."""
    model_folder = make_model(tmp_path / "out/model", tmp_path)
    make_student(tmp_path / "out/student", model_folder)
    make_exports(tmp_path / "out", model_folder)
    make_stores(tmp_path / "out", model_folder)
    make_checkpoint(tmp_path / "out/run/align/checkpoints")
    forms = read_forms(tmp_path / "out")
    assert len(forms) > len(OWN_FILES)
    assert forms == read_forms(RELEASES[-1]), "delete the folder, and run stored_format_fixtures.py"


# ---- newer formats ---------------------------------------------------------------------------------------------------


def set_json(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99, "files": ["of another form"]}))


def set_sqlite(file: Path) -> None:
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA user_version = 99")


def set_parquet(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({b"format_version": b"99"}), file)


@pytest.mark.parametrize(
    ("file", "set_version", "open_file"),
    [
        ("model/config.json", set_json, LLM2CLIP.from_pretrained),
        ("model/config.json", set_json, CaptionEncoder.from_pretrained),
        ("student/config.json", set_json, lambda folder: open_dual_encoder(str(folder))),
        ("store-int8/manifest.json", set_json, EmbeddingStore),
        ("store-int8/manifest.json", set_json, repair_store),
        ("store-int8/keys-00001.parquet", set_parquet, repair_store),
        ("index/index.sqlite", set_sqlite, Index.open),
        ("index/index.sqlite", set_sqlite, lambda folder: SqliteBackend(folder, write=True)),
        ("captions.jsonl.sqlite", set_sqlite, lambda folder: CaptionDatabase(folder / "captions.jsonl.sqlite")),
        ("run/align/checkpoints/checkpoint-2/complete", set_json, lambda folder: CheckpointManager(folder.parent)),
    ],
)
def test_newer_format_is_rejected_and_left_unchanged(
    file: str, set_version: Callable[[Path], None], open_file: Callable[[Path], object], tmp_path: Path
) -> None:
    path = shutil.copytree(RELEASES[-1], tmp_path / "newer") / file
    set_version(path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = rf"/{file} has format version 99, but .* reads only format version \d\. Update llm2clip: pip install"
    with pytest.raises(FormatVersionError, match=message):
        open_file(path.parent)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before

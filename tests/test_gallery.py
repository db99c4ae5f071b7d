"""Galleries: static web pages that search an index in the browser, and the ONNX text encoders they use.

The page runs in the system's Chromium, served by a plain static file server.
"""

import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

from conftest import HANG_TIMEOUT
from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage
from llm2clip.models import pretrained
from llm2clip.models.dual_encoder import wrap_llm2clip
from llm2clip.models.export import export_model
from llm2clip.models.export.onnx import export_text_encoder
from llm2clip.models.export.transformers import build_tokenizer
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.pretrained import AssetError, AssetUnavailableError, NpmPackage, resolve_npm_package
from llm2clip.models.prompts import QueryTemplates, is_short_text
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.search import gallery
from llm2clip.search.gallery import export_gallery, quantize_vectors
from llm2clip.search.types import IndexedContent, IndexedImage
from page_fixtures import on_both_devices, wait_until
from search_fixtures import BACKENDS, create_backend, make_index

WORDS = ("a", "dog", "red", "green", "blue", "picture", "of", "the", "middle", "is", "##s", "half", "1", ",", ".")
TEXTS = [
    "red",
    "a dog",
    "The middle of the picture is GREEN, the dogs are blue.",
    " a  red\n half ",
    "Äpfel, naïve café",
    "一只猫坐在窗台上",
    "red " * 60,
    "the green half of a blue picture, 1 dog. " * 5,
]
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def make_word_tokenizer() -> Any:
    """Build a lower-casing WordPiece tokenizer like BERT's, with letters and a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    letters = [chr(code) for code in range(ord("b"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters, *(f"##{letter}" for letter in ["a", *letters[:17]])]
    vocab = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return tokenizer


def make_student(folder: Path, embed_dim: int = 16) -> LLM2CLIP:
    """Build a random model with a BERT encoder and a dense layer instead of an adapter."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    tokenizer = make_word_tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
    )
    bert = BertModel(config)
    for parameter in bert.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    bert.save_pretrained(folder / "bert")
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "bert")
    st = SentenceTransformer(modules=[Transformer(str(folder / "bert"), max_seq_length=32), Pooling(32, "mean")])
    st.append(Dense(32, embed_dim, activation_function=torch.nn.Identity()))
    st.save_pretrained(str(folder / "st"))
    encoder = CaptionEncoder.from_pretrained(folder / "st", device="cpu")
    model = wrap_encoder(encoder, embed_dim)
    model.config.query_templates = QueryTemplates(("a picture of a {}", "the {}."), 2)
    model.config.encoder = encoder.identity()
    return model


def wrap_encoder(encoder: Any, embed_dim: int) -> LLM2CLIP:
    tower = VisionTower.from_pretrained("test_efficientnet", image_size=32, pretrained=False)
    config = LLM2CLIPConfig(tower.config, embed_dim, embed_dim, AdapterConfig(depth=0))
    return LLM2CLIP(config, tower, encoder).eval()


def run_onnx(file: Path, model: LLM2CLIP, texts: list[str]) -> np.ndarray:
    """Encode texts with an ONNX graph and the exported tokenizer."""
    import onnxruntime

    tokens = build_tokenizer(model.encoder)(texts, padding=True, truncation=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    inputs = {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    return np.asarray(session.run(None, inputs)[0])


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    return make_student(folder).save_pretrained(folder / "model")


@pytest.fixture(scope="module")
def index_folder(tmp_path_factory: pytest.TempPathFactory, student_folder: Path, image_folder: Path) -> Path:
    """Index of 36 images with captions."""
    folder = tmp_path_factory.mktemp("index")
    model = LLM2CLIP.from_pretrained(student_folder, "cpu")
    make_index(folder, image_folder / "captions.jsonl", wrap_llm2clip(model, str(student_folder)))
    return folder


@pytest.fixture(scope="module")
def gallery_folder(tmp_path_factory: pytest.TempPathFactory, student_folder: Path, index_folder: Path) -> Path:
    """Exported gallery. Skips the test if the JavaScript libraries are unavailable."""
    for package in (pretrained.ONNXRUNTIME_WEB, pretrained.TOKENIZERS):
        try:
            resolve_npm_package(package)
        except AssetUnavailableError as error:
            pytest.skip(str(error))
    out = tmp_path_factory.mktemp("gallery") / "out"
    export_gallery(str(student_folder), str(index_folder), out)
    return out


# ---- text encoder ---------------------------------------------------------------------------------------------------


def test_onnx_export_of_an_encoder_with_a_dense_layer(tmp_path: Path) -> None:
    model = make_student(tmp_path)
    messages = export_model(model, "onnx", tmp_path / "out", int8=True)
    assert "text.onnx: the minimum cosine similarity to PyTorch's embeddings is 1.0000" in messages[2]
    assert "text-int8.onnx: mean cosine similarity 0.9" in messages[3]
    expected = model.encode_text(TEXTS).numpy()
    np.testing.assert_allclose(run_onnx(tmp_path / "out/text.onnx", model, TEXTS), expected, atol=1e-5)
    assert ((run_onnx(tmp_path / "out/text-int8.onnx", model, TEXTS) * expected).sum(1) > 0.9).all()


def test_onnx_export_of_a_static_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    static = StaticEmbedding(make_word_tokenizer(), embedding_dim=24)
    encoder = CaptionEncoder(SentenceTransformer(modules=[static, Dense(24, 48), Dense(48, 16)], device="cpu"))
    model = wrap_encoder(encoder, 16)
    export_text_encoder(model, tmp_path)
    np.testing.assert_allclose(
        run_onnx(tmp_path / "text.onnx", model, TEXTS), model.encode_text(TEXTS).numpy(), atol=1e-5
    )


def test_weight_quantization_rounds_only_weights(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from llm2clip.models.export.onnx import quantize_onnx_weights

    model = make_student(tmp_path)
    export_text_encoder(model, tmp_path)
    quantize_onnx_weights(tmp_path / "text.onnx", tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    original = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "text.onnx").graph.initializer}
    rounded = [name for name in original if f"{name}_int8" in stored]
    assert "llm.embeddings.word_embeddings.weight" in rounded and len(rounded) > 12
    for name in rounded:
        scales = stored[f"{name}_scales"]
        error = np.abs(stored[f"{name}_int8"] * scales - original[name])
        assert stored[f"{name}_int8"].dtype == np.int8 and (error <= scales / 2 + 1e-7).all(), name
    expected = model.encode_text(TEXTS).numpy()
    assert ((run_onnx(tmp_path / "int8.onnx", model, TEXTS) * expected).sum(1) > 0.999).all()


# ---- folder ---------------------------------------------------------------------------------------------------------


def decode_vectors(mean: np.ndarray, scales: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Convert the content of vectors.bin to float64 vectors of shape (N, D), with an FFT."""
    transformed = np.fft.fft(mean + scales[:, None].astype(np.float64) * values, norm="ortho")
    return np.asarray(transformed.real - transformed.imag)  # the Hartley transform is its own inverse


def read_vectors(file: Path, count: int, dim: int) -> np.ndarray:
    """Return the vectors in vectors.bin, of shape (count, dim), float64."""
    floats, values = np.split(np.fromfile(file, np.int8), [4 * (dim + count)])
    mean, scales = np.split(floats.view("<f4"), [dim])
    return decode_vectors(mean, scales, values.reshape(count, dim))


def test_quantized_vectors_are_close_to_the_vectors() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 65)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    mean, scales, values = quantize_vectors(vectors)
    assert values.dtype == np.int8 and scales.dtype == mean.dtype == np.float32
    assert (np.abs(values).max(axis=1) == 127).all()
    errors = decode_vectors(mean, scales, values) - vectors
    assert (np.linalg.norm(errors, axis=1) < np.sqrt(65) * scales).all()
    assert (np.linalg.norm(errors, axis=1) < 0.02).all()
    for equal in (vectors[:1], vectors[[0, 0, 0]]):
        np.testing.assert_allclose(decode_vectors(*quantize_vectors(equal)), equal, atol=1e-6)


@pytest.mark.parametrize("common_energy", [0.0, 0.8])
def test_quantized_vectors_find_the_same_images_in_principal_components(common_energy: float) -> None:
    """As in aligned models, the first dimension is common to all vectors, and the others become smaller and smaller."""
    rng, dim = np.random.default_rng(0), 256

    def make_vectors(values: np.ndarray) -> np.ndarray:
        values = values * np.arange(1, dim) ** -0.5
        values *= np.sqrt(1 - common_energy) / np.linalg.norm(values, axis=1, keepdims=True)
        return np.pad(values, ((0, 0), (1, 0)), constant_values=np.sqrt(common_energy))

    values = rng.normal(size=(4000, dim - 1))
    vectors = make_vectors(values)
    queries = make_vectors(0.35 * values[:100] + rng.normal(size=(100, dim - 1)))
    decoded = decode_vectors(*quantize_vectors(vectors.astype(np.float32)))
    exact, approximate = (np.argsort(-(queries @ items.T))[:, :10] for items in (vectors, decoded))
    overlap = np.mean([np.isin(first, second).mean() for first, second in zip(exact, approximate, strict=True)])
    assert overlap > 0.98


def test_gallery_contains_everything_and_no_paths(gallery_folder: Path, image_folder: Path) -> None:
    settings = json.loads((gallery_folder / "gallery.json").read_text())
    assert settings["count"] == 36 and len(settings["images"]) == 36
    assert len(list((gallery_folder / "thumbnails").iterdir())) == 36
    assert (gallery_folder / "vectors.bin").stat().st_size == 4 * 16 + 36 * (16 + 4)
    names = {name for name, *_ in settings["images"]}
    assert names == {f"{n}.png" for n in range(36)}
    assert "Apache" in (gallery_folder / "lib/tokenizers-LICENSE.txt").read_text()
    assert "onnxruntime-web" in (gallery_folder / "LICENSES.txt").read_text()
    for file in gallery_folder.rglob("*.j*"):
        if file.suffix in (".json", ".js"):
            assert str(image_folder) not in file.read_text() and str(Path.home()) not in file.read_text()


def test_gallery_is_updated_in_place(
    gallery_folder: Path, student_folder: Path, index_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update replaces the gallery's files, also after an interrupted update, and leaves other files unchanged."""
    settings = (gallery_folder / "gallery.json").read_text()
    assert json.loads(settings)["title"] == "out"
    others = [gallery_folder / ".git/config", gallery_folder / "thumbnails/my.jpg"]
    stale = [gallery_folder / "thumbnails/36.jpg", gallery_folder / ".new/gallery.json"]
    for file in (*others, *stale):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (gallery_folder / "gallery.json").write_text("{}")
    monkeypatch.setattr(gallery, "export_quantized_text_encoder", lambda model, folder: "text encoder")
    export_gallery(str(student_folder), str(index_folder), gallery_folder)
    assert (gallery_folder / "gallery.json").read_text() == settings
    assert all(file.exists() for file in others) and not any(file.exists() for file in stale)
    assert not (gallery_folder / ".new").exists() and (gallery_folder / "text.onnx").exists()
    others[1].unlink()


def test_wide_ranges_match_python() -> None:
    ranges = gallery._find_wide_character_ranges()
    for text in ("一只猫", "カメラ犬", "café", "🙂🙂", "a dog", "한국어 개"):
        wide = sum(any(first <= ord(c) <= last for first, last in ranges) for c in text)
        assert (wide <= 6 and len(text.split()) <= 3) == is_short_text(text)


def export_arguments(model: Path, index: Path, out: Path) -> list[str]:
    return ["export", str(model), "--to", "gallery", "--index", str(index), "--out", str(out)]


def test_gallery_rejects_bad_input(
    tmp_path: Path,
    student_folder: Path,
    index_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> str:
        assert main(list(arguments)) != 0
        return capsys.readouterr().err

    out = tmp_path / "out"
    good = export_arguments(student_folder, index_folder, out)
    assert "requires --index" in run("export", str(student_folder), "--to", "gallery", "--out", str(out))
    onnx = ["export", str(student_folder), "--to", "onnx", "--out", str(out)]
    assert "--index cannot be used with --to onnx, which exports a model" in run(*onnx, "--index", str(index_folder))
    assert "--max_mb cannot be used with --to onnx, which exports a model" in run(*onnx, "--max_mb", "5")
    assert "--dim cannot be used with --to gallery" in run(*good, "--dim", "8")
    assert not out.exists()
    assert "is not an index" in run(*export_arguments(student_folder, tmp_path / "missing", out))

    other = make_student(tmp_path / "other", embed_dim=8).save_pretrained(tmp_path / "other/model")
    assert "the index was built with a different model" in run(*export_arguments(other, index_folder, out))

    message = run(*good, "--max_mb", "0.01")
    assert "36 images (thumbnails" in message and "vectors 0.8 kB" in message and "--max_mb" in message

    monkeypatch.setattr(gallery, "MAX_TEXT_PARAMETERS", 1000)
    message = run(*good)
    assert "too large for a browser" in message and "llm2clip distill" in message

    monkeypatch.setattr(gallery, "MAX_TEXT_PARAMETERS", 10**6)

    def fail(*arguments: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(gallery, "resolve_npm_package", lambda package: tmp_path)
    monkeypatch.setattr(gallery, "_write_gallery_images", fail)
    monkeypatch.setattr(gallery.shutil, "copyfile", lambda source, target: None)
    assert "the disk is full" in run(*good)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name], "nothing is left behind"
    out.mkdir()
    (out / "file").touch()
    assert "does not contain a gallery. Choose another folder" in run(*good)


@pytest.mark.parametrize("kind", BACKENDS)
def test_gallery_images_come_from_every_backend(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "HITS_PER_READ", 3)
    backend = create_backend(kind, tmp_path / "index")
    backend.initialize({"model": "none", "embed_dim": 8, "fingerprint": "0" * 64})
    vectors = np.eye(8, dtype=np.float16)
    for number, vector in enumerate(vectors):
        digest = hashlib.sha256(bytes([number])).digest()
        path = f"https://host/{number}.jpg" if number else str(tmp_path / "0.jpg")
        image = IndexedImage(path, FileImage(path), str(tmp_path), "1", (f"caption {number}",), taken=1.0)
        backend.add_images([IndexedContent(digest, vector, bytes([number]), width=10, height=20)], [(image, digest)])
    backend.finish_indexing()
    (tmp_path / "out").mkdir()
    images = gallery._write_gallery_images(backend, tmp_path / "out", with_private=False)
    assert sorted(image[:2] for image in images) == [[f"{number}.jpg", f"caption {number}"] for number in range(8)]
    for name, _, details in images:
        original = [] if name == "0.jpg" else [["original", f"https://host/{name}"]]
        assert details[0] == ["10 × 20", ""] and details[2:] == original
    decoded = read_vectors(tmp_path / "out/vectors.bin", 8, 8)
    for position, (name, *_) in enumerate(images):
        assert (tmp_path / f"out/thumbnails/{position}.jpg").read_bytes() == bytes([int(name[0])])
        np.testing.assert_allclose(decoded[position], vectors[int(name[0])], atol=0.01)


def test_gallery_requires_images(tmp_path: Path, student_folder: Path) -> None:
    model = LLM2CLIP.from_pretrained(student_folder, "cpu")
    (tmp_path / "images").mkdir()
    index = make_index_without_images(tmp_path, wrap_llm2clip(model, str(student_folder)))
    with pytest.raises(ValueError, match="contains no images"):
        export_gallery(str(student_folder), str(index), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def make_index_without_images(folder: Path, model: Any) -> Path:
    from llm2clip.models.loading import fingerprint
    from llm2clip.search.sqlite_backend import SqliteBackend

    backend = SqliteBackend(folder / "empty", write=True)
    backend.initialize({"model": model.name, "fingerprint": fingerprint(model.identity()), "embed_dim": 16})
    return folder / "empty"


# ---- JavaScript libraries -------------------------------------------------------------------------------------------


def test_npm_packages_and_cached_files_with_another_hash_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    files, hashes = {"index.js": "b.js"}, {"b.js": hashlib.sha256(b"code").hexdigest()}
    package = NpmPackage("@a/b", "1.0.0", "0" * 86 + "==", "MIT", "https://example.org", 0.1, files, hashes)
    monkeypatch.setattr(pretrained, "get_cache_dir", lambda: tmp_path / "cache")
    source = tmp_path / "index.js"
    source.write_text("code")

    def pack(command: list[str], **options: Any) -> Any:
        with tarfile.open(Path(command[-1]) / "a-b-1.0.0.tgz", "w:gz") as tar:
            tar.add(source, "package/index.js")
        return SimpleNamespace(stdout="", stderr="")

    monkeypatch.setattr(pretrained.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(pretrained.subprocess, "run", pack)
    with pytest.raises(AssetError, match=r"the sha512 hash of a-b-1.0.0.tgz must be"):
        resolve_npm_package(package)
    assert list((tmp_path / "cache/npm").iterdir()) == []
    monkeypatch.setattr(pretrained, "_check_file_hash", lambda *arguments: None)
    for _ in range(2):  # downloaded, then from the cache
        file = resolve_npm_package(package) / "b.js"
        assert file.read_text() == "code"
    file.write_text("changed")
    with pytest.raises(AssetError, match=r"b.js is missing or differs from .*delete .*a-b-1.0.0"):
        resolve_npm_package(package)


def test_npm_problems_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "get_cache_dir", lambda: tmp_path)
    result = SimpleNamespace(stdout="", stderr="npm error code ENOTFOUND")
    monkeypatch.setattr(pretrained.subprocess, "run", lambda *args, **options: result)
    monkeypatch.setattr(pretrained.shutil, "which", lambda name: "/usr/bin/npm")
    with pytest.raises(AssetUnavailableError, match=r"ENOTFOUND\n.*npm view onnxruntime-web@"):
        resolve_npm_package(pretrained.ONNXRUNTIME_WEB)
    monkeypatch.setattr(pretrained.shutil, "which", lambda name: None)
    with pytest.raises(AssetUnavailableError, match=r"requires npm.*Install Node.js"):
        resolve_npm_package(pretrained.ONNXRUNTIME_WEB)


# ---- page -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(gallery_folder: Path) -> Iterator[str]:
    """Address of a static file server for a subfolder, as on hosts that serve several sites."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Handler, directory=str(gallery_folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{gallery_folder.name}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def ready() -> str:
    return "window.gallery"


def search_for(page: Any, text: str) -> list[str]:
    """Search for a text and return the file names of the results, most similar first."""
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")
    wait_for_results(page)
    names: list[str] = page.locator("#grid .name").all_inner_texts()
    return names


def wait_for_results(page: Any) -> None:
    done = "!document.body.classList.contains('searching') && /most similar/.test(status.textContent)"
    page.wait_for_function(f"() => {{ const status = document.getElementById('status'); return {done}; }}")


def test_browser_vectors_equal_python(page: Any, student_folder: Path) -> None:
    model = LLM2CLIP.from_pretrained(student_folder, "cpu")
    vectors = []
    for text in TEXTS:
        values = page.evaluate("async (text) => Array.from(await gallery.embedQuery(text))", text.strip())
        vectors.append(values)
    cosines = (torch.tensor(vectors) * model.encode_query([text.strip() for text in TEXTS])).sum(1)
    assert cosines.min() > 0.999, cosines


def test_browser_cosines_equal_those_of_the_stored_vectors(page: Any, gallery_folder: Path) -> None:
    vectors = read_vectors(gallery_folder / "vectors.bin", 36, 16)
    query = np.random.default_rng(0).normal(size=16)
    query /= np.linalg.norm(query)
    hits = page.evaluate(
        "query => gallery.rankImages(gallery.rotate(Float32Array.from(query))).map(({index, score}) => [index, score])",
        query.tolist(),
    )
    scores = dict(hits)
    np.testing.assert_allclose([scores[n] for n in range(36)], vectors @ query, atol=1e-5)


@on_both_devices
def test_text_search_ranks_like_python(page: Any, student_folder: Path, index_folder: Path) -> None:
    from llm2clip.search.backends import open_backend
    from llm2clip.search.metadata import Filter

    assert page.locator("#grid li").count() == 36 and "newest first" in page.locator("#status").inner_text()
    names = search_for(page, "the blue half")
    assert page.title() == page.locator("h1").inner_text() == "out"
    assert "Perhaps none of them is close to the query." in page.locator("#status").inner_text()
    model = LLM2CLIP.from_pretrained(student_folder, "cpu")
    query = model.encode_query("the blue half")[0].numpy()
    hits = open_backend(str(index_folder)).search(query, 36, Filter())
    exact = {Path(hit.images[0].name).name: hit.score for hit in hits}
    scores = [float(text) for text in page.locator("#grid .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, [exact[name] for name in names], atol=0.02)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page must not scroll horizontally"
    assert page.evaluate("document.querySelector('#grid img').naturalWidth") == 48
    page.locator("#grid button").nth(1).click()
    assert page.locator("#name").inner_text() == names[1] and page.locator("#caption").inner_text()
    page.locator("#like").click()
    wait_for_results(page)
    assert page.locator("#grid .name").first.inner_text() == names[1]
    assert page.locator("#grid .score").first.inner_text() in ("0.999", "1.000") and page.locator(".chip").count() == 1
    page.go_back()
    wait_until(page, "document.getElementById('text').value === 'the blue half'")
    wait_for_results(page)
    assert page.locator("#grid .name").all_inner_texts() == names
    page.reload()
    wait_for_results(page)
    assert page.locator("#grid .name").all_inner_texts() == names


def test_keyboard_navigation(page: Any) -> None:
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    wait_for_results(page)
    names = page.locator("#grid .name").all_inner_texts()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#detail").is_visible() and page.locator("#name").inner_text() == names[1]
    page.keyboard.press("ArrowRight")
    assert page.locator("#name").inner_text() == names[2]
    page.keyboard.press("Escape")
    wait_until(page, "!document.getElementById('detail').open")
    # The browser first moves the focus back to the previous image, then the page moves it to the last one shown.
    page.wait_for_function("name => document.activeElement.querySelector('.name')?.textContent === name", arg=names[2])
    page.keyboard.press("m")
    wait_until(page, "document.querySelectorAll('.chip').length === 1")
    wait_for_results(page)
    assert page.locator("#grid .name").first.inner_text() == names[2]
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"


def test_missing_file_is_reported(browser: Any, address: str) -> None:
    context = browser.new_context()
    context.set_default_timeout(HANG_TIMEOUT * 1000)
    page = context.new_page()
    page.route("**/text.onnx", lambda route: route.fulfill(status=404))
    page.goto(address)
    wait_until(page, "window.gallery")
    page.locator("#text").fill("red")
    page.locator("#text").press("Enter")
    wait_until(page, "document.getElementById('status').classList.contains('error')")
    assert page.locator("#status").inner_text() == "text.onnx could not be loaded (status 404)."
    context.close()

"""Text searches with an ONNX graph, which need no PyTorch, compared with searches with the model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from llm2clip import Index
from llm2clip.cli import main
from llm2clip.data.skip_log import SkipLog
from llm2clip.models import text_graph
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import save_query_templates
from llm2clip.models.prompts import QueryTemplates
from llm2clip.models.text_graph import open_text_graph, save_text_graph
from llm2clip.search.build import IndexOptions, build_index
from llm2clip.search.metadata import Filter
from llm2clip.search.query import SearchQuery
from llm2clip.search.sqlite_backend import SqliteBackend

pytest.importorskip("onnxscript")
QUERIES = (
    SearchQuery(["red"]),  # uses the templates of the model
    SearchQuery(["  the middle of this image is red, and the border is blue\n"]),
    SearchQuery(["a longer text " * 60], templates=QueryTemplates()),  # truncated
    SearchQuery(["red", "一只猫"], negative_texts=["a dog"]),
    SearchQuery(["red"], like=["1"]),
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache folder of this module. Other tests do not save graphs."""
    folder = tmp_path_factory.getbasetemp() / "text_graph_cache"
    monkeypatch.setenv("LLM2CLIP_CACHE", str(folder))
    monkeypatch.setattr(text_graph, "MAX_TEXT_BYTES", 1 << 20)
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of `model_folder` with query templates."""
    folder = tmp_path_factory.mktemp("graph") / "model"
    shutil.copytree(model_folder, folder)
    save_query_templates(folder, QueryTemplates(("a photo of a {}", "{}!")))
    return folder


@pytest.fixture(scope="module")
def index(model: Path, image_folder: Path) -> Path:
    """Index with fewer dimensions than the model."""
    backend = SqliteBackend(model.parent / "index", write=True)
    build_index([str(image_folder)], open_dual_encoder(str(model)), backend, SkipLog(None, 1.0), IndexOptions(dim=12))
    return model.parent / "index"


@pytest.fixture(scope="module")
def graph_of_model(model: Path, index: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the graph that the command `index` has saved."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.getbasetemp() / "text_graph_cache"
        patch.setenv("LLM2CLIP_CACHE", str(cache))
        patch.setattr(text_graph, "MAX_TEXT_BYTES", 1 << 20)
        abandoned = cache / "text_graphs/abandoned"
        abandoned.mkdir(parents=True)
        (abandoned / "graph.json").write_text('{"model": "/no/such/model"}')
        load = Mock(wraps=LLM2CLIP.from_pretrained)
        patch.setattr(LLM2CLIP, "from_pretrained", load)
        assert main(["index", str(image_folder), "--out", str(index), "--model", str(model)]) == 0
        assert load.call_count == 1  # the export uses the same model
        (folder,) = cache.glob("text_graphs/*")
    return folder


def test_search_with_a_graph_needs_no_pytorch(
    index: Path, model: Path, graph_of_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", str(index), "red", "--json", "--show_weak"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert first.out.count("\n") == 10
    code = f"import sys; from llm2clip.cli import main; main({arguments}); print('torch' in sys.modules)"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, is_imported = second.stdout.splitlines()
    assert is_imported == "False", second.stderr
    assert [line.partition('"path"')[2] for line in lines] == [
        line.partition('"path"')[2] for line in first.out.splitlines()
    ]

    fast, slow = Index.open(index), Index.open(index, device="cpu")
    for query in QUERIES:
        for image_filter in (Filter(), Filter(path="*1.png")):
            pages = [opened.search(query, top=20, filter=image_filter) for opened in (fast, slow)]
            assert [hit.id for hit in pages[0].hits] == [hit.id for hit in pages[1].hits] and pages[0].hits
            for name in ("score", "relevance"):
                values = [[getattr(hit, name) for hit in page.hits] for page in pages]
                assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert "encoder" not in vars(fast) and "encoder" in vars(slow)
    graph = open_text_graph(str(model))
    assert graph is not None and graph.fingerprint == open_dual_encoder(str(model)).fingerprint
    assert len(fast.explain("red", "1").words) == 1  # loads the model


def test_graph_is_not_used_after_the_model_has_changed(model: Path, tmp_path: Path, graph_of_model: Path) -> None:
    changed = tmp_path / "model"
    shutil.copytree(model, changed)
    graph = text_graph._get_graph_folder(str(changed))
    settings = json.loads((graph_of_model / "graph.json").read_text())

    def save() -> None:
        shutil.copytree(graph_of_model, graph, dirs_exist_ok=True)
        (graph / "graph.json").write_text(json.dumps(settings | text_graph._get_model_file_states(str(changed))))
        assert open_text_graph(str(changed)) is not None

    for file in ("config.json", "model.safetensors", "text/model.safetensors", "text/tokenizer.json", "text/new.json"):
        save()
        content = (changed / file).read_bytes() if (changed / file).exists() else b""
        (changed / file).write_bytes(content)  # equal, but it may have been replaced
        assert open_text_graph(str(changed)) is None, file
    save()
    (graph / "text.onnx").write_bytes(b"corrupt")
    assert open_text_graph(str(changed)) is None


def test_failed_export_is_not_repeated(
    model: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [MemoryError("no memory"), RuntimeError("unsupported operator"), RuntimeError("other"), OSError("full")]

    def fail(name: str, folder: Path) -> None:
        raise errors.pop(0)

    def save() -> str:
        save_text_graph(open_dual_encoder(str(model)))
        return capsys.readouterr().out

    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(text_graph, "_export_graph", fail)
    assert "could not be exported: no memory" in save()
    assert "cannot be exported: unsupported operator" in save()
    (model / "README.md").write_text("has no effect on embeddings")
    assert save() == "" and open_text_graph(str(model)) is None
    assert Index.open(index).search("red").hits
    (model / "text/new.json").write_text("{}")
    assert "cannot be exported: other" in save()
    (model / "text/new.json").unlink()
    assert "could not be exported: full" in save()
    monkeypatch.setattr(text_graph, "MAX_TEXT_BYTES", 100)
    assert save() == ""

"""Tests of distilling a model's text side into a small text encoder."""

import json
import math
import tracemalloc
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.nn.functional import gelu, normalize

from align_fixtures import killed_after
from conftest import make_llm, run_distributed
from llm2clip import LLM2CLIP
from llm2clip.cli import main
from llm2clip.config import DistillConfig
from llm2clip.data.records import Record, open_records
from llm2clip.data.table import RecordTable
from llm2clip.evaluate import training_report
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.export import export_model
from llm2clip.models.loading import fingerprint
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.pipeline import DistillOptions, distill
from llm2clip.search.query import check_model_matches_index, truncate_model_to_index
from llm2clip.store import encode, writer
from llm2clip.store.encode import embed
from llm2clip.train import distill as distill_module
from llm2clip.train.distill import (
    DistillationTexts,
    Teacher,
    cosine_loss,
    fit_ridge_regression,
    load_student,
    prepare_training_texts,
    sample_epoch_batches,
)
from search_fixtures import create_backend, index_sources, search_names

CONFIG = DistillConfig(epochs=4, batch_size=16, lr=3e-3, save_steps=3, precision="fp32")
TEXTS = ["the left half is red", "a grey picture, blue at its border", "x", "Ein längerer Text über ein Bild, in Grün."]


@pytest.fixture(autouse=True)
def short_speed_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_report, "MIN_SPEED_SECONDS", 0.0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with its caption encoder, in a folder without a store."""
    from search_fixtures import make_model

    return make_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llm(tmp_path_factory.mktemp("student"), family="qwen2", layers=1, seed=1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT in sentence-transformers format, whose embeddings are normalised, and which knows few words."""
    return make_bert(
        tmp_path_factory.mktemp("bert"), ["the", "half", "is", "red", "blue", "picture", "a", "grey", "##n"]
    )


def make_bert(folder: Path, words: list[str]) -> Path:
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *words]))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(special) + len(words), **sizes)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    st = SentenceTransformer(
        modules=[Transformer(str(folder / "bert")), Pooling(32, "mean"), Normalize()], device="cpu"
    )
    st.save_pretrained(str(folder / "st"))
    return folder / "st"


def run(teacher: Path, images: Path, out: Path, student: str, config: DistillConfig = CONFIG, **options: Any) -> Path:
    return distill(DistillOptions(str(teacher), [str(images / "captions.jsonl")], student, config, **options), out)


@pytest.fixture(scope="module")
def trained(teacher: Path, bert: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that returns the model folder of a student, which is trained when it is first needed."""

    @cache
    def get(student: str) -> Path:
        name = str(bert) if student == "bert" else student
        return run(teacher, image_folder, tmp_path_factory.mktemp("trained"), name, max_skipped=0.9)

    return get


def mean_cosine(model: Path, teacher: Path, images: Path, dim: int | None = None) -> float:
    """Return the mean cosine of two models' text embeddings, truncated to `dim` dimensions."""
    texts = [text for record in open_records(images / "captions.jsonl") for text in record.texts]
    ours, theirs = (LLM2CLIP.from_pretrained(folder, "cpu").encode_text(texts) for folder in (model, teacher))
    return float(torch.cosine_similarity(ours[:, :dim], theirs[:, :dim]).mean())


def test_cosine_loss_matches_its_definition() -> None:
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    expected = 0.0
    for a, b in zip(student.tolist(), teacher.tolist(), strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        expected += 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    assert cosine_loss(student, teacher).item() == pytest.approx(expected / 5, abs=1e-6)


def test_ridge_regression_finds_the_linear_map() -> None:
    inputs, weight, bias = torch.randn(500, 6).double(), torch.randn(4, 6).double(), torch.randn(4).double()
    fitted_weight, fitted_bias = fit_ridge_regression(inputs, inputs @ weight.T + bias)
    torch.testing.assert_close(fitted_weight, weight, atol=0.05, rtol=0.05)
    torch.testing.assert_close(fitted_bias, bias, atol=0.05, rtol=0.05)


def make_texts(lengths: list[int], num_captions: int) -> DistillationTexts:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return DistillationTexts(np.arange(offsets[-1]), offsets, None, np.arange(len(lengths)), num_captions, "")  # type: ignore[arg-type]


def test_steps_contain_texts_of_similar_length_and_repeated_phrases() -> None:
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(5, 60, 900).tolist(), *rng.integers(1, 3, 100).tolist()]
    data = make_texts(lengths, num_captions=900)
    epochs = [sample_epoch_batches(data, 32, 0, epoch) for epoch in (0, 1)]
    assert epochs[0].shape == ((900 + 9 * 100) // 32, 32)
    counts = np.bincount(epochs[0].ravel(), minlength=1000)
    assert counts[:900].max() == 1
    assert counts[900:].max() == 9
    widths = [np.ptp(data.lengths[step]) for step in epochs[0]]
    assert np.mean(widths) < 5
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(epochs[0], sample_epoch_batches(data, 32, 0, 0))


def test_texts_are_distinct_and_captions_come_first(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TOKENIZE_CHUNK", "LOOKUP_CHUNK_SIZE"):  # duplicates are in the same chunk and in different chunks
        monkeypatch.setattr(distill_module, name, 3)
    records = [
        Record("1", None, ("a", "b", "a", "c"), phrases=("red", "b")),
        Record("2", None, ("c", "d"), ("short",), ("long",), phrases=("red", "blue", "query")),
    ]
    (tmp_path / "more.txt").write_text("query\nd\n")
    table = RecordTable.from_records(records)
    student = load_student("static", teacher, 16, CONFIG)
    source = Teacher(LLM2CLIP.from_pretrained(teacher, "cpu"), teacher)
    source.embed_missing_texts(["a", "b", "c", "d", "short", "long", "red", "query"], tmp_path / "store")
    data = prepare_training_texts(table, tmp_path / "more.txt", student, source, tmp_path, 0.0)
    texts = student.tokenizer.decode_batch(data.get_token_ids(np.arange(len(data))))
    assert texts == ["a", "b", "c", "d", "short", "long", "query", "red"], "`blue` has no embedding"
    assert data.num_captions == 7
    torch.testing.assert_close(data.get_targets(np.arange(8)), source.encode(texts), atol=1e-3, rtol=0)
    assert not [file for file in tmp_path.iterdir() if file.name not in ("more.txt", "store", "targets")]


def test_texts_are_not_held_in_memory(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_module, "TOKENIZE_CHUNK", 64)
    for module, name in (
        (distill_module, "LOOKUP_CHUNK_SIZE"),
        (writer, "CHUNK_SIZE"),
        (encode, "SHARD_SIZE"),
    ):
        monkeypatch.setattr(module, name, 2048)
    table = RecordTable.from_records(Record(str(n), None, (f"{n} {'x' * 200}",)) for n in range(15_000))
    student = load_student("static", teacher, 16, CONFIG)
    source = SimpleNamespace(
        select_texts=lambda texts, is_stored: iter(texts),
        encode=lambda texts: torch.ones(len(texts), 16),
        stores=[],
        model=SimpleNamespace(adapter=torch.nn.Identity(), config=SimpleNamespace(embed_dim=16)),
    )
    tracemalloc.start()
    data = prepare_training_texts(table, None, student, source, tmp_path, 0.0)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) == 15_000 and len(data.tokens) > 3_000_000
    assert peak < 6_000_000, f"{peak:,} bytes for 4 MB of text and 12 MB of tokens"


def test_student_model_keeps_the_image_encoder_and_learns_the_text_embeddings(
    teacher: Path, student_llm: Path, image_folder: Path, tmp_path: Path
) -> None:
    model_folder = run(teacher, image_folder, tmp_path / "out", str(student_llm))
    model, original = LLM2CLIP.from_pretrained(model_folder, "cpu"), LLM2CLIP.from_pretrained(teacher, "cpu")
    photos = [str(image_folder / f"{n}.png") for n in range(4)]
    assert torch.equal(model.encode_image(photos), original.encode_image(photos))
    assert model.config.adapter.depth == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, model_folder))
    assert {name for name in before if not name.startswith("adapter.")} == set(after)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())

    assert mean_cosine(model_folder, teacher, image_folder) > 0.85
    assert mean_cosine(model_folder, teacher, image_folder, dim=8) > 0.8  # truncated embeddings are inherited
    plain = SentenceTransformer(str(model_folder / "text"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(normalize(plain, dim=1), model.encode_text(TEXTS), atol=1e-5, rtol=0)

    report = (tmp_path / "out/report.md").read_text()
    assert "captions: T2I R@1" in report
    assert "long_captions: T2I R@1" in report
    assert "queries per second" in report
    measured = json.loads((tmp_path / "out/report.json").read_text())
    for name, evaluated in (("teacher", original), ("student", model)):
        weights = [*evaluated.encoder.st.parameters(), *evaluated.adapter.parameters()]
        assert measured[name]["bytes of weights"] == 4 * sum(weight.numel() for weight in weights)
    assert measured["student"]["bytes of weights"] < measured["teacher"]["bytes of weights"]
    assert "memory of the weights in fp32" in report


def test_first_layers_of_the_teacher_as_student(trained: Any, teacher: Path, image_folder: Path) -> None:
    model_folder = trained("layers:1")
    assert LLM2CLIP.from_pretrained(model_folder, "cpu").encoder.llm.config.num_hidden_layers == 1
    assert mean_cosine(model_folder, teacher, image_folder) > 0.85


def test_static_student(teacher: Path, image_folder: Path, tmp_path: Path) -> None:
    model_folder = run(teacher, image_folder, tmp_path, "static", DistillConfig(epochs=8, batch_size=16))
    model = LLM2CLIP.from_pretrained(model_folder, "cpu")
    assert model.encoder.is_static
    embeddings = model.encode_text(TEXTS)
    plain = SentenceTransformer(str(model_folder / "text"), device="cpu")
    torch.testing.assert_close(
        normalize(plain.encode(TEXTS, convert_to_tensor=True), dim=1), embeddings, atol=1e-5, rtol=0
    )

    # Independent reference: mean of token embeddings, residual layer with GELU, linear layer.
    tokens, hidden, out = model.encoder.st
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        ids = tokens.tokenizer.encode(text, add_special_tokens=False).ids
        x = tokens.embedding.weight[ids].mean(0)
        x = x + gelu(hidden.linear.weight @ x + hidden.linear.bias)
        x = out.linear.weight @ x + out.linear.bias
        torch.testing.assert_close(normalize(x, dim=0), embedding, atol=1e-5, rtol=0)
    assert mean_cosine(model_folder, teacher, image_folder) > 0.7
    # The encoder works at every stage: bf16 encoding, stores, identity.
    store = embed(TEXTS, CaptionEncoder.from_pretrained(model_folder, device="cpu"), tmp_path / "embedded")
    assert len(store) == len(TEXTS)
    assert open_dual_encoder(str(model_folder), "cpu", "bf16").encode_texts(TEXTS).shape == (len(TEXTS), 16)
    with pytest.raises(ValueError, match=r"is a static encoder: omit the unsupported options \(layers\)"):
        CaptionEncoder.from_pretrained(model_folder, layers=1, device="cpu")
    with pytest.raises(ValueError, match="this format does not support static text encoders"):
        export_model(model, "transformers", tmp_path / "exported")
    messages = export_model(model, "onnx", tmp_path / "onnx", int8=True)
    assert any(message.startswith("text.onnx: the minimum cosine similarity") for message in messages)


def test_sentence_transformers_student_loses_its_normalize_layer(trained: Any) -> None:
    model_folder = trained("bert")
    plain = SentenceTransformer(str(model_folder / "text"), device="cpu")
    assert [type(module).__name__ for module in plain] == ["Transformer", "Pooling", "Dense"]
    expected = LLM2CLIP.from_pretrained(model_folder, "cpu").encode_text(TEXTS)
    torch.testing.assert_close(
        normalize(plain.encode(TEXTS, convert_to_tensor=True), dim=1), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("student", ["layers:1", "static"])
def test_resumed_run_gives_the_same_student(
    student: str, trained: Any, teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    complete = trained(student)
    with killed_after(4):
        run(teacher, image_folder, tmp_path / "killed", student)
    assert not (tmp_path / "killed/model").exists()
    with pytest.raises(ValueError, match=r"distill\.lr"):
        run(teacher, image_folder, tmp_path / "killed", student, DistillConfig(**{**vars(CONFIG), "lr": 1e-4}))
    resumed = run(teacher, image_folder, tmp_path / "killed", student)
    first, second = (LLM2CLIP.from_pretrained(folder, "cpu").encoder for folder in (complete, resumed))
    assert first.identity() == second.identity()


def test_two_processes_give_the_student_of_one(trained: Any, teacher: Path, image_folder: Path, tmp_path: Path) -> None:
    alone = trained("layers:1")
    run_distributed(2, _run_on_rank, teacher, image_folder, tmp_path / "two")
    # Adam amplifies rounding errors of gradients that should be zero, so embeddings are compared instead of weights.
    first, second = (LLM2CLIP.from_pretrained(f, "cpu").encode_text(TEXTS) for f in (alone, tmp_path / "two/model"))
    torch.testing.assert_close(first, second, atol=2e-3, rtol=0)


def _run_on_rank(teacher: Path, images: Path, out: Path) -> None:
    training_report.MIN_SPEED_SECONDS = 0.0
    run(teacher, images, out, "layers:1", DistillConfig(**{**vars(CONFIG), "batch_size": CONFIG.batch_size // 2}))


def test_index_of_the_teacher_opens_with_the_student(
    trained: Any, teacher: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = open_dual_encoder(str(trained("layers:1")), "cpu")
    original = open_dual_encoder(str(teacher), "cpu")
    backend = create_backend("sqlite", tmp_path / "index")
    index_sources([image_folder], original, backend)
    capsys.readouterr()
    check_model_matches_index(backend.read_metadata(), original)
    assert capsys.readouterr().out == ""
    check_model_matches_index(backend.read_metadata(), student)
    assert "has the same image encoder" in capsys.readouterr().out
    assert not index_sources([image_folder], student, backend)  # no image is embedded again
    assert len(search_names(backend)) == 36

    truncated = create_backend("sqlite", tmp_path / "truncated")
    index_sources([image_folder], original, truncated, dim=8)
    capsys.readouterr()
    assert truncate_model_to_index(truncated.read_metadata(), student).embed_dim == 8
    assert "has the same image encoder" in capsys.readouterr().out
    assert not index_sources([image_folder], student, truncated)

    old_metadata = {"model": "old", "embed_dim": 16, "fingerprint": fingerprint(original.identity())}
    check_model_matches_index(old_metadata, original)
    with pytest.raises(ValueError, match="built with a different model"):
        check_model_matches_index(old_metadata, student)
    changed = LLM2CLIP.from_pretrained(teacher, "cpu")
    with torch.no_grad():
        next(changed.projection.parameters()).mul_(1.1)
    changed_folder = str(changed.save_pretrained(tmp_path / "changed"))
    with pytest.raises(ValueError, match="built with a different model"):
        check_model_matches_index(backend.read_metadata(), open_dual_encoder(changed_folder, "cpu"))


@pytest.mark.parametrize("student", ["layers:1", "static"])
def test_commands_accept_a_student(
    student: str,
    trained: Any,
    teacher: Path,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(trained(student))

    def succeed(*arguments: str | Path) -> str:
        """Run a command, and return everything that it prints."""
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        output, errors = capsys.readouterr()
        assert code == 0, errors
        return output + errors

    index = tmp_path / "index"
    succeed("index", image_folder, "--model", teacher, "--out", index)
    assert "has the same image encoder" in succeed("search", index, "the left half is red", "--model", model)
    own_index = tmp_path / "own"
    succeed("index", image_folder, "--model", model, "--out", own_index)
    assert ".png" in succeed("search", own_index, "the left half is red")
    output = succeed("evaluate", model, f"{image_folder / 'captions.jsonl'}@val", "--out", tmp_path / "evaluation")
    assert "R@1" in output

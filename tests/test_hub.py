"""`llm2clip push` and `from_pretrained`, over HTTP with a hub (see fake_hub.py)."""

import errno
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, close_session, constants, hf_api, hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from conftest import Killed
from fake_hub import FakeHub, Fault
from llm2clip.cli import main
from llm2clip.cli.checks import check_pretrained_names, resolve_encoder_path, resolve_model_name
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.export import export_model
from llm2clip.models.export.model_card import render_model_card
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import find_hub_problem
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.official_checkpoint import load_official_checkpoint
from llm2clip.models.text.caption_encoder import CaptionEncoder
from official_reference import save_llm
from test_published_checkpoints import write_checkpoint

REPO, MTEB_REPO = "me/model", "me/LLM2CLIP-model"
TEXTS = ["a dog", "Two children in the snow, and an old man."]
NOT_JSON = "the hub's response is not valid JSON: check for a proxy or login page"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub, which huggingface_hub uses as user `me`, with an empty cache. Waiting takes no time."""
    hub = FakeHub()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    paths = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_TOKEN_PATH": str(tmp_path / "token")}
    for name, value in {**settings, **paths, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.delenv("LLM2CLIP_TRACEBACK", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    find_hub_problem.cache_clear()
    yield hub
    close_session()
    hub.close()
    find_hub_problem.cache_clear()


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def failing_push(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that pushes, requires that this fails, and returns the error message."""

    def push(*args: object) -> str:
        capsys.readouterr()
        assert main(["push", *map(str, args)]) == 1
        return capsys.readouterr().err.partition("llm2clip push: ")[2]

    return push


def push(*args: object) -> None:
    assert main(["push", *map(str, args)]) == 0


def change_model(folder: Path) -> LLM2CLIP:
    """Change the weights of a saved model and of its caption encoder."""
    model = LLM2CLIP.from_pretrained(folder, "cpu")
    with torch.no_grad():
        model.projection.weight.mul_(-1)
        model.encoder.llm.norm.weight.mul_(2)
    model.save_pretrained(folder)
    return model


def make_static_student(model_folder: Path, folder: Path) -> None:
    teacher = LLM2CLIP.from_pretrained(model_folder, "cpu")
    tokenizer = Tokenizer.from_file(str(model_folder / "text/tokenizer.json"))
    encoder = CaptionEncoder(SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)], device="cpu"))
    config = LLM2CLIPConfig(teacher.config.tower, text_dim=16, embed_dim=16, adapter=AdapterConfig(depth=0))
    LLM2CLIP(config, teacher.tower, encoder).save_pretrained(folder)


def make_clip(model_folder: Path, folder: Path) -> None:
    """Save a tiny CLIP model in transformers' format."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / "text" / name, folder / name)
    vocab_size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": vocab_size, "max_position_embeddings": 32, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


# ---- push and pull ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk_size", "verify"), [(None, False), (None, True), (10_000, True)])
def test_pushed_model_can_be_loaded(hub: FakeHub, model: Path, chunk_size: int | None, verify: bool) -> None:
    hub.chunk_size, hub.verify = chunk_size, verify
    push(model, REPO, "--license", "mit")
    repository = hub.repositories[REPO]
    assert [title for title, _ in repository.commits.values()] == ["initial commit", "Upload model"]
    pushed = repository.get_files()
    for file in model.rglob("*"):
        assert file.is_dir() or pushed[file.relative_to(model).as_posix()] == file.read_bytes()
    loaded = LLM2CLIP.from_pretrained(REPO, "cpu")
    assert torch.equal(loaded.encode_text(TEXTS), LLM2CLIP.from_pretrained(model, "cpu").encode_text(TEXTS))
    assert hub.count("POST /verify") == 2 * verify and hub.count("PUT /storage/upload/.*/2$") == 2 * bool(chunk_size)
    assert all(authorization == "" for _, path, authorization, _ in hub.requests if path.startswith("/storage"))
    assert HfApi().whoami()["name"] == "me"


def test_second_push_uploads_only_what_has_changed(hub: FakeHub, model: Path) -> None:
    push(model, REPO)
    hub.requests.clear()
    push(model, REPO)
    assert len(hub.repositories[REPO].commits) == 2 and hub.count("PUT") == 0
    change_model(model)
    push(model, REPO)
    assert len(hub.repositories[REPO].commits) == 3 and hub.count("PUT") == 2


def test_static_student_is_pushed_from_its_run_directory(hub: FakeHub, model_folder: Path, tmp_path: Path) -> None:
    make_static_student(model_folder, tmp_path / "student/model")
    push(tmp_path / "student", "me/student")
    expected = LLM2CLIP.from_pretrained(tmp_path / "student/model", "cpu").encode_text(TEXTS)
    assert torch.equal(LLM2CLIP.from_pretrained("me/student", "cpu").encode_text(TEXTS), expected)


@pytest.mark.parametrize("to", ["transformers", "sentence-transformers", "vision"])
def test_exported_models_can_be_loaded_from_the_hub(
    to: str, hub: FakeHub, model_folder: Path, tmp_path: Path, modules_cache: None
) -> None:
    from transformers import AutoModel, AutoProcessor

    model = LLM2CLIP.from_pretrained(model_folder, "cpu")
    export_model(model, to, tmp_path / "out")
    push(tmp_path / "out", "me/exported")
    if to == "vision":
        pixels = torch.rand(1, 3, 32, 32)
        loaded = AutoModel.from_pretrained("me/exported")
        expected = AutoModel.from_pretrained(tmp_path / "out")(pixels).last_hidden_state
        assert torch.equal(loaded(pixels).last_hidden_state, expected)
        return
    expected = model.encode_text(TEXTS)
    if to == "transformers":
        loaded = AutoModel.from_pretrained("me/exported", trust_remote_code=True)
        processor = AutoProcessor.from_pretrained("me/exported", trust_remote_code=True)
        embeddings = loaded.get_text_features(**processor(text=TEXTS, padding=True, return_tensors="pt")).pooler_output
    else:
        loaded = SentenceTransformer("me/exported", trust_remote_code=True, device="cpu")
        embeddings = loaded.encode(TEXTS, convert_to_tensor=True)
    assert torch.allclose(embeddings, expected, atol=1e-5)


def test_onnx_files_and_caption_encoders_can_be_pushed(hub: FakeHub, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/text.onnx").write_bytes(b"graph")
    push(tmp_path / "onnx", "me/onnx")
    assert Path(hf_hub_download("me/onnx", "text.onnx")).read_bytes() == b"graph"
    push(model_folder / "text", "me/encoder")
    expected = CaptionEncoder.from_pretrained(model_folder / "text", device="cpu").encode(TEXTS)
    assert torch.equal(CaptionEncoder.from_pretrained("me/encoder", device="cpu").encode(TEXTS), expected)


def test_static_caption_encoder_can_be_pushed(hub: FakeHub, model_folder: Path, tmp_path: Path) -> None:
    make_static_student(model_folder, tmp_path / "student")
    push(tmp_path / "student/text", "me/encoder")
    expected = CaptionEncoder.from_pretrained(tmp_path / "student/text", device="cpu").encode(TEXTS)
    assert torch.equal(CaptionEncoder.from_pretrained("me/encoder", device="cpu").encode(TEXTS), expected)


def test_model_cards_are_valid(model_folder: Path, tmp_path: Path) -> None:
    model = LLM2CLIP.from_pretrained(model_folder, "cpu")
    folders = {"llm2clip": model_folder, "encoder": model_folder / "text", "onnx": tmp_path / "onnx"}
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/text.onnx").touch()
    for to in ("transformers", "sentence-transformers", "vision"):
        folders[to] = tmp_path / to
        export_model(model, to, folders[to])
    task = "zero-shot-image-classification"
    expected = {
        "llm2clip": ("llm2clip", task),
        "encoder": ("sentence-transformers", "sentence-similarity"),
        "onnx": ("onnx", task),
        "transformers": ("transformers", task),
        "sentence-transformers": ("transformers", task),
        "vision": ("transformers", "image-feature-extraction"),
    }
    for kind, folder in folders.items():
        card: Any = ModelCard(render_model_card(folder, REPO, "apache-2.0"))
        assert (card.data.library_name, card.data.pipeline_tag) == expected[kind]
        assert card.data.license == "apache-2.0" and "llm2clip" in card.data.tags
        assert ("combines a vision tower and" in card.text) == (kind not in ("encoder", "vision"))
        assert ModelCard(f"---\n{card.data.to_yaml()}\n---\n").data.to_dict() == card.data.to_dict()


# ---- revisions -------------------------------------------------------------------------------------------------------


def test_mteb_loads_pinned_revisions(hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mteb.models import ModelMeta
    from mteb.models.model_implementations import MODEL_REGISTRY

    from llm2clip.evaluate.mteb import get_model_meta

    push(model, MTEB_REPO)
    commit = hub.repositories[MTEB_REPO].refs["main"]
    first = LLM2CLIP.from_pretrained(model, "cpu").encode_text(TEXTS)
    second = change_model(model).encode_text(TEXTS)
    push(model, MTEB_REPO)

    def load(source: str) -> tuple[Any, torch.Tensor]:
        meta = get_model_meta(source)
        loaded: Any = meta.load_model(device="cpu")
        return meta, torch.from_numpy(loaded.encode([{"text": TEXTS}]))

    meta, embeddings = load(MTEB_REPO)
    torch.testing.assert_close(embeddings, second)
    assert (meta.name, meta.embed_dim) == (MTEB_REPO, 16)
    meta, embeddings = load(f"{MTEB_REPO}@{commit}")
    torch.testing.assert_close(embeddings, first)
    assert (meta.name, meta.revision) == (MTEB_REPO, commit)
    listed = ModelMeta.create_empty({"name": MTEB_REPO, "revision": commit, "license": "mit"})
    monkeypatch.setitem(MODEL_REGISTRY, MTEB_REPO, listed)
    meta, embeddings = load(MTEB_REPO)
    torch.testing.assert_close(embeddings, first)
    assert (meta.name, meta.license, meta.revision) == (MTEB_REPO, "mit", commit)
    assert load(f"{MTEB_REPO}@main")[0].revision == hub.repositories[MTEB_REPO].refs["main"]


def test_mteb_loads_pinned_checkpoints(hub: FakeHub, model_folder: Path, tmp_path: Path) -> None:
    """Weights in a .pt file, beside others."""
    from llm2clip.evaluate.mteb import get_model_meta

    write_checkpoint("eva", tmp_path)
    HfApi().create_repo(MTEB_REPO)
    files = {"EVA.pt": ((tmp_path / "eva.pt").read_bytes(), False), "model.safetensors": (b"other", False)}
    commit = hub.repositories[MTEB_REPO].commit("add a checkpoint", files)
    hub.repositories[MTEB_REPO].commit("delete the weights", {"model.safetensors": (b"other", False)})
    meta = get_model_meta(f"{MTEB_REPO}@{commit}", text=str(save_llm(tmp_path / "llm")))
    loaded: Any = meta.load_model(device="cpu")
    embeddings = loaded.encode([{"image": [Image.new("RGB", (40, 30), "red")]}])
    expected = load_official_checkpoint(tmp_path / "eva.pt").encode_image(Image.new("RGB", (40, 30), "red"))
    torch.testing.assert_close(torch.from_numpy(embeddings), expected)
    assert (meta.name, meta.revision) == (MTEB_REPO, commit)


def test_pinned_revision_is_loaded(hub: FakeHub, model: Path) -> None:
    push(model, REPO)
    commit = hub.repositories[REPO].refs["main"]
    HfApi().create_tag(REPO, tag="v1")
    HfApi().create_branch(REPO, branch="old", revision="v1")
    first = LLM2CLIP.from_pretrained(model, "cpu")
    second = change_model(model)
    push(model, REPO)
    assert torch.equal(LLM2CLIP.from_pretrained(REPO, "cpu").encode_text(TEXTS), second.encode_text(TEXTS))
    for revision in ("v1", "old", commit):
        pinned = LLM2CLIP.from_pretrained(f"{REPO}@{revision}", "cpu")
        assert torch.equal(pinned.encode_text(TEXTS), first.encode_text(TEXTS))
        assert torch.equal(pinned.projection.weight, first.projection.weight)
    dual_encoder = open_dual_encoder(f"{REPO}@v1", "cpu")
    assert dual_encoder.name == f"{REPO}@v1"
    assert torch.equal(
        dual_encoder.encode_texts(TEXTS), open_dual_encoder(f"{REPO}@{commit}", "cpu").encode_texts(TEXTS)
    )
    with pytest.raises(FileNotFoundError, match=r"^me/model@v9 cannot be .* the hub: the revision does not exist"):
        LLM2CLIP.from_pretrained(f"{REPO}@v9", "cpu")


def test_pinned_revision_is_loaded_from_the_cache_without_a_hub(hub: FakeHub, model: Path) -> None:
    push(model, REPO)
    commit = hub.repositories[REPO].refs["main"]
    LLM2CLIP.from_pretrained(REPO, "cpu")
    hub.faults = [Fault(r"", 503, 99)]
    hub.requests.clear()
    LLM2CLIP.from_pretrained(f"{REPO}@{commit}", "cpu")
    LLM2CLIP.from_pretrained(REPO, "cpu")
    with pytest.raises(FileNotFoundError, match=r"^me/model@v1 cannot be downloaded from the hub: .*503"):
        LLM2CLIP.from_pretrained(f"{REPO}@v1", "cpu")


def test_commands_accept_pinned_revisions(
    hub: FakeHub, model: Path, tmp_path: Path, failing_push: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    push(model, REPO)
    HfApi().create_tag(REPO, tag="v1")
    assert main(["export", f"{REPO}@v1", "--to", "vision", "--out", str(tmp_path / "out")]) == 0
    assert "must be of the form USER/NAME (got me/model@v1)" in failing_push(model, f"{REPO}@v1")
    capsys.readouterr()
    assert main(["export", f"{REPO}@v9", "--to", "vision", "--out", str(tmp_path / "other")]) == 1
    assert "me/model@v9 cannot be downloaded" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_pinned_transformers_model_is_loaded(weights: str, hub: FakeHub, model_folder: Path, tmp_path: Path) -> None:
    make_clip(model_folder, tmp_path)
    expected = open_dual_encoder(str(tmp_path), "cpu").encode_texts(TEXTS)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    if weights == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    HfApi().create_repo(REPO)
    files = {file.name: (file.read_bytes(), False) for file in tmp_path.iterdir() if file.is_file()}
    commit = hub.repositories[REPO].commit("add a model", files)
    hub.repositories[REPO].commit("delete the model", {})
    assert torch.equal(open_dual_encoder(f"{REPO}@{commit}", "cpu").encode_texts(TEXTS), expected)
    assert hub.count("GET .*pytorch_model.bin") == (weights == "pytorch_model.bin")


def test_revisions_that_are_not_supported_are_rejected(hub: FakeHub) -> None:
    for check in (resolve_encoder_path, check_pretrained_names, partial(resolve_model_name, allow_revision=False)):
        for name in ("me/model@v1", "hf:me/model@v1"):
            with pytest.raises(ValueError, match=rf"^{name}: .*Download the revision, and pass its folder$"):
                check(name)


# ---- access ----------------------------------------------------------------------------------------------------------


def test_private_model_requires_a_token_with_access(
    hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch, failing_push: Callable[..., str]
) -> None:
    push(model, REPO, "--private")
    assert hub.repositories[REPO].private
    for token in ("", "hf_other", "hf_expired"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            FileNotFoundError, match=r"^me/model cannot .*, or you lack access: .* HF_TOKEN \(details: "
        ):
            LLM2CLIP.from_pretrained(REPO, "cpu")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    LLM2CLIP.from_pretrained(REPO, "cpu")
    hub.repositories[REPO].private = False
    assert "exists and is public" in failing_push(model, REPO, "--private")


@pytest.mark.parametrize("token", ["", "hf_expired", "hf_reader", "hf_other"])
def test_push_without_write_access_is_an_error(
    token: str, hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch, failing_push: Callable[..., str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    for repo_id in (REPO, "me/other") if token != "hf_other" else (REPO,):
        message = failing_push(model, repo_id, "--private")
        assert f"cannot push to {repo_id}: you lack write access to this repository or account: " in message
    assert not hub.repositories and "Traceback" not in message


@pytest.mark.parametrize(
    ("action", "code", "expected"),
    [
        (401, "GatedRepo", "the model is gated: accept its terms .* HF_TOKEN"),
        ("html", "", re.escape(NOT_JSON)),
        (400, "", "status 400$"),
    ],
)
def test_download_error_says_what_to_do(action: int | str, code: str, expected: str, hub: FakeHub, model: Path) -> None:
    push(model, REPO)
    hub.faults = [Fault("GET /api/models", action, 99, {"X-Error-Code": code})]
    with pytest.raises(FileNotFoundError, match=rf"^me/model cannot be downloaded from the hub: {expected}") as failure:
        LLM2CLIP.from_pretrained(REPO, "cpu")
    assert "Try again" not in str(failure.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "Private repository storage limit reached, please upgrade your plan"),
        (400, "Your push was rejected because it contains files larger than 10 MiB."),
    ],
)
def test_rejected_push_shows_the_message_of_the_hub(
    status: int, message: str, hub: FakeHub, model: Path, failing_push: Callable[..., str]
) -> None:
    hub.faults = [Fault("/commit/", status, 99, message=message)]
    assert failing_push(model, REPO).rstrip("\n") == f"cannot push to me/model: {message}"


def test_full_disk_is_an_error(hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(model, REPO)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(FileNotFoundError, match=r"^me/model cannot .*: no space left on the disk: .*HF_HOME"):
        LLM2CLIP.from_pretrained(REPO, "cpu")


def test_invalid_hub_id_is_an_error(hub: FakeHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"^a--b/c cannot .*Cannot have -- or \.\. in repo_id: 'a--b/c'$"):
        LLM2CLIP.from_pretrained("a--b/c", "cpu")


def test_model_that_is_not_on_the_hub_is_an_error(hub: FakeHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"^me/missing cannot be downloaded from the hub: it does not exist"):
        LLM2CLIP.from_pretrained("me/missing", "cpu")


# ---- interruptions ---------------------------------------------------------------------------------------------------


def test_rate_limit_is_waited_for(hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    headers = {"Retry-After": "7"}
    hub.faults = [Fault("preupload", 429, headers=headers), Fault("PUT", 429, 2, headers)]
    push(model, REPO)
    assert sum(wait >= 7 for wait in waits) >= 3
    hub.faults = [Fault("GET /storage", 429, 2, headers)]
    LLM2CLIP.from_pretrained(REPO, "cpu")
    assert sum(wait >= 7 for wait in waits) >= 5


def test_exceeded_rate_limit_is_an_error(hub: FakeHub, model: Path, failing_push: Callable[..., str]) -> None:
    hub.faults = [Fault("commit", 429, 99)]
    assert "cannot push to me/model: the hub received too many requests: try again" in failing_push(model, REPO)
    hub.faults = [Fault("GET /api/models", 429, 99)]
    with pytest.raises(FileNotFoundError, match="too many requests: try again in a few minutes"):
        LLM2CLIP.from_pretrained(REPO, "cpu")


def test_interrupted_download_is_resumed(hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(model, REPO)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.faults = [Fault("GET /storage", "truncate", 3)]
    loaded = LLM2CLIP.from_pretrained(REPO, "cpu")
    assert torch.equal(loaded.encode_text(TEXTS), LLM2CLIP.from_pretrained(model, "cpu").encode_text(TEXTS))
    assert any(byte_range.startswith("bytes=") for *_, byte_range in hub.requests)


@pytest.mark.parametrize("action", ["truncate", "reset", 503])
def test_failed_download_is_an_error_and_can_be_repeated(action: int | str, hub: FakeHub, model: Path) -> None:
    push(model, REPO)
    hub.faults = [Fault("GET /storage", action, 99)]
    with pytest.raises(FileNotFoundError, match=r"^me/model cannot be downloaded from the hub: ") as failure:
        LLM2CLIP.from_pretrained(REPO, "cpu")
    assert "secret" not in str(failure.value)
    assert action == "truncate" or "Try again: " in str(failure.value)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    hub.faults = [Fault("", 503, 999)]
    with pytest.raises(FileNotFoundError, match=r"^me/model cannot be downloaded"):  # not a model without weights
        LLM2CLIP.from_pretrained(REPO, "cpu")
    hub.faults.clear()
    LLM2CLIP.from_pretrained(REPO, "cpu")


STEPS = ("repos/create", "GET /api/models", "validate-yaml", "preupload", "lfs/objects", "PUT", "verify$", "commit")
FAILURES = [(step, action) for step in STEPS for action in ("reset", 503)] + [("validate-yaml", "html")]


@pytest.mark.parametrize(("step", "action"), FAILURES)
def test_interrupted_push_changes_nothing_and_can_be_repeated(
    step: str, action: int | str, hub: FakeHub, model: Path, failing_push: Callable[..., str]
) -> None:
    hub.verify = True
    hub.faults = [Fault(step, action, 99)]
    message = failing_push(model, REPO)
    assert "cannot push to me/model: " in message and len(message.splitlines()) == 1
    assert (NOT_JSON if action == "html" else ". Try again: ") in message
    assert "<html>" not in message and "secret" not in message
    repository = hub.repositories.get(REPO)
    assert repository is None or list(repository.get_files()) == [".gitattributes"]
    hub.faults.clear()
    push(model, REPO)
    assert len(hub.repositories[REPO].commits) == 2


def test_uploaded_files_are_not_uploaded_again(hub: FakeHub, model: Path, failing_push: Callable[..., str]) -> None:
    hub.faults = [Fault("commit", "reset", 99)]
    failing_push(model, REPO)
    assert hub.count("PUT") == 2
    hub.faults.clear()
    push(model, REPO)
    assert hub.count("PUT") == 2


def test_push_can_be_repeated_if_the_response_to_the_commit_is_lost(
    hub: FakeHub, model: Path, failing_push: Callable[..., str]
) -> None:
    hub.faults = [Fault("commit", "lose")]
    failing_push(model, REPO)
    push(model, REPO)
    assert len(hub.repositories[REPO].commits) == 2
    LLM2CLIP.from_pretrained(REPO, "cpu")


def test_killed_push_changes_nothing(hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(model, REPO)
    before = hub.repositories[REPO].get_files()
    change_model(model)

    def kill(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("huggingface_hub.hf_api._send_commit", kill, raising=False)
        patch.setattr("huggingface_hub._commit_api._send_commit", kill, raising=False)
        main(["push", str(model), REPO])
    assert hub.repositories[REPO].get_files() == before
    push(model, REPO)


def test_unreachable_hub_is_an_error(hub: FakeHub, model: Path, failing_push: Callable[..., str]) -> None:
    hub.close()
    assert "cannot push to me/model: the hub cannot be reached" in failing_push(model, REPO)


# ---- several pushes and versions -------------------------------------------------------------------------------------


def test_push_during_another_push_is_an_error(hub: FakeHub, model: Path, failing_push: Callable[..., str]) -> None:
    push(model, REPO)
    other = Path(shutil.copytree(model, model.with_name("other")))
    change_model(other)
    change_model(model)
    change_model(model)
    hub.faults = [Fault("POST .*/commit/", lambda: push(other, REPO))]
    message = failing_push(model, REPO)
    assert "cannot push to me/model: another push changed the repository: check the new files" in message
    files = hub.repositories[REPO].get_files()
    assert files["model.safetensors"] == (other / "model.safetensors").read_bytes()
    assert files["text/model.safetensors"] == (other / "text/model.safetensors").read_bytes()
    push(model, REPO)
    assert hub.repositories[REPO].get_files()["model.safetensors"] == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", ["repos/create", "GET /api/models", "preupload", "commit"])
def test_two_first_pushes_at_once_are_not_mixed(
    step: str, hub: FakeHub, model: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_static_student(model_folder, tmp_path / "student")
    hub.faults = [Fault(step, lambda: push(tmp_path / "student", REPO))]
    succeeded = main(["push", str(model), REPO]) == 0
    assert succeeded == (step in ("repos/create", "GET /api/models")), capsys.readouterr().err
    pushed, expected = hub.repositories[REPO].get_files(), model if succeeded else tmp_path / "student"
    files = {file.relative_to(expected).as_posix(): file.read_bytes() for file in expected.rglob("*") if file.is_file()}
    assert {name: pushed[name] for name in pushed if name not in (".gitattributes", "README.md")} == {
        name: content for name, content in files.items() if name != "README.md"
    }


def test_push_deletes_parts_that_the_new_version_does_not_have(hub: FakeHub, model: Path) -> None:
    push(model, REPO)
    repository = hub.repositories[REPO]
    other_files = {"LICENSE": (b"MIT", False), "results.json": (b"{}", False)}
    repository.commit("add files", {**repository.commits[repository.refs["main"]][1], **other_files})
    shutil.rmtree(model / "text")
    push(model, REPO)
    names = set(repository.get_files())
    assert {"LICENSE", "results.json", "README.md", ".gitattributes", "config.json", "model.safetensors"} <= names
    assert not LLM2CLIP.from_pretrained(REPO, "cpu").has_encoder


def test_push_deletes_outdated_weights_but_no_other_form(hub: FakeHub, model: Path) -> None:
    repository_files = {"text.onnx": (b"graph", False), "quantized/model.safetensors": (b"weights", False)}
    push(model / "text", REPO)
    repository = hub.repositories[REPO]
    repository.commit("add files", {**repository.commits[repository.refs["main"]][1], **repository_files})
    encoder = CaptionEncoder.from_pretrained(model / "text", device="cpu")
    encoder.llm.save_pretrained(model / "text", max_shard_size=10_000)
    (model / "text/model.safetensors").unlink(missing_ok=True)
    push(model / "text", REPO)
    names = set(repository.get_files())
    assert "model.safetensors.index.json" in names and "model.safetensors" not in names
    assert names >= set(repository_files)
    push(model, REPO)
    names = set(repository.get_files())
    assert "model.safetensors" in names and not {"modules.json", "model.safetensors.index.json"} & names
    (model / "onnx").mkdir()
    (model / "onnx/text.onnx").write_bytes(b"new graph")
    push(model / "onnx", REPO)
    assert set(repository.get_files()) == names


def test_hidden_files_are_not_pushed(hub: FakeHub, model: Path) -> None:
    (model / ".cache").mkdir()
    (model / ".cache/token").write_text("secret")
    for folder in (model, model / "text"):
        (folder / ".env").write_text("secret")
    push(model, REPO)
    assert not any(".cache" in name or ".env" in name for name in hub.repositories[REPO].get_files())


@pytest.mark.parametrize("target", ["folder", "nothing", "file"])
def test_symbolic_links_out_of_the_folder_are_not_pushed(
    target: str, hub: FakeHub, model: Path, failing_push: Callable[..., str]
) -> None:
    (model.parent / "folder").mkdir()
    (model.parent / "file").write_text("secret")
    (model / "text/link").symlink_to(model.parent / target)
    assert "link is a symbolic link to" in failing_push(model, REPO)
    assert not hub.repositories


def test_folders_without_a_model_are_not_pushed(hub: FakeHub, tmp_path: Path, failing_push: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty is not a model folder: it has no config.json" in failing_push(tmp_path / "empty", REPO)
    assert not hub.repositories


def test_invalid_license_is_an_error(hub: FakeHub, model: Path, failing_push: Callable[..., str]) -> None:
    message = failing_push(model, REPO, "--license", "my-license")
    assert message.startswith('Invalid metadata in README.md.\n- "license" must be one of [apache-2.0, ')
    assert list(hub.repositories[REPO].get_files()) == [".gitattributes"]


def test_model_of_a_newer_format_is_an_error(hub: FakeHub, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    push(model, REPO)
    with pytest.raises(ValueError, match=r"format version 99, but this version of llm2clip reads only"):
        LLM2CLIP.from_pretrained(REPO, "cpu")


ENCODER_FILES = ["modules.json", "config_sentence_transformers.json", "tokenizer_config.json", "model.safetensors"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", *(f"text/{name}" for name in ENCODER_FILES)])
def test_incomplete_repository_is_an_error(missing: str, hub: FakeHub, model: Path) -> None:
    push(model, REPO)
    repository = hub.repositories[REPO]
    files: Any = {
        path: file for path, file in repository.commits[repository.refs["main"]][1].items() if path != missing
    }
    repository.commit("delete a file", files)
    pattern = re.escape(missing.replace("text/model.", "text/*."))
    with pytest.raises(FileNotFoundError, match=rf"^me/model is not a .*model folder: it has no {pattern}$"):
        LLM2CLIP.from_pretrained(REPO, "cpu")


def test_empty_repository_is_an_error(hub: FakeHub) -> None:
    HfApi().create_repo(REPO)
    with pytest.raises(FileNotFoundError, match=r"^me/model is not a model folder: it has no config.json$"):
        LLM2CLIP.from_pretrained(REPO, "cpu")

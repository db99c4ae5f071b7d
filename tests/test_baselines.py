"""Tests of the baselines in the paper's tables: each gives the embeddings of its own library.

Each test saves a tiny random model of the published model's class, with a tokenizer and an image processor of the
published classes, and compares `open_dual_encoder` with that library's forward pass, one input at a time.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from torch import Tensor

from llm2clip.cli import main
from llm2clip.data.images import load_image
from llm2clip.models import loading
from llm2clip.models.clip_models import has_text_tower, load_clip_text_encoder
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ["a dog", "two cats on a mat", "a long text: " + "word " * 60]
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = ENCODER | {"patch_size": 8}
CLIP_STATS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), ":</w>", ":"]
    return CLIPTokenizer({token: n for n, token in enumerate(tokens)}, [], model_max_length=77)


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer({token: n for n, token in enumerate(tokens)}, model_max_length=512)


def xlm_roberta_tokenizer() -> Any:
    from transformers import XLMRobertaTokenizer

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "▁", ":", *LETTERS, *LETTERS.upper(), "<mask>"]
    return XLMRobertaTokenizer([(token, -1.0) for token in tokens], model_max_length=512)


def gemma_tokenizer(class_name: str) -> Any:
    """Return a tokenizer as published with SigLIP 2: an end token, padding on the right, no attention mask."""
    import transformers
    from tokenizers.processors import TemplateProcessing

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ":", *LETTERS, *LETTERS.upper()]
    vocab = {token: n for n, token in enumerate(tokens)}
    tokenizer = getattr(transformers, class_name)(vocab, [], padding_side="right", model_input_names=["input_ids"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


def make_model(folder: Path, kind: str) -> None:
    """Save a tiny random model of one of the classes below, with its tokenizer and image processor."""
    import transformers as tf

    square = {"size": {"height": 32, "width": 32}}
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} | CLIP_STATS
    text = ENCODER | {"vocab_size": 100}
    clip_text = text | {"max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    siglip_text = text | {"max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    roberta_ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    roberta_text = text | roberta_ids | {"max_position_embeddings": 514, "project_dim": 12}
    bert_text = text | {"max_position_embeddings": 512}
    vision = VISION | {"image_size": 32}
    blocks = {"num_block_repeats": [1], "kernel_sizes": [3], "in_channels": [32], "out_channels": [16], "strides": [1]}
    align_vision = blocks | {"expand_ratios": [1], "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 16}
    models: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "clip": (clip_text, vision, {"projection_dim": 12}),
        "siglip": (siglip_text, vision, {}),
        "siglip2": (siglip_text, VISION | {"num_patches": 16}, {}),
        "chinese_clip": (bert_text, vision, {"projection_dim": 12}),
        "align": (bert_text, align_vision, {"projection_dim": 16}),
        "altclip": (roberta_text, vision, {"projection_dim": 12}),
        "metaclip_2": (clip_text | roberta_ids, vision, {"projection_dim": 12}),
    }  # fmt: skip
    tokenizers = {
        "clip": clip_tokenizer,
        "siglip": lambda: gemma_tokenizer("GemmaTokenizer"),
        "siglip2": lambda: gemma_tokenizer("Siglip2Tokenizer"),
        "chinese_clip": bert_tokenizer,
        "align": bert_tokenizer,
        "altclip": xlm_roberta_tokenizer,
        "metaclip_2": xlm_roberta_tokenizer,
    }
    processors: dict[str, Any] = {
        "siglip": lambda: tf.SiglipImageProcessor(**square),
        "siglip2": lambda: tf.Siglip2ImageProcessor(patch_size=8, max_num_patches=24),
        "chinese_clip": lambda: tf.ChineseCLIPImageProcessor(**square, do_center_crop=False, **CLIP_STATS),
        "align": lambda: tf.EfficientNetImageProcessor(**square, crop_size=square["size"], do_center_crop=True),
    }
    torch.manual_seed(0)
    text_config, vision_config, options = models[kind]
    config = tf.AutoConfig.for_model(kind, text_config=text_config, vision_config=vision_config, **options)
    model = tf.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # also of biases and scales, so that a missing one is noticed
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizers[kind]().save_pretrained(folder)
    processors.get(kind, lambda: tf.CLIPImageProcessor(**crop))().save_pretrained(folder)


def test_index_without_a_model_uses_the_pinned_default(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "snapshot", "clip")
    downloads = []

    def download(name: str, allow_patterns: list[str], revision: str) -> str:
        assert set(allow_patterns) >= {"config.json", "preprocessor_config.json", "vocab.json", "pytorch_model.bin"}
        downloads.append((name, revision))
        return str(tmp_path / "snapshot")

    problem = "the hub cannot be reached"
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(loading, "find_hub_problem", lambda: problem)
    index = str(tmp_path / "index")
    command = ["index", str(image_folder), "--out", index, "--workers", "0"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "without --model, `index` needs openai/clip-vit-base-patch32, but the hub cannot be reached. Pass" in error
    assert "llm2clip quickstart" in error and not (tmp_path / "index").exists()

    problem = ""
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "openai/clip-vit-base-patch32 (English; MIT licence" in output and "605 MB" in output
    assert main(["search", index, "a", "dog", "--show_weak", "--paths"]) == 0
    assert main(["index", str(image_folder), "--out", index]) == 0  # the model of the existing index
    output = capsys.readouterr().out
    assert "Images: 0 added" in output and "licence" not in output
    assert downloads == [(loading.DEFAULT_MODEL, loading.DEFAULT_REVISION)] * 3


# Maximum number of tokens, and whether the model reads padding up to that number.
CONTEXT = {
    "clip": (77, False),
    "siglip": (64, True),
    "siglip2": (64, True),
    "chinese_clip": (52, False),
    "align": (64, False),
    "altclip": (77, False),
    "metaclip_2": (77, False),
}


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images of different shapes."""
    folder = tmp_path_factory.mktemp("image_files")
    rng = np.random.default_rng(0)
    files = []
    for height, width in ((48, 48), (40, 90), (100, 37)):
        blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        pixels = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
        files.append(folder / f"{height}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def embed(model: DualEncoder, image_files: list[Path]) -> tuple[Tensor, Tensor]:
    images = model.encode_images([model.transform(load_image(file)) for file in image_files])
    texts = model.encode_texts(TEXTS)
    assert images.shape == (len(image_files), model.embed_dim) and texts.shape == (len(TEXTS), model.embed_dim)
    return images, texts


def assert_equal(ours: Tensor, reference: list[Tensor]) -> None:
    expected = F.normalize(torch.cat(reference).float(), dim=-1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (ours[0] - ours[1]).abs().max() > 1e-3  # otherwise, the comparison would prove nothing


@pytest.mark.parametrize("kind", CONTEXT)
@torch.no_grad()
def test_transformers_baseline_matches_transformers(kind: str, tmp_path: Path, image_files: list[Path]) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    make_model(tmp_path, kind)
    model = open_dual_encoder(str(tmp_path), "cpu")
    images, texts = embed(model, image_files)
    reference = AutoModel.from_pretrained(tmp_path).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    context_length, is_padded = CONTEXT[kind]
    padding = "max_length" if is_padded else False
    assert_equal(
        images,
        [
            reference.get_image_features(**processor(images=Image.open(file), return_tensors="pt")).pooler_output
            for file in image_files
        ],
    )
    expected = []
    for text in TEXTS:
        tokens = tokenizer(text, truncation=True, max_length=context_length, padding=padding, return_tensors="pt")
        expected.append(reference.get_text_features(**tokens).pooler_output)
    assert_equal(texts, expected)
    assert model.count_truncated_texts(TEXTS) == 1
    assert load_clip_text_encoder(str(tmp_path)).context_length == context_length


def test_texts_are_lower_cased_for_siglip2(tmp_path: Path) -> None:
    """SigLIP 2 was trained on lower-case text, which Gemma's tokenizer does not produce."""
    make_model(tmp_path, "siglip")
    model = load_clip_text_encoder(str(tmp_path), torch.device("cpu"))
    lower, upper = model.encode(["a dog", "A DOG"])
    assert torch.equal(lower, upper)
    make_model(tmp_path / "clip", "metaclip_2")
    lower, upper = load_clip_text_encoder(str(tmp_path / "clip"), torch.device("cpu")).encode(["a dog", "A DOG"])
    assert not torch.allclose(lower, upper, atol=1e-3)


@pytest.mark.parametrize("kind", ["clap", "owlvit", "aimv2", "tipsv2"])
def test_unsuitable_model_types_are_rejected(kind: str, tmp_path: Path) -> None:
    import transformers

    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"has the unsupported model type '{kind}'\. Supported model types: .*\.npz"):
        open_dual_encoder(str(tmp_path), "cpu")


# As EVA02-B-16 in open_clip: a timm tower without a projection, which has rotary position embeddings and SwiGLU.
EVA02 = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None, "image_size": 224}
OPEN_CLIP_VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}


def save_open_clip(folder: Path, model_config: dict[str, Any]) -> Any:
    """Save a random open_clip model with the given towers, and return it."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    from safetensors.torch import save_file

    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    preprocess = {"mean": CLIP_STATS["image_mean"], "std": CLIP_STATS["image_std"], "interpolation": "bicubic"}
    config = {"model_cfg": model_config | {"text_cfg": text}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.mark.parametrize("vision", [EVA02 | {"timm_model_pretrained": False}, OPEN_CLIP_VIT], ids=["eva02", "vit"])
@torch.no_grad()
def test_open_clip_baseline_matches_open_clip(vision: dict[str, Any], tmp_path: Path, image_files: list[Path]) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    towers = {"embed_dim": 192, "vision_cfg": vision, "custom_text": vision is not OPEN_CLIP_VIT}
    reference = save_open_clip(tmp_path, towers)
    model = open_dual_encoder(f"open_clip:{tmp_path}", "cpu")
    images, texts = embed(model, image_files)
    transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[2]
    assert_equal(images, [reference.encode_image(transform(Image.open(file))[None]) for file in image_files])
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    assert_equal(texts, [reference.encode_text(tokenize([text])) for text in TEXTS])
    assert model.count_truncated_texts(["word " * 100, *TEXTS]) == 1


# ---- models that come with their own code ----------------------------------------------------------------------------

# A model with the interface of Jina-CLIP's own code: encode_text and encode_image take strings and PIL images, and
# return normalised numpy arrays. The code records that it has been imported.
JINA_CODE = """
import numpy as np
import torch
from pathlib import Path
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

Path(MARKER).touch()

class TinyJinaConfig(PretrainedConfig):
    model_type = "tiny_jina_clip"

class TinyJinaModel(PreTrainedModel):
    config_class = TinyJinaConfig

    def __init__(self, config):
        super().__init__(config)
        self.text = nn.Embedding(256, 8)
        self.image = nn.Linear(3, 8)
        self.post_init()

    def _init_weights(self, module):
        pass

    @torch.inference_mode()
    def encode_text(self, sentences, batch_size=32):
        rows = [self.text(torch.tensor(list(s.encode()))).mean(0) for s in sentences]
        return nn.functional.normalize(torch.stack(rows), dim=-1).numpy()

    @torch.inference_mode()
    def encode_image(self, images, batch_size=32):
        colours = [torch.tensor(np.asarray(image.convert("RGB"))).float().mean((0, 1)) / 255 for image in images]
        return nn.functional.normalize(self.image(torch.stack(colours)), dim=-1).numpy()
"""


def make_remote_model(folder: Path, marker: Path) -> None:
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(JINA_CODE.replace("MARKER", repr(str(marker))))
    code = {"AutoConfig": "modeling_tiny.TinyJinaConfig", "AutoModel": "modeling_tiny.TinyJinaModel"}
    config = {"model_type": "tiny_jina_clip", "auto_map": code, "architectures": ["TinyJinaModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shapes = {"text.weight": (256, 8), "image.weight": (8, 3), "image.bias": (8,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def remote_model(tmp_path: Path, modules_cache: None) -> tuple[Path, Path]:
    """Folder of a model with its own code, and the file that this code creates when it runs."""
    make_remote_model(tmp_path / "tiny-jina", tmp_path / "ran")
    return tmp_path / "tiny-jina", tmp_path / "ran"


def test_jina_clip_needs_permission_to_run_its_code(
    remote_model: tuple[Path, Path], image_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel

    folder, marker = remote_model
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask in the terminal
    for load in (open_dual_encoder, load_clip_text_encoder, has_text_tower):
        with pytest.raises(ValueError, match=r"contains Python code.*--trust_remote_code"):
            load(str(folder))
    assert not marker.exists()

    model = open_dual_encoder(str(folder), "cpu", trust_remote_code=True)
    assert marker.exists()
    images, texts = embed(model, image_files)
    reference = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert_equal(images, [torch.from_numpy(reference.encode_image([Image.open(file)])) for file in image_files])
    assert_equal(texts, [torch.from_numpy(reference.encode_text([text])) for text in TEXTS])
    assert model.count_truncated_texts(TEXTS) is None  # only the model's own code knows


def test_evaluate_skips_a_baseline_whose_code_may_not_run(
    remote_model: tuple[Path, Path], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = remote_model
    make_model(tmp_path / "clip", "clip")
    command = ["evaluate", str(tmp_path / "clip"), f"{image_folder / 'captions.jsonl'}@val", "--baselines", str(folder)]
    assert main(command) == 1
    output = "".join(capsys.readouterr())
    assert "Skipped tiny-jina" in output and "--trust_remote_code" in output and "| tiny-jina |" not in output
    assert main([*command, "--trust_remote_code"]) == 0
    output = capsys.readouterr().out
    assert "Skipped" not in output and "| tiny-jina |" in output


# A sentence-transformers module as Jina-CLIP's custom_st.py: it takes strings and PIL images.
SENTENCE_TRANSFORMERS_CODE = """
import json
import torch
from torch import nn

class Transformer(nn.Module):
    save_in_root = True
    modalities = ["text", "image"]

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 8, generator=generator))

    def tokenize(self, inputs, padding=True):
        rows = []
        for item in inputs:
            values = item.encode() if isinstance(item, str) else item.convert("RGB").resize((3, 3)).tobytes()
            rows.append(torch.tensor(list(values.ljust(8)[:8])).float() / 255)
        return {"rows": torch.stack(rows)}

    def forward(self, features, task=None):
        features["sentence_embedding"] = features["rows"] @ self.weight
        return features

    @staticmethod
    def load(input_path, **kwargs):
        return Transformer()

    def save(self, output_path, **kwargs):
        pass
"""


def test_sentence_transformers_model_with_its_own_code(
    tmp_path: Path, image_files: list[Path], modules_cache: None
) -> None:
    from sentence_transformers import SentenceTransformer

    (tmp_path / "custom_st.py").write_text(SENTENCE_TRANSFORMERS_CODE)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "custom_st.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"st:.* contains Python code.*--trust_remote_code"):
        open_dual_encoder(f"st:{tmp_path}", "cpu")
    model = open_dual_encoder(f"st:{tmp_path}", "cpu", trust_remote_code=True)
    texts = ["a dog runs", "two cats on a mat"]
    images = model.encode_images([model.transform(load_image(file)) for file in image_files])
    reference = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    pil_images = [Image.open(file) for file in image_files]
    assert_equal(images, [reference.encode([image], convert_to_tensor=True) for image in pil_images])
    assert_equal(model.encode_texts(texts), [reference.encode([text], convert_to_tensor=True) for text in texts])

    # Without the list of modalities, sentence-transformers 6 takes the model for a text encoder.
    (tmp_path / "custom_st.py").write_text(SENTENCE_TRANSFORMERS_CODE.replace('modalities = ["text", "image"]', ""))
    with pytest.raises(ValueError, match=r"must encode images and texts .*omit the prefix st:"):
        open_dual_encoder(f"st:{tmp_path}", "cpu", trust_remote_code=True)

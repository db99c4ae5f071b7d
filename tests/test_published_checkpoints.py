"""Embeddings and logits equal to what the LLM2CLIP authors' classes compute (see official_reference.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.models.official_checkpoint import load_official_checkpoint
from llm2clip.models.published_encoders import TEMPLATE
from llm2clip.models.text.caption_encoder import CaptionEncoder
from official_reference import (
    FIXTURE,
    MAX_LENGTH,
    TEXTS,
    make_dummy_pixels,
    make_embeddings,
    make_weight,
    make_weights,
    save_llm,
)

REFERENCE: dict[str, Any] = json.loads(FIXTURE.read_text())
FORMS = ("eva", "openai", "siglip2")


def write_checkpoint(form: str, folder: Path) -> Path:
    """Write a checkpoint with the tensor names of a form and the weights that the reference was computed with."""
    shapes = {name: tuple(shape) for name, shape in REFERENCE[form]["shapes"].items()}
    torch.save(make_weights(shapes), folder / f"{form}.pt")
    return folder / f"{form}.pt"


def test_make_weight_is_the_same_on_every_machine() -> None:
    """The reference numbers belong to these weights."""
    expected = [[-0.04144620895, -0.98098444938, 0.96919274330], [0.48536586761, -0.63680696487, 0.88819217681]]
    torch.testing.assert_close(make_weight("visual.proj", (2, 3)), torch.tensor(expected), atol=1e-7, rtol=0)
    assert make_dummy_pixels(1, 2).flatten().tolist() == [111, 224, 24, 95, 186, 25, 89, 154, 102, 184, 231, 202]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_converted_checkpoint_matches_the_authors_classes(form: str, tmp_path: Path) -> None:
    model = load_official_checkpoint(write_checkpoint(form, tmp_path))
    reference = {name: torch.tensor(REFERENCE[form][name]) for name in ("image", "adapter", "logits")}
    image, text, scale, bias = model(pixels=make_dummy_pixels(), embeddings=make_embeddings())
    torch.testing.assert_close(image, reference["image"], atol=2e-6, rtol=0)
    torch.testing.assert_close(model.adapter(make_embeddings()), reference["adapter"], atol=5e-6, rtol=0)
    torch.testing.assert_close(scale * image @ text.T + bias, reference["logits"], atol=5e-5, rtol=0)


def test_siglip2_form_has_no_projection_and_does_not_normalise_caption_embeddings(tmp_path: Path) -> None:
    config = load_official_checkpoint(write_checkpoint("siglip2", tmp_path)).config
    assert not config.projection and not config.adapter.normalize_input and not config.logit_bias
    assert config.embed_dim == 128
    tensors = torch.load(write_checkpoint("siglip2", tmp_path)) | {"logit_bias": torch.tensor(-9.0)}
    torch.save(tensors, tmp_path / "bias.pt")
    model = load_official_checkpoint(tmp_path / "bias.pt")
    assert model.config.logit_bias and model()[3].item() == -9.0


# ---- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> CaptionEncoder:
    folder = save_llm(tmp_path_factory.mktemp("llm"))
    return CaptionEncoder.from_pretrained(folder, template=TEMPLATE, max_length=MAX_LENGTH, device="cpu")


@pytest.mark.parametrize("name", ["short", "longer", "other script", "spaces at the end"])
def test_caption_embedding_matches_the_authors_encode(name: str, encoder: CaptionEncoder) -> None:
    expected = torch.tensor([REFERENCE["texts"]["llm"][name]])
    torch.testing.assert_close(encoder.encode([TEXTS[name]]), expected, atol=1e-5, rtol=0)


def test_whitespace_around_a_caption_does_not_change_its_embedding(encoder: CaptionEncoder) -> None:
    """The authors' code removes whitespace only at the end, because a separator precedes the text."""
    plain, *others = encoder.encode(["a dog", "a dog \n", "\t a dog", TEXTS["spaces at both ends"]])
    assert all(torch.equal(plain, other) for other in others)
    prompted = encoder.encode(encoder.tokenize(["a dog", " a dog "], prompts=["find: ", "find: "]))
    assert torch.equal(prompted[0], prompted[1])


def test_truncated_caption_keeps_its_end_token_and_excludes_the_header_from_pooling(encoder: CaptionEncoder) -> None:
    """The authors' code drops the end token and includes the header in the mean."""
    text = TEXTS["longer than the window"]
    tokens = encoder.tokenize([text])
    (ids,) = tokens.ids
    assert len(ids) == MAX_LENGTH and tokens.truncated == [0] and ids[-1] == encoder.tokenizer.eos_token_id
    with torch.no_grad():
        hidden = encoder.llm(torch.tensor([ids])).last_hidden_state[0]
    mean = hidden[tokens.prompt_lengths[0] :].mean(0)
    torch.testing.assert_close(encoder.encode([text])[0], mean, atol=1e-5, rtol=0)
    assert not torch.allclose(mean, torch.tensor(REFERENCE["texts"]["llm"]["longer than the window"]), atol=1e-2)

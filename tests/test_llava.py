"""The vision tower inside a multimodal LLM: what is built, what is read, what is learned."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import Killed, distributed, make_llm, share_out
from llm2clip.cli import main
from llm2clip.config import LlavaConfig
from llm2clip.data.image_refs import FileImage
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.llava import train as training
from llm2clip.llava.build import assemble_llava, build_llava
from llm2clip.llava.chat_template import (
    IGNORED,
    IMAGE,
    Conversation,
    get_chat_template,
    to_messages,
    tokenize_and_label,
)
from llm2clip.llava.collator import ConversationDataset, LengthGroupedSampler, LlavaCollator
from llm2clip.llava.datasets import captioning_conversations, instruction_conversations, read_llava
from llm2clip.llava.image_features import LlavaImageProcessor
from llm2clip.llava.pope import Sampling, make_questions, mentioned_objects, read_objects
from llm2clip.llava.train import train_llava
from llm2clip.llava.verbs import _records
from llm2clip.models.vision_tower import VisionTower
from test_export import hf_tower, timm_tower

TOWERS = ["timm", "timm's transformer", "clip_vision_model", "clip at another size", "siglip_vision_model", "dinov2"]


def tower(kind: str, folder: Path) -> VisionTower:
    if kind == "timm":
        return timm_tower(64)
    if kind == "timm's transformer":
        torch.manual_seed(0)
        return VisionTower.from_pretrained("test_vit", image_size=64, pretrained=False)
    if kind == "clip at another size":
        return hf_tower(folder, "clip_vision_model", 48)
    return hf_tower(folder, kind)


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ---- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOWERS)
def test_the_llm_reads_projected_patches_in_the_image_s_place(
    kind: str, llm: Path, pictures: Path, tmp_path: Path
) -> None:
    """Against the parts one by one: features before the last block, projector, text, LLM."""
    seeing = tower(kind, tmp_path)
    model, processor = opened(build_llava(seeing, str(llm), tmp_path / "built"))
    picture = Image.open(pictures / "3.png").convert("RGB").crop((4, 0, 44, 40))
    asked = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**inputs).logits

    pixels = inputs["pixel_values"]
    backbone, size = seeing.backbone, seeing.preprocess.size
    with torch.no_grad():
        if kind == "timm":
            patches = backbone.forward_features(pixels).flatten(2).mT
        elif kind == "timm's transformer":
            seen = []
            backbone.blocks[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
            backbone(pixels)
            patches = seen[0][:, backbone.num_prefix_tokens :]
        else:
            more: dict[str, Any] = {"interpolate_pos_encoding": True} if size != 32 and kind != "dinov2" else {}
            patches = backbone(pixel_values=pixels, output_hidden_states=True, **more).hidden_states[-2]
            patches = patches if kind == "siglip_vision_model" else patches[:, 1:]
        projector = model.model.multi_modal_projector
        shown = F.linear(F.gelu(F.linear(patches, projector.linear_1.weight, projector.linear_1.bias)),
                         projector.linear_2.weight, projector.linear_2.bias)  # fmt: skip
        read = model.get_input_embeddings()(inputs["input_ids"])[0]
        at = (inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids(IMAGE)).nonzero()[:, 0]
        assert len(at) == patches.shape[1] == model.config.image_seq_length
        read = torch.cat([read[: at[0]], shown[0], read[at[-1] + 1 :]])
        states = model.model.language_model(inputs_embeds=read[None]).last_hidden_state
        expected = states @ model.get_input_embeddings().weight.T
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 3


def test_the_pipeline_opens_it_and_our_pixels_are_the_processor_s(llm: Path, pictures: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    folder = build_llava(timm_tower(76), str(llm), tmp_path / "built")
    asked = [{"role": "user", "content": [{"type": "image", "path": str(pictures / "1.png")}]}]
    said = pipeline("image-text-to-text", model=str(folder))(text=asked, max_new_tokens=4)
    assert said[0]["generated_text"][-1]["role"] == "assistant"

    picture = np.asarray(Image.open(pictures / "1.png").convert("RGB").crop((4, 0, 44, 40)))
    wide = np.asarray(Image.open(pictures / "1.png").convert("RGB"))
    for kind in ("timm", "siglip_vision_model"):
        processor = assemble_llava(tower_of_size(kind, tmp_path), _llm(llm), tokenizer_of(llm))[1]
        assert processor.image_processor.to_dict()["do_pad"] is (kind == "timm")
        for pixels in (picture, wide):
            ours = LlavaImageProcessor(processor)(torch.tensor(pixels).permute(2, 0, 1))
            theirs = processor.image_processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
            torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)
    cropped = assemble_llava(timm_tower(76), _llm(llm), tokenizer_of(llm), pad=False)[1]
    assert not cropped.image_processor.to_dict()["do_pad"]


def tower_of_size(kind: str, folder: Path) -> VisionTower:
    return timm_tower(76) if kind == "timm" else hf_tower(folder, kind, 40)


def test_llms_that_the_class_has_no_place_for_are_refused(tmp_path: Path) -> None:
    """Cohere scales its logits, and nothing of LLaVA's would."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    make_llm(tmp_path / "llm")  # for its tokenizer
    config = AutoConfig.for_model(
        "cohere", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=0.25, pad_token_id=0, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "cohere")
    tokenizer_of(tmp_path / "llm").save_pretrained(tmp_path / "cohere")
    with pytest.raises(ValueError, match="no place for"):
        build_llava(timm_tower(64), str(tmp_path / "cohere"), tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_an_answer_ends_where_the_template_ends_it(llm: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|stop|>{% endfor %}"
    decoder = _llm(llm)
    decoder.generation_config.eos_token_id = [0, 7]
    model, processor = assemble_llava(timm_tower(64), decoder, tokenizer)
    stop = processor.tokenizer.convert_tokens_to_ids("<|stop|>")
    assert model.generation_config.eos_token_id == sorted([0, 7, stop])


def test_the_command_takes_our_model_folders(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from search_fixtures import make_model

    ours = make_model(tmp_path)
    out = str(tmp_path / "built")
    assert main(["llava", "build", "--vision", str(ours), "--llm", str(llm), "--out", out]) == 0
    assert "1 tokens a picture" in capsys.readouterr().out
    trained = opened(tmp_path / "built")[0].model.vision_tower.timm_model.state_dict()
    from llm2clip import LLM2CLIP

    for name, tensor in LLM2CLIP.from_pretrained(ours).tower.backbone.state_dict().items():
        assert torch.equal(tensor, trained[name])
    assert main(["llava", "build", "--vision", str(ours), "--llm", str(llm), "--out", out]) == 1
    size = ["--image_size", "96"]
    assert main(["llava", "build", "--vision", str(ours), "--llm", str(llm), "--out", out + "2", *size]) == 1
    said = capsys.readouterr().err
    assert "is there already" in said and "was trained at 32 pixels" in said
    with pytest.raises(ValueError, match="does not give patches block by block"):
        hierarchical = VisionTower.from_pretrained("swin_tiny_patch4_window7_224", pretrained=False)
        build_llava(hierarchical, str(llm), tmp_path / "no")
    assert not (tmp_path / "no").exists() and not (tmp_path / "built2").exists()


def test_a_transformer_of_timm_is_opened_without_us(llm: Path, pictures: Path, tmp_path: Path) -> None:
    from test_export import alone

    folder = build_llava(tower("timm's transformer", tmp_path), str(llm), tmp_path / "built")
    model, processor = opened(folder)
    assert type(model).__module__ == "llm2clip.llava.modeling_patches"
    text = f"<|user|>{IMAGE}What?<|end|>"
    picture = Image.open(pictures / "3.png").convert("RGB")
    with torch.no_grad():
        expected = model(**processor(images=picture, text=text, return_tensors="pt")).logits
    code = f"""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER)
    with torch.no_grad():
        found["logits"] = model(**processor(images=images[0], text={text!r}, return_tensors="pt")).logits.numpy()
    """
    found = alone(textwrap.dedent(code), {"built": folder}, [pictures / "3.png"], tmp_path)["built"]["logits"]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)
    again = train_llava(str(folder), [Conversation("", FileImage(str(pictures / "3.png")), (("What?", "Red."),))], [],
                  SMALL, tmp_path / "run", SkipLog())  # fmt: skip
    assert (again / "modeling_patches.py").is_file() and "auto_map" in (again / "config.json").read_text()


# ---- conversations --------------------------------------------------------------------------------------------------


def test_a_space_of_an_answer_is_learned_whatever_its_offsets(llm: Path) -> None:
    """Tokenizers of some LLMs tell spaces alone as empty."""
    from tokenizers.processors import ByteLevel

    tokenizer = tokenizer_of(llm)
    assemble_llava(timm_tower(64), _llm(llm), tokenizer)
    plain_offsets = tokenize_and_label(Conversation("", None, (("What?", "A  big dog."),)), tokenizer, 1)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert tokenize_and_label(Conversation("", None, (("What?", "A  big dog."),)), tokenizer, 1) == plain_offsets


def test_what_another_row_says_of_a_picture_is_of_the_picture(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": str(pictures / f"{n}.png"), "caption": c} for n, c in ((1, "a dog"), (2, "a cat"), (1, "a man"))]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = _records([str(tmp_path / "x.jsonl")], {}, SkipLog())
    assert [r.captions for r in found] == [("a dog", "a man"), ("a cat",)]


def test_answers_alone_are_labelled(llm: Path) -> None:
    tokenizer = tokenizer_of(llm)
    assemble_llava(timm_tower(64), _llm(llm), tokenizer)  # adds <image>
    one = Conversation("", FileImage("x"), ((f"{IMAGE}\nWhat?", "A dog."), ("Sure?", " Yes. ")))
    marked = tokenize_and_label(one, tokenizer, 2)
    whole = "<|user|><image><image>\nWhat?<|end|><|user|>A dog.<|end|><|user|>Sure?<|end|><|user|>Yes.<|end|>"
    assert tokenizer.decode(marked.ids) == whole
    assert tokenizer.decode([label for label in marked.labels if label != IGNORED]) == "A dog.<|end|>Yes.<|end|>"
    assert all(label in (token, IGNORED) for token, label in zip(marked.ids, marked.labels, strict=True))

    tokenizer.chat_template = None  # Vicuna's, as LLaVA-1.5 was trained
    tokenizer.chat_template = get_chat_template(tokenizer)
    text = tokenizer.decode(tokenize_and_label(one, tokenizer, 1).ids)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    )
    assert text == system + "USER: <image>\nWhat? ASSISTANT: A dog.<|end|>USER: Sure? ASSISTANT: Yes.<|end|>"
    prompt = tokenizer.apply_chat_template(to_messages(one)[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt), "what is answered goes on where the prompt ends"

    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ValueError, match="no special token after an answer"):
        tokenize_and_label(one, tokenizer, 1)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="drops an answer"):
        tokenize_and_label(one, tokenizer, 1)


def _llm(folder: Path) -> Any:
    from llm2clip.llava.build import load_causal_llm

    return load_causal_llm(str(folder))


def said(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def test_files_in_llava_s_form(pictures: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "1.png", "conversations": said("<image>\nWhat?", "Red.", "Sure?", "Yes.")},
        {"id": "b", "conversations": said("Tell me.", "No.")},
        {"id": "c", "image": "none.png", "conversations": said("<image>\nWhat?", "Red.")},
        {"id": "d", "image": "../x.png", "conversations": said("What?\n<image>", "Red.")},
        {"id": "e", "conversations": said("Only a question")},
        {"id": "f", "conversations": said("What?", "  ")},
        {"conversations": list(reversed(said("a", "b")))},
        [1],
        {"id": "i", "conversations": said("Half an emoji \ud83d", "Yes.")},
        {"id": "j", "conversations": said("What is \ue0000\ue001?", "A mark of ours.")},
        {"id": "k", "conversations": [{"from": "human", "value": ["x"]}, {"from": "gpt", "value": "y"}]},
    ]
    file = tmp_path / "mix.json"
    file.write_text(json.dumps(rows))
    log = SkipLog(tmp_path / "skipped.jsonl", 1.0)
    found = read_llava(file, pictures, log)
    assert [one.id for one in found] == ["a", "b"] and found[1].image is None
    assert found[0].turns == (("What?", "Red."), ("Sure?", "Yes.")) and str(found[0].image) == str(pictures / "1.png")
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(one["row"], one["reason"]) for one in listed] == [
        (3, "no image"), *((n, "no conversation") for n in range(4, 12)),
    ]  # fmt: skip
    lines = tmp_path / "mix.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]) + "{broken\n")
    assert read_llava(lines, pictures, SkipLog(None, 1.0)) == found
    with pytest.raises(TooManySkipped):
        read_llava(file, pictures, SkipLog())


def test_records_as_questions_and_answers() -> None:
    records = [
        Record("1", FileImage("1.jpg"), ("A dog and a man.", "Two animals."), long_captions=("A dog. A man. Snow.",)),
        Record("2", FileImage("2.jpg"), ("A cat on a bench.",)),
        Record("3", None, ("A text.",)),
    ]
    captions = captioning_conversations(records)
    assert [one.turns[0][1] for one in captions] == [
        "A dog and a man.", "Two animals.", "A dog. A man. Snow.", "A cat on a bench.",
    ]  # fmt: skip
    questions = {one.turns[0][0] for one in captions}
    assert any("detail" in q or "long" in q or "paragraph" in q for q in questions)
    more = instruction_conversations(records)[len(captions) :]
    assert {one.id for one in more} == {"1", "2"}
    for one in more:
        answers = [answer for _, answer in one.turns]
        assert answers.count("Yes.") == answers.count("No.") > 0


# ---- POPE -----------------------------------------------------------------------------------------------------------


def test_objects_are_found_in_captions() -> None:
    names = read_objects(Path(training.__file__).with_name("objects.txt"))
    assert mentioned_objects(["Two MEN eat hot dogs near their bikes."], names) == {"person", "hot dog", "bicycle"}
    assert mentioned_objects(["A dogged catalogue of carpets"], names) == set()
    assert names["puppies"] == "dog" and names["benches"] == "bench" and names["buses"] == "bus"


def test_pope_s_three_samplings(tmp_path: Path) -> None:
    objects = tmp_path / "objects.txt"
    objects.write_text("dog\ncat  # purrs\nball: globe\nkite\nowl\n")
    shown = [("dog", "ball"), ("dog", "ball"), ("dog", "kite"), ("cat", "kite"), ("cat",), ("owl",), ("x",)]
    records = [
        Record(str(n), FileImage(f"{n}.jpg"), tuple(f"a {o.replace('ball', 'globe')} here" for o in some))
        for n, some in enumerate(shown)
    ]
    often = {"dog": 3, "ball": 2, "kite": 2, "cat": 2, "owl": 1}
    for sampling in Sampling:
        questions = make_questions(records, sampling, objects=objects)
        assert (
            len({(q.record, q.object) for q in questions})
            == len(questions)
            == 2 * sum(min(len(s), 3) for s in shown[:6])
        )
        for n, some in enumerate(shown[:6]):
            mine = [q for q in questions if q.record == n]
            assert {q.object for q in mine if q.answer == "yes"} == set(some)
            absent = [q.object for q in mine if q.answer == "no"]
            assert len(absent) == len(some) and not set(absent) & set(some)
            if sampling is Sampling.POPULAR:
                best = sorted((often[o] for o in often if o not in some), reverse=True)[: len(some)]
                assert sorted((often[o] for o in absent), reverse=True) == best
    adversarial = {
        q.record: q for q in make_questions(records, Sampling.ADVERSARIAL, objects=objects) if q.answer == "no"
    }
    assert adversarial[4].object == "kite"  # the cat's only companion
    assert make_questions(records, Sampling.RANDOM, objects=objects, seed=1) == make_questions(
        records, Sampling.RANDOM, objects=objects, seed=1
    )
    assert make_questions(records, Sampling.POPULAR, objects=objects)[-1].text == "Is there a dog in the image?"
    assert {q.text for q in make_questions(records, Sampling.RANDOM, objects=objects)} >= {
        "Is there an owl in the image?"
    }
    objects.write_text("dog: hound\ncat: hound\n")
    with pytest.raises(ValueError, match="'hound' is both 'dog' and 'cat'"):
        read_objects(objects.rename(tmp_path / "other.txt"))


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return build_llava(timm_tower(64), str(make_llm(folder / "llm", layers=2)), folder / "built")


@pytest.fixture(scope="module")
def talks(pictures: Path) -> list[Conversation]:
    records = list(open_records(f"{pictures / 'captions.jsonl'}@train"))
    return [*captioning_conversations(records)[:20], Conversation("text", None, (("Hello?", "Hello."),))]


SMALL = LlavaConfig(
    pretrain_epochs=1, pretrain_batch_size=4, epochs=1, batch_size=4, micro_batch_size=2, lr=1e-2, pretrain_lr=1e-2,
    save_steps=2, precision="fp32",
)  # fmt: skip


def state(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = opened(folder)[0].state_dict()
    return found


def test_each_stage_changes_its_own_weights(built: Path, talks: list[Conversation], tmp_path: Path) -> None:
    before = state(built)
    first = state(train_llava(str(built), talks, [], SMALL, tmp_path / "first", SkipLog()))
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    both = state(train_llava(str(built), talks, talks, SMALL, tmp_path / "both", SkipLog()))
    changed = {name for name in before if not torch.equal(first[name], both[name])}
    assert {name for name in before if "vision_tower" not in name} == changed
    lora = LlavaConfig(**{**vars(SMALL), "lora_r": 4, "lora_alpha": 8})
    low = state(train_llava(str(built), [], talks, lora, tmp_path / "lora", SkipLog()))
    changed = {name for name in before if not torch.equal(before[name], low[name])}
    assert changed == {n for n in before if "projector" in n or ("language_model" in n and "_proj" in n)}
    losses = [json.loads(line) for line in (tmp_path / "both/instruct/metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["train_loss"] > 0


def test_kept_features_train_as_pixels_do(built: Path, talks: list[Conversation], tmp_path: Path) -> None:
    kept = state(train_llava(str(built), talks, talks, SMALL, tmp_path / "kept", SkipLog()))
    assert (tmp_path / "kept/features/manifest.json").is_file()
    seen = LlavaConfig(**{**vars(SMALL), "cache_gb": 0})
    pixels = state(train_llava(str(built), talks, talks, seen, tmp_path / "pixels", SkipLog()))
    assert not (tmp_path / "pixels/features").exists()
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, pixels[name], atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize("case", ["convolutional", "CLIP", "LoRA"])
def test_goes_on_exactly_after_a_kill(
    case: str, built: Path, talks: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "CLIP":  # transformers writes its weights under other names than it has them
        built = build_llava(
            tower("clip_vision_model", tmp_path), str(make_llm(tmp_path / "llm", layers=2)), tmp_path / "b"
        )
    options = {"lora_r": 4, "lora_alpha": 8} if case == "LoRA" else {}
    recipe = LlavaConfig(**{**vars(SMALL), **options, "epochs": 2})
    whole = state(train_llava(str(built), talks, talks, recipe, tmp_path / "whole", SkipLog()))
    steps = 0

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (5, 13, 30):  # in the first stage, and in both epochs of the second
            raise Killed
        return step(self, *args, **kwargs)

    step = training._Trainer.training_step
    monkeypatch.setattr(training._Trainer, "training_step", killed)
    for _ in range(3):
        with pytest.raises(Killed):
            train_llava(str(built), talks, talks, recipe, tmp_path / "killed", SkipLog())
    broken = tmp_path / "killed/instruct/checkpoint-99"
    broken.mkdir(parents=True)  # half-written
    again = state(train_llava(str(built), talks, talks, recipe, tmp_path / "killed", SkipLog()))
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


def test_what_is_not_finite_is_no_model(built: Path, talks: list[Conversation], tmp_path: Path) -> None:
    wild = LlavaConfig(**{**vars(SMALL), "lr": 1e30, "pretrain_lr": 1e30})
    with pytest.raises(FloatingPointError):
        train_llava(str(built), talks, talks, wild, tmp_path / "run", SkipLog())
    assert not (tmp_path / "run/model").exists()


def test_settings_that_do_not_fit(built: Path, talks: list[Conversation], tmp_path: Path, caplog: Any) -> None:
    short = LlavaConfig(**{**vars(SMALL), "max_length": 40})
    with pytest.raises(ValueError, match="max_length must be"):
        train_llava(str(built), talks, [], short, tmp_path / "short", SkipLog())
    with pytest.raises(ValueError, match="no conversations"):
        train_llava(str(built), talks[-1:], [], SMALL, tmp_path / "none", SkipLog())
    bad = [Conversation("bad", FileImage(str(built / "config.json")), (("What?", "Red."),)), *talks[:7]]
    seen = LlavaConfig(**{**vars(SMALL), "cache_gb": 0})
    assert train_llava(str(built), bad, [], seen, tmp_path / "bad", SkipLog()).is_dir()
    assert "cannot be decoded" in caplog.text
    with pytest.raises(ValueError, match="nothing after it can be used"):
        train_llava(str(built), bad[:1], [], seen, tmp_path / "all", SkipLog())
    log = SkipLog(tmp_path / "skipped.jsonl", 0.5)
    assert train_llava(str(built), bad, [], SMALL, tmp_path / "kept", log).is_dir() and log.skipped.total() == 1


def _in_two(source: str, talks: list[Conversation], out: str) -> None:
    train_llava(source, talks, talks, TWO, Path(out), SkipLog())


TWO = LlavaConfig(**{**vars(SMALL), "epochs": 1, "micro_batch": 2})


def together_of(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch for a model that has its tower."""
    return {name: value for name, value in batch.items() if not name.startswith("vision_")}


def test_padding_changes_nothing_and_grouping_saves_it(built: Path, talks: list[Conversation]) -> None:
    model, processor = opened(built)
    data = ConversationDataset(talks, processor, 4, 512)
    collate = LlavaCollator(processor.tokenizer.pad_token_id, model.config.image_token_id, 4, torch.zeros(3, 64, 64))
    short, long = sorted((data[n] for n in range(20)), key=lambda item: len(item["ids"]))[::19]

    def logits(items: list[dict[str, Any]]) -> torch.Tensor:
        batch = {k: v for k, v in collate(items).items() if k in ("input_ids", "attention_mask", "pixel_values")}
        with torch.no_grad():
            found: torch.Tensor = model(**batch).logits
        return found

    together = collate([short, long])
    assert together["pixel_values"].shape[0] == 2 and together["input_ids"].shape[1] == len(long["ids"])
    kept = together["logits_to_keep"]
    assert together["labels"].shape[1] == kept < len(long["ids"])
    torch.testing.assert_close(logits([short])[0], logits([short, long])[0, : len(short["ids"])], atol=1e-5, rtol=1e-4)
    learned = [[label for label in row.tolist() if label != IGNORED] for row in together["labels"]]
    assert learned == [[label for label in item["labels"] if label != IGNORED] for item in (short, long)]
    whole = {k: v for k, v in together.items() if k in ("input_ids", "attention_mask", "pixel_values")}
    labels = torch.full_like(whole["input_ids"], IGNORED)
    labels[:, -kept:] = together["labels"]
    with torch.no_grad():
        torch.testing.assert_close(model(**together_of(together)).loss, model(**whole, labels=labels).loss)
    text = data[20]
    alone = model(input_ids=torch.tensor([text["ids"]])).logits[0]
    torch.testing.assert_close(logits([text])[0, : len(text["ids"])], alone, atol=1e-5, rtol=1e-4)

    lengths = np.random.default_rng(0).integers(10, 200, 1003)
    order = LengthGroupedSampler(lengths, 8, seed=1)
    first = list(order)
    assert sorted(first) == list(range(1003)) and first == list(order)
    order.set_epoch(1)
    assert first != list(order)
    padded = [
        sum(8 * max(lengths[some[n : n + 8]]) for n in range(0, 1000, 8)) for some in (np.array(first), np.arange(1003))
    ]
    assert padded[0] < 1.1 * lengths.sum() < 1.5 * lengths.sum() < padded[1]
    real = [len(data[n]["ids"]) for n in range(len(data))]
    assert np.corrcoef(real, data.lengths())[0, 1] > 0.9


def test_the_command_trains_on_records_and_on_llava_s_json(
    built: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mix.json"
    rows = [{"id": n, "image": f"{n}.png", "conversations": said("<image>\nWhat?", "It is red.")} for n in range(8)]
    file.write_text(json.dumps(rows))
    common = [
        "--llava.micro_batch_size",
        "4",
        "--llava.pretrain_batch_size",
        "16",
        "--llava.batch_size",
        "4",
        "--images",
        str(pictures),
    ]
    line = ["llava", "train", str(built), "--pretrain", f"{pictures}/captions.jsonl@train", "--instruct", str(file)]
    out = ["--out", str(tmp_path / "run")]
    assert main([*line, *out, *common]) == 0
    said_there = capsys.readouterr().out
    assert "105 conversations for the projector, 8 for the language model" in said_there
    assert opened(tmp_path / "run/model")[0].config.model_type == "fast_vlm"
    assert main([*line, *out, *common]) == 0, "again: it is there"
    assert main([*line, *out, *common, "--llava.lr", "1"]) == 1
    assert main(["llava", "train", str(built), "--out", str(tmp_path / "none")]) == 1
    assert "begun with other settings" in (err := capsys.readouterr().err) and "no conversations" in err


# ---- what it would take ---------------------------------------------------------------------------------------------


def test_the_plan_counts_what_a_step_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llm2clip.tools.plan.devices import Machine
    from llm2clip.tools.plan.flops import count_flops
    from llm2clip.tools.plan.llava import plan_llava

    llm = make_llm(tmp_path / "llm", layers=4)
    seeing = hf_tower(tmp_path, "clip_vision_model")
    model, processor = opened(build_llava(seeing, str(llm), tmp_path / "built"))
    model.set_attn_implementation("eager")  # whose products are counted
    talk = Conversation("", None, (("Q?", "An"),))
    ids = torch.tensor([tokenize_and_label(talk, processor.tokenizer, 0).ids])
    found = plan_llava(
        LlavaConfig(precision="fp32"), Machine("h100"), str(llm), str(tmp_path / "clip_vision_model"), None,
        {"pretrain": 1000, "instruct": 1000}, {"pretrain": ids.shape[1], "instruct": ids.shape[1]},
    )  # fmt: skip
    assert found.image_tokens == model.config.image_seq_length == 16
    counts = {
        "vision tower": sum(p.numel() for p in model.model.vision_tower.parameters()),
        "projector": sum(p.numel() for p in model.model.multi_modal_projector.parameters()),
        "language model": sum(p.numel() for p in model.model.language_model.parameters()),
    }
    assert found.parameters == counts
    for stage in ("pretrain", "instruct"):
        model.requires_grad_(stage == "instruct")
        inputs = model.get_input_embeddings()(torch.cat([ids.new_zeros(1, 16), ids], 1)).detach().requires_grad_()
        read = {"labels": ids, "logits_to_keep": ids.shape[1]}  # the picture's 16 tokens have no logits
        step = count_flops(lambda inputs=inputs, read=read: model(inputs_embeds=inputs, **read).loss.backward())
        assert found.flop[stage] == pytest.approx(step, rel=0.15), stage
    assert main(["llava", "plan", "--device", "a100-80", "--count", "8"]) == 0
    assert "does not fit into 80 GB: try --use_fsdp" in capsys.readouterr().out
    recipe = str(Path(__file__).parents[1] / "recipes/llava-1.5-7b.yaml")
    assert main(["llava", "plan", "--device", "a100-80", "--count", "8", "--use_fsdp", "--config", recipe]) == 0
    said = capsys.readouterr().out
    assert "576 tokens a picture" in said and said.count("(fits)") == 2


def _shared(source: str, talks: list[Conversation], out: str) -> None:
    from accelerate.state import AcceleratorState
    from torch.distributed.fsdp import FSDPModule

    share_out()
    AcceleratorState._reset_state(reset_partial_state=True)
    step, steps = training._Trainer.training_step, []

    def dies(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        inner = model.get_decoder() if hasattr(model, "get_decoder") else model
        assert isinstance(model, FSDPModule) and isinstance(inner.layers[0], FSDPModule)
        steps.append(1)
        if len(steps) in (3, 8):  # after a checkpoint of either stage
            raise Killed
        return step(self, model, *args, **kwargs)

    training._Trainer.training_step = dies  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(Killed):
            train_llava(source, talks, talks, TWO, Path(out), SkipLog())
    train_llava(source, talks, talks, TWO, Path(out), SkipLog())


@pytest.mark.parametrize("rank", [_in_two, _shared], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_one(rank: Any, built: Path, talks: list[Conversation], tmp_path: Path) -> None:
    """Even where a batch of one of them has no picture, and where the weights are shared out and the run is killed."""
    some = [*talks[:12], *[Conversation(f"t{n}", None, (("Hello?" * n, "Hi."),)) for n in range(1, 9)]]
    distributed(2, rank, str(built), some, str(tmp_path / "two"))
    one = state(train_llava(str(built), some, some, TWO, tmp_path / "one", SkipLog()))
    for name, tensor in state(tmp_path / "two/model").items():
        torch.testing.assert_close(tensor, one[name], atol=2e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")

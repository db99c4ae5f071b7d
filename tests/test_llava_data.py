"""Tests of LLaVA's training data: chat template, conversations, questions about objects, and batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_fixtures import load_model, load_tokenizer, make_conversations
from llm2clip.data.image_refs import FileImage
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog, TooManySkippedError
from llm2clip.llava.build import assemble_llava, load_causal_llm
from llm2clip.llava.conversations import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    OBJECTS_FILE,
    SHORT_ANSWER,
    Conversation,
    convert_to_chat_messages,
    find_mentioned_objects,
    get_chat_template,
    make_captioning_conversations,
    make_instruction_conversations,
    make_object_conversations,
    read_conversations,
    read_llava_file,
    read_object_synonyms,
    tokenize_and_label,
)
from llm2clip.llava.dataset import ConversationDataset, LengthGroupedSampler, LlavaCollator
from test_export import timm_tower

# ---- chat template --------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(llm: Path) -> Any:
    """A tokenizer with an image token."""
    tokenizer = load_tokenizer(llm)
    assemble_llava(timm_tower(64), load_causal_llm(str(llm)), tokenizer)
    return tokenizer


DIALOG = Conversation("", FileImage("x"), ((f"{IMAGE_TOKEN}\nWhat?", "A dog."), ("Sure?", " Yes. ")))


def test_tokenize_and_label_labels_only_answers(tokenizer: Any) -> None:
    ids, labels = tokenize_and_label(DIALOG, tokenizer, num_image_tokens=2)
    text = "<|user|><image><image>\nWhat?<|end|><|user|>A dog.<|end|><|user|>Sure?<|end|><|user|>Yes.<|end|>"
    assert tokenizer.decode(ids) == text
    answers = [label for label in labels if label != IGNORE_INDEX]
    assert tokenizer.decode(answers) == "A dog.<|end|>Yes.<|end|>"
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))


def test_tokenize_and_label_does_not_depend_on_trimmed_offsets(tokenizer: Any) -> None:
    """Some tokenizers report empty offsets for tokens that are only spaces."""
    from tokenizers.processors import ByteLevel

    conversation = Conversation("", None, (("What?", "A  big dog."),))
    expected = tokenize_and_label(conversation, tokenizer, 1)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert tokenize_and_label(conversation, tokenizer, 1) == expected


def test_get_chat_template_falls_back_to_vicuna(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    tokenizer.chat_template = get_chat_template(tokenizer)
    text = tokenizer.decode(tokenize_and_label(DIALOG, tokenizer, 1).ids)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
    )
    assert text == system + "USER: <image>\nWhat? ASSISTANT: A dog.<|end|>USER: Sure? ASSISTANT: Yes.<|end|>"
    prompt = tokenizer.apply_chat_template(
        convert_to_chat_messages(DIALOG)[:1], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(prompt), "generation must continue exactly like the training text"


def test_tokenize_and_label_rejects_unusable_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ValueError, match="no special token after an answer"):
        tokenize_and_label(DIALOG, tokenizer, 1)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="omits an answer"):
        tokenize_and_label(DIALOG, tokenizer, 1)


# ---- conversations --------------------------------------------------------------------------------------------------


def messages(*texts: str) -> list[dict[str, str]]:
    """Return messages in LLaVA's format."""
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


LLAVA_ROWS = [
    {"id": "a", "image": "1.png", "conversations": messages("<image>\nWhat?", "Red.", "Sure?", "Yes.")},
    {"id": "b", "conversations": messages("Tell me.", "No.")},
    {"id": "c", "image": "missing.png", "conversations": messages("<image>\nWhat?", "Red.")},
    {"id": "d", "image": "../x.png", "conversations": messages("What?\n<image>", "Red.")},
    {"id": "e", "conversations": messages("Only a question")},
    {"id": "f", "conversations": messages("What?", "  ")},
    {"conversations": list(reversed(messages("a", "b")))},
    [1],
    {"id": "i", "conversations": messages("Half an emoji \ud83d", "Yes.")},
    {"id": "j", "conversations": messages("What is \ue0000\ue001?", "A reserved character.")},
    {"id": "k", "conversations": [{"from": "human", "value": ["x"]}, {"from": "gpt", "value": "y"}]},
]


@pytest.mark.parametrize("name", ["mix.json", "mix.jsonl"])
def test_read_llava_file_skips_and_logs_invalid_rows(name: str, image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    lines = "".join(f"{json.dumps(row)}\n" for row in LLAVA_ROWS)
    file.write_text(lines if name.endswith("l") else json.dumps(LLAVA_ROWS))
    conversations = read_llava_file(file, image_folder, SkipLog(tmp_path / "skipped.jsonl", 1.0))
    assert [conversation.id for conversation in conversations] == ["a", "b"]
    assert conversations[0].turns == (("What?", "Red."), ("Sure?", "Yes."))
    assert str(conversations[0].image) == str(image_folder / "1.png")
    assert conversations[1].image is None
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    expected = [(3, "no image"), *((row, "no conversation") for row in range(4, 12))]
    assert [(entry["row"], entry["reason"]) for entry in skipped] == expected
    with pytest.raises(TooManySkippedError):
        read_llava_file(file, image_folder, SkipLog())


def test_read_conversations_merges_rows_of_the_same_image(image_folder: Path, tmp_path: Path) -> None:
    rows = [(1, "a dog"), (2, "a cat"), (1, "a man")]
    lines = [json.dumps({"image": str(image_folder / f"{n}.png"), "caption": caption}) + "\n" for n, caption in rows]
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(lines))
    records: list[Record] = []

    def collect(source: Any, seed: int) -> list[Conversation]:
        records.extend(source)
        return []

    read_conversations([str(file)], collect, log=SkipLog())
    assert [record.captions for record in records] == [("a dog", "a man"), ("a cat",)]


def test_conversations_are_made_from_captions() -> None:
    records = [
        Record("1", FileImage("1.jpg"), ("A dog and a man.", "Two animals."), long_captions=("A dog. A man. Snow.",)),
        Record("2", FileImage("2.jpg"), ("A cat on a bench.",)),
        Record("3", None, ("A text.",)),
    ]
    captioning = make_captioning_conversations(records)
    assert [conversation.turns[0][1] for conversation in captioning] == [
        "A dog and a man.", "Two animals.", "A dog. A man. Snow.", "A cat on a bench.",
    ]  # fmt: skip
    prompts = {conversation.turns[0][0] for conversation in captioning}
    assert any(word in prompt for prompt in prompts for word in ("detail", "long", "paragraph"))
    assert make_instruction_conversations(records) == captioning + make_object_conversations(records)


# ---- questions about objects ----------------------------------------------------------------------------------------


def test_mentioned_objects_match_synonyms_plurals_and_longest_names() -> None:
    names = read_object_synonyms(OBJECTS_FILE)
    assert find_mentioned_objects(["Two MEN eat hot dogs near their bikes."], names) == {"person", "hot dog", "bicycle"}
    assert find_mentioned_objects(["A dogged catalogue of carpets"], names) == set()
    assert names["puppies"] == "dog"
    assert names["benches"] == "bench"
    assert names["buses"] == "bus"


def test_read_object_synonyms_rejects_a_name_of_two_objects(tmp_path: Path) -> None:
    file = tmp_path / "objects.txt"
    file.write_text("dog: hound\ncat: hound\n")
    with pytest.raises(ValueError, match="'hound' is a name for both 'dog' and 'cat'"):
        read_object_synonyms(file)


def test_object_conversations_ask_about_present_and_absent_objects(tmp_path: Path) -> None:
    objects_file = tmp_path / "objects.txt"
    objects_file.write_text("dog\ncat  # purrs\nball: globe\nkite\nowl\n")
    present = [("dog", "ball"), ("dog", "ball"), ("dog", "kite"), ("cat", "kite"), ("cat",), ("owl",)]
    records = []
    for n, objects in enumerate([*present, ("x",)]):  # the last captions name no object
        captions = tuple(f"a {name.replace('ball', 'globe')} here" for name in objects)
        records.append(Record(str(n), FileImage(f"{n}.jpg"), captions))
    conversations = make_object_conversations(records, seed=1, objects_file=objects_file)
    assert conversations == make_object_conversations(records, seed=1, objects_file=objects_file)
    assert [conversation.id for conversation in conversations] == ["0", "1", "2", "3", "4", "5"]
    questions = {question for conversation in conversations for question, _ in conversation.turns}
    assert {"Is there an owl in the image?", "Is there a dog in the image?"} <= questions
    for conversation, objects in zip(conversations, present, strict=True):
        objects_by_answer: dict[str, set[str]] = {"Yes": set(), "No": set()}
        for n, (question, answer) in enumerate(conversation.turns):
            assert question.endswith(SHORT_ANSWER) is (n == 0)
            objects_by_answer[answer].add(question.removesuffix(SHORT_ANSWER).split()[3])
        assert objects_by_answer["Yes"] == set(objects)
        assert len(objects_by_answer["No"] - set(objects)) == len(objects)
        assert len(conversation.turns) == 2 * len(objects)


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversations(image_folder: Path) -> list[Conversation]:
    return make_conversations(image_folder)


def test_llava_collator_padding_does_not_change_the_logits_and_loss(
    tiny_llava: Path, conversations: list[Conversation]
) -> None:
    model, processor = load_model(tiny_llava)
    dataset = ConversationDataset(conversations, processor, num_image_tokens=4, max_length=512)
    collate = LlavaCollator(processor.tokenizer, num_image_tokens=4, empty_image=torch.zeros(3, 64, 64))

    def without(batch: dict[str, Any], *prefixes: str) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if not name.startswith(prefixes)}

    def logits(items: list[dict[str, Any]]) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = model(**without(collate(items), "vision_", "labels", "logits_to_keep")).logits
        return output

    items = sorted((dataset[n] for n in range(20)), key=lambda item: len(item["ids"]))
    short, long = items[0], items[-1]
    batch = collate([short, long])
    assert batch["pixel_values"].shape[0] == 2
    assert batch["input_ids"].shape[1] == len(long["ids"])
    assert batch["labels"].shape[1] == batch["logits_to_keep"] < len(long["ids"])
    labels = [[label for label in row.tolist() if label != IGNORE_INDEX] for row in batch["labels"]]
    assert labels == [[label for label in item["labels"] if label != IGNORE_INDEX] for item in (short, long)]
    length = len(short["ids"])
    torch.testing.assert_close(logits([short])[0], logits([short, long])[0, :length], atol=1e-5, rtol=1e-4)

    full_labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    full_labels[:, -batch["logits_to_keep"] :] = batch["labels"]
    with torch.no_grad():
        loss = model(**without(batch, "vision_")).loss
        full_loss = model(**without(batch, "vision_", "labels", "logits_to_keep"), labels=full_labels).loss
    torch.testing.assert_close(loss, full_loss)

    text_only = dataset[20]
    expected = model(input_ids=torch.tensor([text_only["ids"]])).logits[0]
    with_empty_image = logits([text_only])[0, : len(text_only["ids"])]
    torch.testing.assert_close(with_empty_image, expected, atol=1e-5, rtol=1e-4)


def test_conversation_dataset_lengths_correlate_with_token_counts(
    tiny_llava: Path, conversations: list[Conversation]
) -> None:
    dataset = ConversationDataset(conversations, load_model(tiny_llava)[1], num_image_tokens=4, max_length=512)
    token_counts = [len(dataset[n]["ids"]) for n in range(len(dataset))]
    assert np.corrcoef(token_counts, dataset.estimate_token_counts())[0, 1] > 0.9


def test_length_grouped_sampler_reduces_padding() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 1003)
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert order == list(sampler)

    def padded_tokens(indices: Any) -> int:
        return sum(8 * max(lengths[indices[n : n + 8]]) for n in range(0, 1000, 8))

    assert padded_tokens(np.array(order)) < 1.1 * lengths.sum() < 1.5 * lengths.sum() < padded_tokens(np.arange(1003))
    sampler.set_epoch(1)
    assert order != list(sampler)

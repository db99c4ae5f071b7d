"""Captioners of `llm2clip caption`: prompts, cleaning of answers, refusals, endpoints and models in this process."""

import asyncio
import gzip
import json
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import constants

from caption_fixtures import caption, make_photos, read_rows, run_command, run_server, write_prompts
from llava_fixtures import load_model
from llm2clip.caption import captioners
from llm2clip.caption.answers import Answer, CaptionRequest, convert_output_to_answer, is_refusal
from llm2clip.caption.captioners import LocalCaptioner
from llm2clip.caption.database import CaptionDatabase
from llm2clip.caption.options import Prompt, load_prompts
from llm2clip.data.skip_log import TooManySkippedError
from llm2clip.data.storage import parse_retry_after
from llm2clip.models.loading import get_model_name_with_hash

KEY = "sk-very-secret"
CAPTIONS_PER_IMAGE = 3
REFUSALS = [
    "I’m sorry, but I can't help with that.",
    "Sorry.",
    "I'm sorry for the confusion, but there is no image attached to your message.",
    "Apologies, but I cannot see the picture you are referring to.",
    "My apologies, I don't have the ability to view images.",
    "I cannot identify people.",
    "I don't see any image in this conversation.",
    "I'm currently unable to view or describe images.",
    "I must decline to describe this image.",
    "As an AI language model, I see a dog.",
    "As a large language model, I cannot view images.",
    "I'm an AI assistant and cannot view photos.",
    "There is no image provided, so I cannot write a caption.",
    "I'm really sorry, but I can't recognize people in this image.",
    "I can't help identify who this is.",
    "It seems that no image was attached.",
    "No image has been provided.",
    "It looks like you didn't include an image.",
    "I'm unable to write captions without a photo.",
    "It looks like you haven't uploaded an image yet.",
    "The image could not be loaded.",
    "Could you please upload the image again?",
    "This request violates the content policy.",
    "Es tut mir leid, aber ich kann dieses Bild nicht beschreiben.",
    "Leider kann ich keine Bilder sehen.",
    "Je suis désolé, mais je ne peux pas vous aider.",
    "Lo siento, pero no puedo describir esta imagen.",
    "很抱歉，我无法查看图片。",
    "对不起，我不能识别图中的人物。",
    "对不起，我不能提供帮助。",
    "Bitte lade das Bild hoch.",
    "No tengo acceso a la imagen.",
    "申し訳ありませんが、この画像を説明することはできません。",
]
# These begin like refusals.
CAPTIONS = [
    "There are no images attached to the wall.",
    "There is no picture on the wall behind the sofa.",
    "No pictures provided a better view than this mountain.",
    "The photo does not display any people, only trees.",
    "I don't see any people in this image, only an empty street.",
    "Sorry sign hangs on a door.",
    "Sorry, we're closed, says a sign in a shop window.",
    "Unfortunately dressed for the rain, two hikers run across a meadow.",
    "I can't believe it is not butter, says a poster.",
    "I can't help falling in love, says a banner at a wedding.",
    "I do not have a dream, says a graffito on a brick wall.",
    "I am unable to stop, reads the sticker on the back of a truck.",
    "As an AI robot serves coffee, three guests take photos.",
    "As an artificial Christmas tree glows, a cat sleeps under it.",
    "Please share the road, says a yellow sign beside a cyclist.",
    "It looks like a storm is coming over the wheat field.",
    "Ich kann nicht mehr, steht auf einem T-Shirt.",
    "Je ne regrette rien, dit une affiche sur un mur.",
    "Désolé, fermé, dit une pancarte sur la porte.",
    "No puedo vivir sin ti está escrito en una pared.",
    "Lo siento, cerrado, dice un cartel en la puerta.",
    "无法辨认的文字写在墙上。",
    "我爱你写在沙滩上。",
    "申し訳なさそうな顔の犬がソファに座っている。",
]


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "FIRST_DELAY", 0.01)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 6)


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must map prompt names to fields"),
        ("a: [", "not a valid YAML file"),
        ("a: {kind: short, text: x}\na: {kind: dense, text: x}", "several prompts have the name a"),
        ("A B: {kind: short, text: x}", "the name of a prompt must consist of a-z, 0-9 and _ .got 'A B'"),
        ("a: text", "prompt a: the prompt must have fields of the form `name: value`"),
        ("a: {kind: short}", "prompt a: the field text is missing"),
        ("a: {kind: short, text: x, tokens: 5}", "prompt a: unknown field 'tokens'; available fields: kind, text"),
        ("a: {kind: long, text: x}", "prompt a: kind must be short or dense .got 'long'"),
        ("a: {kind: short, text: 5}", "prompt a: text must be a text of 1 to 20,000 characters .got 5"),
        ("a: {kind: short, text: x, samples: 0}", "prompt a: samples must be an integer from 1 to 100 .got 0"),
        ("a: {kind: short, text: x, samples: true}", "prompt a: samples must be an integer from 1 to 100 .got True"),
        ("a: {kind: short, text: x, temperature: hot}", "prompt a: temperature must be a number from 0 to 2"),
        ("a: {kind: short, text: x, max_tokens: 1.5}", "prompt a: max_tokens must be an integer from 1 to 8192"),
        ("a: {kind: short, text: 'Say {caption}'}", "prompt a: text must contain a line without"),
    ],
)
def test_prompt_errors_name_file_prompt_and_field(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(file)
    assert str(file) in str(error.value)


def test_default_prompts_give_two_short_captions_and_a_dense_one() -> None:
    prompts = load_prompts()
    assert [(prompt.kind, prompt.samples) for prompt in prompts] == [("short", 1), ("short", 1), ("dense", 1)]
    assert {prompt.key for prompt in prompts}.isdisjoint(prompt.key for prompt in load_prompts(language="German"))
    assert {prompt.key for prompt in prompts}.isdisjoint(prompt.key for prompt in load_prompts(use_captions=True))


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ('"A dog runs."\n', "A dog runs."),
        ("<think>A dog? A cat?</think>\n\nA dog runs.", "A dog runs."),
        ("A dog? A cat?</think>A dog runs.", "A dog runs."),
        ("**Caption:** A *dog* runs.", "A *dog* runs."),
        ("# Image\n\n- A dog runs.\n- It is `brown`.", "Image A dog runs. It is brown."),
        ("A dog\x00 \x1b[31mruns\u202e.", "A dog [31mruns."),
        ("Ein Hund sagt „Wau“ und rennt.", "Ein Hund sagt „Wau“ und rennt."),
        ('"Stop" is on the "sign"', '"Stop" is on the "sign"'),
        ("A man, sorry for the dog, cannot see.", "A man, sorry for the dog, cannot see."),
    ],
)
def test_answers_are_cleaned(text: str, caption: str) -> None:
    assert convert_output_to_answer(text, truncated=False) == Answer(caption)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (" \n", "empty"),
        ("...", "empty"),
        ("I'm sorry, but I can't.", "refusal"),
        ("<think>A dog? " * 3, "reasoning"),
        ("word " * 5000, "too long"),
    ],
)
def test_refusals_and_useless_answers_become_errors(text: str, error: str) -> None:
    answer = convert_output_to_answer(text, truncated=False, input_tokens=3)
    assert answer.text is None and error in str(answer.error) and answer.input_tokens == 3


@pytest.mark.parametrize(
    "part",
    [
        *("<think>", "</think>", "**a ", "`a `", "\n", " ", "- ", "a.", "#", '"', "sorry ", "i can't "),
        *("i can't see the ", "there is no ", "ich kann ", "je ne peux pas ", "我无法", "画像"),
    ],
)
def test_cleaning_hostile_answers_takes_linear_time(part: str) -> None:
    start = time.process_time()
    convert_output_to_answer(part * (99_000 // len(part)), truncated=True)
    is_refusal(part * (99_000 // len(part)) + "x")
    assert time.process_time() - start < 1


def test_truncated_answers_end_with_a_complete_sentence() -> None:
    assert convert_output_to_answer("A dog runs. It is bro", truncated=True).text == "A dog runs."
    assert convert_output_to_answer("A dog that is bro", truncated=True).text is None


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_recognised(text: str) -> None:
    answer = convert_output_to_answer(text, truncated=False)
    assert answer.text is None and answer.error is not None and answer.error.startswith("refusal")


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_that_begin_like_refusals_are_accepted(text: str) -> None:
    assert convert_output_to_answer(text, truncated=False).text == text


# ---- endpoint --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (f"401:bad\x1b[31m key {KEY}", r"HTTP 401: bad\x1b[31m key [key]. Put the API key"),
        ("404:no model", "HTTP 404: no model. Check --model"),
        ("redirect", "redirects to http://other.example/v1/chat/completions. Redirects are not followed"),
    ],
)
def test_rejected_first_requests_stop_the_run(
    tmp_path: Path, photos: Path, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(captioners.KEY_VARIABLE, KEY)
    with run_server(faults=[fault] * 99) as server, pytest.raises(captioners.EndpointError) as error:
        caption(server, photos, tmp_path / "out.jsonl", "--concurrency", "2")
    assert message in str(error.value) and KEY not in str(error.value)
    assert server.num_requests <= 2


@pytest.mark.parametrize(
    ("fault", "num_faults", "message"),
    [
        ("400:too narrow", 3, None),  # a single image that the server rejects
        ("400:this model takes no images", 99, r"the last 7 requests failed.*this model takes no images"),
        ("disconnect", 99, r"the last 7 requests failed. the connection failed"),
    ],
)
def test_run_stops_if_all_requests_fail(
    tmp_path: Path, photos: Path, fault: str, num_faults: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioners, "MAX_FAILURES_IN_A_ROW", 7)
    flags = ["--concurrency", "1", "--max_skipped", "1", "--retries", "0"]
    expected_error = nullcontext() if message is None else pytest.raises(captioners.EndpointError, match=message)
    with run_server(faults=[fault] * num_faults) as server, expected_error:
        caption(server, photos, tmp_path / "out.jsonl", *flags)
    if message is None:
        assert len(read_rows(tmp_path / "out_failures.jsonl")) == CAPTIONS_PER_IMAGE
    assert server.num_requests == (6 * CAPTIONS_PER_IMAGE if message is None else 7)


def test_run_stops_soon_if_no_server_responds(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "MAX_CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(captioners, "FIRST_DELAY", 0.06)
    with run_server() as server:
        pass  # nothing listens on its port any more
    message = r"no server responds at 127\.0\.0\.1:\d+ \(.*\)\. Start the server, or check the URL"
    with pytest.raises(OSError, match=message):
        caption(server, photos, tmp_path / "out.jsonl")
    monkeypatch.setattr("llm2clip.cli.caption._check_connection", lambda *_: None)  # as if it stopped after this check
    start = time.monotonic()
    with pytest.raises(captioners.EndpointError, match=message):
        caption(server, photos, tmp_path / "out.jsonl")
    assert time.monotonic() - start < 5


def test_proxy_is_used_only_for_encrypted_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    def uses_proxy(url: str) -> bool:
        client = captioners.EndpointCaptioner(url, "tiny")._client
        return any(transport is not None for transport in client._mounts.values())

    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://proxy.example:3128")
    assert uses_proxy("https://server.example/v1")
    assert not uses_proxy("http://server.example/v1") and not uses_proxy("https://localhost/v1")


def test_key_is_sent_but_never_written(
    tmp_path: Path, photos: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(captioners.KEY_VARIABLE, KEY)
    with run_server(faults=["", *["403"] * 5], fault_rate=0.2) as server:  # these errors repeat the key
        server.answers["paragraph"] = f"A dog with the key {KEY} runs over a meadow. It wears a red collar."
        flags = ["--retries", "0", "--concurrency", "1", "--max_skipped", "1"]
        caption(server, photos, tmp_path / "out.jsonl", *flags)
    assert server.keys == {f"Bearer {KEY}"}
    assert "[key]" in (tmp_path / "out_failures.jsonl").read_text()
    assert "with the key [key] runs" in (tmp_path / "out.jsonl").read_text()
    assert KEY not in "".join(capfd.readouterr())
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("fault", ["slow headers", "slow body"])
def test_timeout_limits_the_time_of_the_entire_response(tmp_path: Path, photos: Path, fault: str) -> None:
    """The server sends a byte every 50 ms, so no single read takes long."""
    out, flags = tmp_path / "out.jsonl", ["--concurrency", "1", "--timeout", "1"]
    start = time.monotonic()
    with run_server(faults=["", fault, "", fault]) as server:
        caption(server, photos, out, *flags, "--retries", "0")
        assert time.monotonic() - start < 10
        failures = read_rows(tmp_path / "out_failures.jsonl")
        assert [row["error"] for row in failures] == ["no response within 1 seconds"] * 2
        caption(server, photos, out, *flags)
    assert set(server.answered.values()) == {1} and len(server.answered) == 6 * CAPTIONS_PER_IMAGE


def test_retry_after_delays_the_next_attempt(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    start = time.monotonic()
    with run_server(faults=["429:0.7"]) as server:
        caption(server, photos, tmp_path / "out.jsonl", "--concurrency", "1")
    assert time.monotonic() - start > 0.7 and len(server.answered) == CAPTIONS_PER_IMAGE


@pytest.mark.parametrize(
    ("value", "lowest", "highest"), [("2.5", 2.5, 2.5), ("-1", -1, -1), ("soon", 0, 0), ("", 0, 0), (None, 20, 30)]
)
def test_retry_after_can_be_seconds_or_a_date(value: str | None, lowest: float, highest: float) -> None:
    date = formatdate(time.time() + 30, usegmt=True)
    assert lowest <= parse_retry_after(date if value is None else value) <= highest


def test_newer_name_of_max_tokens_is_used_if_the_server_needs_it(tmp_path: Path, photos: Path) -> None:
    with run_server(delay=0.05) as server:
        server.rejected_field = "max_tokens"
        caption(server, photos, tmp_path / "out.jsonl", "--concurrency", "8")
    assert len(server.answered) == 6 * CAPTIONS_PER_IMAGE
    assert all("max_completion_tokens" in body and "max_tokens" not in body for body in server.bodies)


def test_refused_filtered_and_compressed_responses_are_not_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(message: dict[str, Any], reason: str = "stop") -> Answer:
        choice = {"message": message, "finish_reason": reason}
        return captioners._parse_chat_response(json.dumps({"choices": [choice]}).encode())

    assert parse({"content": "A dog runs."}).text == "A dog runs."
    monkeypatch.setenv(captioners.KEY_VARIABLE, KEY)
    assert KEY[:5] not in str(parse({"content": "Sorry. " + "x" * 187 + KEY}).error)  # truncated within the key
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "A dog "}, {"text": "runs."}]
    assert parse({"content": parts}).text == "A dog runs."
    assert "empty answer" in str(parse({"content": None, "refusal": "Our policy is violated."}).error)
    assert "content filter" in str(parse({"content": "A man in a park is about to"}, "content_filter").error)
    response = httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=gzip.compress(b"x"))
    with pytest.raises(captioners._RequestError, match="compressed"):
        asyncio.run(captioners._read_body_with_size_limit(response))


@pytest.mark.parametrize("content", [5, {"text": "A dog runs."}, ["A dog runs."], [{"text": 5}]])
def test_answers_with_unsupported_content_are_not_requested_again(tmp_path: Path, content: Any) -> None:
    with run_server() as server:
        server.answers["one sentence"] = content
        caption(server, make_photos(tmp_path / "photos", 1), tmp_path / "out.jsonl")
    assert set(server.answered.values()) == {1} and server.num_requests == CAPTIONS_PER_IMAGE
    assert "the content of the response is not text" in (tmp_path / "out_failures.jsonl").read_text()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "must be of the form http://HOST"),
        ("http://user:password@host/v1", "must not contain a user name"),
        ("https://host/v1?key=1", "must not contain a user name, a password or a query"),
    ],
)
def test_invalid_endpoints_are_rejected(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        captioners.EndpointCaptioner(url, "tiny")


def test_unencrypted_connections_to_other_machines_are_reported() -> None:
    assert len(captioners.EndpointCaptioner("http://127.0.0.1:1/v1", "tiny").describe_endpoint()) == 1
    assert len(captioners.EndpointCaptioner("https://example.org/v1", "tiny").describe_endpoint()) == 1
    first, second = captioners.EndpointCaptioner("http://example.org/v1", "tiny").describe_endpoint()
    assert first == "Images are sent to http://example.org (model tiny)." and "not encrypted" in second


# ---- model in this process -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("accept_all")
def test_local_model_captions_images_and_resumes(
    tmp_path: Path, photos: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_prompts(
        tmp_path / "prompts.yaml",
        one={"kind": "short", "text": "Describe.", "samples": 2, "max_tokens": 5, "temperature": 1.0},
        two={"kind": "dense", "text": "Describe all.", "max_tokens": 9},
    )
    batches = []
    generate_answers = LocalCaptioner.generate_answers

    def record(self: LocalCaptioner, requests: list[CaptionRequest]) -> list[Answer]:
        batches.append([request.prompt.name for request in requests])
        return generate_answers(self, requests)

    monkeypatch.setattr(LocalCaptioner, "generate_answers", record)
    words = ["caption", photos, "--model", tiny_llava, "--prompts", file, "--batch_size", 4]
    for _ in range(2):
        run_command(*words, "--out", tmp_path / "out.jsonl")
    assert sorted(map(tuple, batches)) == [("one",) * 4] * 3 + [("two",) * 2, ("two",) * 4]
    with closing(CaptionDatabase(tmp_path / "out.jsonl.sqlite")) as database:
        query = "SELECT substr(prompt, 1, 3), count(DISTINCT hash) FROM answers WHERE text IS NOT NULL GROUP BY 1"
        assert dict(database.connection.execute(query)) == {"one": 6, "two": 6}


@pytest.mark.usefixtures("accept_all")
def test_local_captioner_answers_in_batches_as_alone(tiny_llava: Path) -> None:
    captioner = LocalCaptioner(str(tiny_llava), 4, precision="fp32")
    prompt = Prompt("a", "short", "Describe it.\nCaption: {caption}", temperature=0, max_tokens=6)
    images = torch.randint(0, 255, (3, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = ["a long caption with <image> in it", None, "short"]
    requests = []
    for image, text in zip(images, captions, strict=True):
        requests.append(CaptionRequest(captioner.prepare_image(image), prompt, image_hash="", caption=text))
    alone = [captioner.generate_answers([request])[0] for request in requests]
    assert captioner.generate_answers(requests) == alone
    assert len({answer.text for answer in alone}) == 3 and all(answer.output_tokens <= 6 for answer in alone)


def test_local_model_that_rejects_all_images_ends_the_run_with_an_error(
    tmp_path: Path, photos: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: Any) -> None:
        raise ValueError("too narrow")

    monkeypatch.setattr(LocalCaptioner, "_generate_batch", reject)
    with pytest.raises(TooManySkippedError, match=r"6 of 6 images .* model's processor rejects the image: too narrow"):
        run_command("caption", photos, "--model", tiny_llava, "--out", tmp_path / "out.jsonl")


def test_sampled_answers_differ_between_processes_and_retries(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process starts with PyTorch's default seed."""
    monkeypatch.setattr(captioners, "convert_output_to_answer", lambda text, *_: Answer(text))
    prompt = Prompt("a", "short", "Describe it.", temperature=1.0, max_tokens=10)
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        captioner = LocalCaptioner(str(tiny_llava), 4)
        image = captioner.prepare_image(torch.zeros(3, 40, 60, dtype=torch.uint8))
        answers.append(captioner.generate_answers([CaptionRequest(image, prompt, image_hash="")] * 4))
    assert answers[0] != answers[1]


def test_names_of_local_models_depend_on_their_files_and_not_on_their_location(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = LocalCaptioner(str(tiny_llava), 4).name
    assert re.fullmatch(r"built-[0-9a-f]{8}", name)
    copy = shutil.copytree(tiny_llava, tmp_path / "other/built/model")  # named after the run's folder
    assert LocalCaptioner(str(copy), 4, precision="fp32").name == name

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--org--built"
    shutil.copytree(tiny_llava, repository / "snapshots/1")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("1")
    assert get_model_name_with_hash("org/built") == name

    model, _ = load_model(copy)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[0] += 1
    model.save_pretrained(copy)
    retrained = LocalCaptioner(str(copy), 4).name
    assert retrained != name
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text() + "Answer:")
    assert get_model_name_with_hash(str(copy)) not in (name, retrained)


def test_batches_are_halved_until_they_fit_in_the_memory(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a single image does not fit, the error names the settings that need less memory."""
    photos, largest, sizes = make_photos(tmp_path / "photos", 6), 2, []

    def generate(self: LocalCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        sizes.append(len(requests))
        if len(requests) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return [Answer(f"A dog runs over {int(np.asarray(request.image).sum())}.") for request in requests]

    monkeypatch.setattr(LocalCaptioner, "_generate_batch", generate)
    prompts = write_prompts(tmp_path / "prompts.yaml", one={"kind": "short", "text": "Describe it."})
    words = ["caption", photos, "--model", tiny_llava, "--prompts", prompts, "--batch_size", 5]
    run_command(*words, "--out", tmp_path / "out.jsonl")
    assert sizes == [5, 2, 3, 1, 2, 1]
    assert len({row["captions"][0] for row in read_rows(tmp_path / "out.jsonl")}) == 6
    largest = 0
    with pytest.raises(ValueError, match=r"not even a single image fits .* lower --image_size or a smaller model"):
        run_command(*words, "--out", tmp_path / "other.jsonl")

"""Captioners for OpenAI-compatible servers (vLLM, llama.cpp, Ollama) and for models that run in this process."""

import asyncio
import base64
import ipaddress
import json
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import encode_jpeg
from torchvision.transforms.v2.functional import to_pil_image

from llm2clip.caption.answers import Answer, CaptioningStoppedError, CaptionRequest, convert_output_to_answer
from llm2clip.caption.options import Prompt, format_connection_error
from llm2clip.cpu_tuning import keep_freed_memory, use_onednn_matmul
from llm2clip.data.storage import compute_backoff, is_temporary_http_status, parse_retry_after
from llm2clip.io_utils import escape_control_characters
from llm2clip.models.loading import get_model_name_with_hash, load_vision_language_model
from llm2clip.models.precision import resolve_precision
from llm2clip.runs.ranks import process_state

KEY_VARIABLE = "LLM2CLIP_API_KEY"
CONNECT_TIMEOUT = 10.0  # seconds
MAX_RESPONSE_BYTES = 1_000_000
MAX_MESSAGE_CHARACTERS = 300  # maximum length of a quoted server message
MAX_FAILURES_IN_A_ROW = 20  # number of consecutive failures after which the run is stopped
MAX_RETRY_AFTER = 300.0  # seconds
FIRST_DELAY, MAX_DELAY = 1.0, 60.0  # delay before the first retry and maximum delay, in seconds
MAX_CONNECT_SECONDS = 3.0  # time limit for connecting to a server that has never responded
SETTINGS_STATUSES = frozenset({401, 402, 403, 404})  # wrong API key, insufficient credit, wrong URL or unknown model
JPEG_QUALITY = 90
NEW_MAX_TOKENS_FIELD = "max_completion_tokens"  # some servers require this field instead of max_tokens


class EndpointError(ValueError):
    """Raised when no request to the server can succeed, for example because the API key is wrong."""


class _RequestError(Exception):
    """Raised when a request fails. `retry` is True if another attempt could succeed."""

    was_connected = True

    def __init__(self, message: str, status: int | None = None, retry: bool = True, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status  # HTTP status, or None if there was no valid response
        self.retry = retry
        self.retry_after = retry_after  # minimum delay from the Retry-After header, in seconds


class EndpointCaptioner:
    """Captioner that sends images to a server with an OpenAI-compatible chat API.

    Redirects are not followed, so images are sent only to this server. The API key is read from the environment
    variable LLM2CLIP_API_KEY.

    Args:
        endpoint: Base URL of the API, such as http://localhost:8000/v1.
        concurrency: Maximum number of concurrent requests.
        retries: Maximum number of retries for a failed request.
        timeout: Maximum response time in seconds.

    Attributes:
        name: Name of the model, which is stored with each caption.
        batch_size: Maximum number of requests per call to `generate_answers`.
        workers: Number of threads that call `generate_answers` concurrently.
        worked_before: True if an earlier run has stored captions from this model. If True, images that the server
            rejects do not stop the run.

    Raises:
        ValueError: The URL is invalid, or the API key contains characters that are not allowed in a header.
    """

    batch_size = 1

    def __init__(
        self, endpoint: str, model: str, concurrency: int = 8, retries: int = 6, timeout: float = 300.0
    ) -> None:
        self.name, self.workers = model, concurrency
        self.url = _parse_endpoint_url(endpoint)
        self.retries, self.timeout = retries, timeout
        self.is_loopback = _is_loopback_host(self.url.host)
        self.worked_before = False
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._has_succeeded = self._was_connected = False
        self._max_tokens_field = "max_tokens"
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=min(CONNECT_TIMEOUT, timeout)),  # `_post_json` limits the total time
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            headers=_build_request_headers(),
            verify=httpx.create_ssl_context(),
            # A proxy could read images sent unencrypted, and it cannot reach a server on this machine.
            trust_env=self.url.scheme == "https" and not self.is_loopback,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def describe_endpoint(self) -> list[str]:
        lines = [f"Images are sent to {self.url.scheme}://{self.url.netloc.decode()} (model {self.name})."]
        if self.url.scheme == "http" and not self.is_loopback:
            lines.append(
                "Warning: the connection is not encrypted, so others on the network can read the images and the API "
                "key. Use https:// if the server supports it."
            )
        return lines

    def prepare_image(self, image: Tensor) -> str:
        """Encode a uint8 image of shape (3, H, W) as a JPEG data URI."""
        data = encode_jpeg(image.contiguous(), quality=JPEG_QUALITY).numpy().tobytes()
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"

    def stop(self) -> None:
        """Make `generate_answers` raise CaptioningStoppedError instead of sending another request."""
        self._stopped.set()

    def generate_answers(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        """Return an answer for each request.

        Raises:
            CaptioningStoppedError: The captioner was stopped before an answer was received. The next run repeats the
                requests.
            EndpointError: No request can succeed, for example because the API key is wrong.
        """
        return [self._request_with_retries(request) for request in requests]

    def _request_with_retries(self, request: CaptionRequest) -> Answer:
        attempt, started_at = 0, time.monotonic()
        while not self._stopped.is_set():
            max_tokens_field = self._max_tokens_field
            try:
                answer = self._send_request(request, max_tokens_field)
            except _RequestError as error:
                if error.status == 400 and max_tokens_field == "max_tokens" and NEW_MAX_TOKENS_FIELD in str(error):
                    self._max_tokens_field = NEW_MAX_TOKENS_FIELD
                    continue
                self._was_connected |= error.was_connected
                if not self._was_connected and time.monotonic() - started_at > MAX_CONNECT_SECONDS:
                    raise EndpointError(format_connection_error(self.url.netloc.decode(), error)) from None
                if not error.retry or attempt == self.retries:
                    return self._convert_failure_to_answer(error)
                self._stopped.wait(max(compute_backoff(attempt, FIRST_DELAY, MAX_DELAY), error.retry_after))
                attempt += 1
            else:
                with self._lock:
                    self._failures_in_a_row, self._has_succeeded = 0, True
                    self._was_connected = True
                return answer
        raise CaptioningStoppedError

    def _convert_failure_to_answer(self, error: _RequestError) -> Answer:
        """Convert a failed request into an answer. Raise EndpointError if every other request would fail, too."""
        status = error.status
        with self._lock:
            if status is None or error.retry:  # the server failed, rather than rejecting the image
                counts = True
            elif status < 400 or status in SETTINGS_STATUSES:
                if not self._has_succeeded:
                    raise EndpointError(f"{self.url}: {error}{_suggest_http_error_fix(status)}")
                counts = True
            else:  # the server rejected the image; a text-only model rejects every image
                counts = not (self._has_succeeded or self.worked_before)
            self._failures_in_a_row += counts
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise EndpointError(f"{self.url}: the last {self._failures_in_a_row} requests failed. {error}")
        return Answer(None, str(error))

    def _send_request(self, request: CaptionRequest, max_tokens_field: str) -> Answer:
        # The image precedes the prompt, so that the server can reuse the cached prefix for other prompts.
        content = [
            {"type": "image_url", "image_url": {"url": request.image}},
            {"type": "text", "text": request.prompt_text},
        ]
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "temperature": request.prompt.temperature,
            max_tokens_field: request.prompt.max_tokens,
        }
        try:
            response, data = asyncio.run_coroutine_threadsafe(self._post_json(body), self._loop).result()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            problem = _RequestError(f"the connection failed: {_sanitize_server_message(str(error)) or 'timeout'}")
            problem.was_connected = False
            raise problem from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _RequestError(f"no response within {self.timeout:g} seconds") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            message = _sanitize_server_message(str(error)) or type(error).__name__
            raise _RequestError(f"the connection failed: {message}") from error
        status = response.status_code
        if status != 200:
            seconds = parse_retry_after(response.headers.get("retry-after", ""))
            retry_after = min(MAX_RETRY_AFTER, seconds) if seconds > 0 else 0.0
            raise _RequestError(
                _describe_http_error(response, data), status, is_temporary_http_status(status), retry_after
            )
        return _parse_chat_response(data)

    async def _post_json(self, body: dict[str, Any]) -> tuple[httpx.Response, bytes]:
        """Return the response and its body. The timeout limits the total time, whereas httpx limits only each read."""
        async with asyncio.timeout(self.timeout), self._client.stream("POST", self.url, json=body) as response:
            return response, await _read_body_with_size_limit(response)


def _parse_endpoint_url(endpoint: str) -> httpx.URL:
    try:
        url = httpx.URL(endpoint.strip())
    except httpx.InvalidURL as error:
        raise ValueError(f"--endpoint is not a valid URL ({error})") from error
    if url.userinfo or url.query or url.fragment:  # the URL is printed, so it must not contain a key
        raise ValueError(
            f"--endpoint must not contain a user name, a password or a query string. Put the API key in the "
            f"environment variable {KEY_VARIABLE}"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"--endpoint must be of the form http://HOST:PORT/v1 or https://HOST/v1 (got {endpoint})")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.copy_with(path=f"{path}/chat/completions")


def _is_loopback_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _get_api_key() -> str:
    return os.environ.get(KEY_VARIABLE, "").strip()


def _build_request_headers() -> dict[str, str]:
    headers, key = {"Accept-Encoding": "identity"}, _get_api_key()
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {KEY_VARIABLE} must contain only printable ASCII characters")
    return headers | {"Authorization": f"Bearer {key}"} if key else headers


async def _read_body_with_size_limit(response: httpx.Response) -> bytes:
    data = bytearray()
    if response.headers.get("content-encoding", "identity") != "identity":  # the decoded body could be gigabytes
        raise _RequestError("the response is compressed, although the request does not allow compression")
    async for chunk in response.aiter_raw(65536):
        data += chunk
        if len(data) > MAX_RESPONSE_BYTES:
            raise _RequestError(f"the response is larger than {MAX_RESPONSE_BYTES:,} bytes")
    return bytes(data)


def _parse_chat_response(data: bytes) -> Answer:
    try:
        response = json.loads(data)
        choice = response["choices"][0]
        content = choice["message"].get("content") or ""
        usage = response.get("usage") or {}
        tokens = [_parse_token_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        excerpt = _sanitize_server_message(data.decode(errors="replace"))
        raise _RequestError(f"the response is not a chat completion ({type(error).__name__}): {excerpt}") from error
    try:
        text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    except (TypeError, AttributeError) as error:  # a retry would return the same content
        excerpt = _sanitize_server_message(data.decode(errors="replace"))
        raise _RequestError(f"the content of the response is not text: {excerpt}", retry=False) from error
    if choice.get("finish_reason") == "content_filter":
        return Answer(None, "the server's content filter blocked the answer", *tokens)
    # The API key is redacted first, because `convert_output_to_answer` quotes parts of the text in error messages.
    return convert_output_to_answer(_redact_api_key(text), choice.get("finish_reason") == "length", *tokens)


def _parse_token_count(value: Any) -> int:
    return min(value, 1 << 40) if type(value) is int and value > 0 else 0


def _describe_http_error(response: httpx.Response, data: bytes) -> str:
    status = f"HTTP {response.status_code}"
    if 300 <= response.status_code < 400:
        location = _sanitize_server_message(response.headers.get("location", ""))
        return f"{status}: the server redirects to {location}. Redirects are not followed"
    text = data.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # the body is not an error in OpenAI's format
    return f"{status}: {_sanitize_server_message(text or response.reason_phrase)}"


def _sanitize_server_message(text: str) -> str:
    """Redact the API key in a server's message, escape control characters, and truncate the message."""
    text = escape_control_characters(" ".join(_redact_api_key(text).split())).encode(errors="replace").decode()
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[:MAX_MESSAGE_CHARACTERS]}..."


def _redact_api_key(text: str) -> str:
    key = _get_api_key()
    return text.replace(key, "[key]") if key else text


def _suggest_http_error_fix(status: int) -> str:
    if status in (401, 403):
        return f". Put the API key in the environment variable {KEY_VARIABLE}"
    if status == 404:
        return ". Check --model and --endpoint. For most servers, the URL must end with /v1"
    return ". If you trust the new address, use it as --endpoint" if status < 400 else ""


# ---- model in this process -------------------------------------------------------------------------------------------


class LocalCaptioner:
    """Captioner that runs a vision-language model in this process. The attributes are those of `EndpointCaptioner`.

    Args:
        model: Model folder or hub id.
        batch_size: Number of images per batch. The number is halved if a batch does not fit in device memory.
        precision: "fp32", "bf16" or "auto", which selects bf16 on hardware that supports bf16.

    Raises:
        ValueError: The model is not supported, for example because it has no chat template.
        OSError: The model does not exist.
    """

    workers = 1

    def __init__(self, model: str, batch_size: int, precision: str = "auto") -> None:
        self.batch_size = batch_size
        self.worked_before = False
        self.device = process_state().device
        self.model, self.processor = load_vision_language_model(
            model, self.device, resolve_precision("caption", precision, self.device)
        )
        self.name = get_model_name_with_hash(model)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not (self.processor.chat_template or self.tokenizer.chat_template):
            raise ValueError(f"{model} has no chat template, so it cannot follow prompts. Use a chat model")
        keep_freed_memory(self.device)
        torch.seed()  # with PyTorch's default seed, all ranks and all retries would sample identical answers

    def prepare_image(self, image: Tensor) -> Image.Image:
        pil_image: Image.Image = to_pil_image(image)
        return pil_image

    def generate_answers(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        """Return an answer for each request. All requests must have the same prompt.

        Raises:
            ValueError: A single image does not fit in device memory.
        """
        try:
            return self._generate_batch(requests)
        except ValueError as error:  # processors reject some images, such as very narrow images
            if len(requests) == 1:
                return [Answer(None, f"the model's processor rejects the image: {error}")]
            sizes = [1] * len(requests)
        except torch.OutOfMemoryError as error:
            if len(requests) == 1:
                raise ValueError(
                    f"not even a single image fits in the memory of the {self.device.type} device. Run "
                    "`llm2clip caption` with a lower --image_size or a smaller model. Earlier captions are saved"
                ) from error
            self.batch_size = len(requests) // 2
            sizes = [self.batch_size, len(requests) - self.batch_size]
        answers: list[Answer] = []  # retry outside the `except` blocks, where the exception keeps the batch in memory
        for size in sizes:
            start = len(answers)
            answers += self.generate_answers(requests[start : start + size])
        return answers

    def stop(self) -> None:
        """Do nothing, because a local model sends no requests."""

    @torch.inference_mode()
    @use_onednn_matmul()
    def _generate_batch(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        inputs = self.processor.apply_chat_template(
            [self._build_chat_messages(request) for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, self.model.dtype)
        tokens = self.model.generate(**inputs, **self._make_generation_options(requests[0].prompt))
        num_input = inputs["input_ids"].shape[1]
        answers = []
        for attention, new_tokens in zip(inputs["attention_mask"], tokens[:, num_input:].tolist(), strict=True):
            answers.append(self._decode_generated_answer(int(attention.sum()), new_tokens))
        return answers

    def _build_chat_messages(self, request: CaptionRequest) -> list[dict[str, Any]]:
        text = request.prompt_text
        for token in filter(None, self.tokenizer.all_special_tokens):  # including image placeholders
            text = text.replace(token, " ")
        return [
            {"role": "user", "content": [{"type": "image", "image": request.image}, {"type": "text", "text": text}]}
        ]

    def _make_generation_options(self, prompt: Prompt) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": prompt.max_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        options["do_sample"] = prompt.temperature > 0
        if prompt.temperature > 0:
            options["temperature"] = prompt.temperature
        image_token = getattr(self.model.config, "image_token_id", None)
        if image_token is not None:
            options["bad_words_ids"] = [[image_token]]
        return options

    def _decode_generated_answer(self, num_input_tokens: int, new_tokens: list[int]) -> Answer:
        end = self.model.generation_config.eos_token_id
        end_tokens = {end} if isinstance(end, int) else set(end or ())
        length = next((n for n, token in enumerate(new_tokens) if token in end_tokens), len(new_tokens))
        text = self.tokenizer.decode(new_tokens[:length], skip_special_tokens=True)
        return convert_output_to_answer(text, length == len(new_tokens), num_input_tokens, length)


Captioner = EndpointCaptioner | LocalCaptioner

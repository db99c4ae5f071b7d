"""Shared fixtures: tiny random models and generated data, so that the test suite runs offline."""

# ruff: noqa: E402

import gc
import os

gc.disable()  # until the modules are imported, which takes a fifth less time without collections

# In a forked process, `torch.cuda.is_available()` fails if its parent process has initialised CUDA to answer it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# huggingface_hub and tokenizers read these when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import faulthandler
import importlib.util
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import random
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing import resource_tracker, util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from format_fixtures import ROWS, image_bytes
from llm2clip.cli import main
from llm2clip.config import TuneConfig
from llm2clip.data import build_table
from llm2clip.data.pairs import ImageCaptions
from llm2clip.models import text_graph
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.pretrained import AssetUnavailableError
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.runs.ranks import process_state, shut_down_process_group

# setuptools must be imported before the standard library's distutils, or compiling flex attention fails.
with suppress(ImportError):
    import setuptools  # noqa: F401

_CAPABILITIES = {**getattr(torch.cpu, "get_capabilities", dict)(), "amx_bf16": False, "avx512_bf16": False}
torch.cpu.get_capabilities = lambda: _CAPABILITIES  # auto is fp32 on every machine
torch.set_num_threads(1)  # tiny models are slower with more threads
text_graph.MAX_TEXT_BYTES = 0  # the command `index` would export the tiny models, which takes seconds
gc.enable()  # benchmarks and spawned processes import this module too

pytest_plugins = ["align_fixtures", "caption_fixtures", "page_fixtures"]
HANG_TIMEOUT = 300  # seconds; only a test that hangs waits for so long, so its result does not depend on speed
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}
CAPTIONS = [
    ImageCaptions(
        tuple(f"image {i} shows {w}" for w in ("a dog", "two cats in the snow", "x")), (f"A longer text of {i}.",)
    )
    for i in range(24)
]
TUNE = TuneConfig(steps=6, batch_size=6, lr=1e-2, save_steps=2, lora_dropout=0.1, precision="fp32")
SHAPES = ("left half", "right half", "upper half", "lower half", "middle", "border")


def save_tokenizer(folder: Path, chat_template: bool = True) -> None:
    """Save a byte-level tokenizer whose pad token is its end token, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|end|>": 0, "<|user|>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|user|>"],
    )
    if chat_template:
        fast.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    fast.save_pretrained(folder)


def make_llm(folder: Path, family: str = "llama", layers: int = 3, seed: int = 0) -> Path:
    """Save a random decoder LLM with hidden size 32, and its tokenizer."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = AutoModel.from_config(config)
    with torch.no_grad():  # large weights, so that attention matters
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_tower(folder: Path, architecture: str = "test_efficientnet", **model_args: Any) -> Path:
    """Save a random timm model as a local checkpoint that `--align.tower FOLDER` opens."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(architecture, **model_args)
    timm.models.save_for_hf(model, folder, model_args=model_args, safe_serialization=True)
    return folder


@pytest.fixture(autouse=True, scope="session")
def table_folder(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """Keep record tables out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tables")
        patch.setattr(build_table, "get_cache_dir", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random EfficientNet, as a timm checkpoint folder."""
    return make_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder LLM, as a folder."""
    return make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def encoder(llm: Path) -> CaptionEncoder:
    """A caption encoder on a random LLM."""
    return CaptionEncoder.from_pretrained(llm, device="cpu")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images of one colour on grey, with a varying number of captions and a long one each, split train and val."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    lines = []
    for n, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
        pixels = np.full((40, 48, 3), 128, np.uint8)
        rows, cols = np.ogrid[:40, :48]
        area = {
            "left half": cols < 24,
            "right half": cols >= 24,
            "upper half": rows < 20,
            "lower half": rows >= 20,
            "middle": (abs(rows - 20) < 10) & (abs(cols - 24) < 12),
            "border": (rows < 8) | (rows >= 32) | (cols < 8) | (cols >= 40),
        }[shape]
        pixels[np.broadcast_to(area, (40, 48))] = COLOURS[colour]
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        captions = [f"the {shape} is {colour}", f"{colour} {shape} on grey", f"a grey picture, {colour} at its {shape}"]
        row = {"image": f"{n}.png", "id": str(n), "captions": captions[: 2 + n % 2]}
        row["captions_xx"] = [f"{shape[::-1]} {colour[::-1]}"] if n % 2 else []
        row["long_captions"] = [f"This is a small grey picture. Its {shape} has been painted in {colour}."]
        row["split"] = "val" if n % 6 == n // 6 else "train"
        lines.append(json.dumps(row) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """Make transformers import the code of models from an empty folder, and forget the code that it has imported."""

    def forget_modules() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers appends the folder
    forget_modules()
    yield
    forget_modules()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The images of the records in `format_fixtures.ROWS`."""
    (tmp_path / "images").mkdir()
    for seed, row in enumerate(ROWS):
        (tmp_path / row["image"]).write_bytes(image_bytes(seed, "PNG" if row["image"].endswith("png") else "JPEG"))
    return tmp_path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random LLM2CLIP model."""
    from search_fixtures import make_model

    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def dual_encoder(model_folder: Path) -> DualEncoder:
    """The model of `model_folder`."""
    return open_dual_encoder(str(model_folder))


@pytest.fixture
def photos(tmp_path: Path, image_folder: Path) -> Path:
    """Seven images in two folders, two of them with the same bytes, one from 2001, one with a caption; two damaged."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for n in range(4):
        shutil.copy(image_folder / f"{n}.png", folder / f"{n}.png")
    shutil.copy(image_folder / "5.png", folder / "sub/5.png")
    shutil.copy(image_folder / "5.png", folder / "sub/copy.png")
    (folder / "0.txt").write_text("Ein roter Ärmel\n")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff not an image")
    (folder / "half.png").write_bytes((image_folder / "6.png").read_bytes()[:300])
    exif = Image.Exif()
    exif[0x0132] = "2001:02:03 04:05:06"
    Image.open(image_folder / "7.png").resize((80, 64)).convert("RGB").save(folder / "old.jpg", exif=exif)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, for tests marked `data`; skips the test if there is none."""
    folder = os.environ.get("LLM2CLIP_DATA")
    if not folder:
        pytest.skip("LLM2CLIP_DATA is not set: no real data")
    return Path(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection() -> None:
    """Collect no garbage until the test modules are imported."""
    gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Let no garbage collection visit what has been imported, and start the server that forks processes for tests."""
    gc.enable()
    gc.freeze()
    if session.items:
        capture = session.config.pluginmanager.getplugin("capturemanager")
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()  # otherwise the server's processes would write the buffered text again
        if capture is not None:
            capture.resume_global_capture()  # of the output of processes
        start_fork_server()
        if capture is not None:
            capture.suspend_global_capture()


def start_fork_server() -> None:
    """Fork the fork server of `multiprocessing` from this process, which has imported the modules of all tests.

    Otherwise the server would be a new interpreter, which would import them again, for several seconds.
    """
    if sys.platform != "linux":  # forking is unsafe there
        return
    spawn = util.spawnv_passfds

    def fork(path: bytes, args: list[str], fds_to_pass: list[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        exit_code = 1
        try:
            util.spawnv_passfds = spawn
            multiprocessing.forkserver._forkserver._lock = threading.Lock()  # the other is locked
            logging.getLogger().handlers.clear()
            sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
            faulthandler.enable()
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor not in fds_to_pass:
                    with suppress(OSError):  # above a limit that a test has set
                        os.dup2(2, descriptor)  # not closed: loggers may still write to the files of pytest
            seed_everything()
            exec(args[-1])
        except SystemExit:  # the server ends because no process uses it any longer
            exit_code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(exit_code)

    resource_tracker.ensure_running()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(util, "spawnv_passfds", fork)
        multiprocessing.forkserver.ensure_running()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed the random number generators for the fixtures, so that no result depends on the tests that ran before."""
    seed_everything()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Seed the random number generators for the test, whether or not its fixtures have existed before.

    Skip a test marked `weights` if the weights are neither cached nor can be downloaded.
    """
    seed_everything()
    try:
        return (yield)
    except AssetUnavailableError as error:
        if item.get_closest_marker("weights") is None:
            raise
        pytest.skip(f"no weights: {error}")


def seed_everything() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Killed(BaseException):
    """Simulates kill -9: no code catches it."""


class TouchOnLoad:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def run_distributed(count: int, function: Callable[..., None], *args: Any, join: bool = True) -> Any:
    """Run `function(*args)` in `count` gloo processes, with the environment that torchrun would set.

    As with torchrun, this process hosts the store in which the others meet, so no other program can take its port.
    The processes are joined unless `join` is False, in which case the context of the processes is returned.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = (count, store.port, dict(os.environ), function, args)
    context = torch.multiprocessing.start_processes(_rank, ranks, count, join, start_method="forkserver")
    if context is not None:
        context.store = store  # must exist as long as the processes
    return context


def _rank(
    rank: int, count: int, port: int, environment: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        ACCELERATE_USE_CPU="true",
    )
    start_fork_server()  # for the workers of this process, before Gloo starts threads
    # Otherwise every process would do all the work, and the test would not test anything.
    assert process_state().num_processes == count
    torch.set_num_threads(1)
    function(*args)
    shut_down_process_group()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo may still hold tensors, which can crash the process while Python shuts down


def start_process(function: Callable[..., object], *args: Any) -> multiprocessing.process.BaseProcess:
    """Run `function(*args)` in a new process."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    return process


def run_in_process(function: Callable[..., object], *args: Any) -> int | None:
    """Run `function(*args)` in a new process, and return its exit code."""
    process = start_process(function, *args)
    process.join(HANG_TIMEOUT)
    if process.is_alive():
        process.kill()
        pytest.fail("the process hangs")
    return process.exitcode


def redirect_errors(file: Path) -> None:
    """Write what this process and processes forked from it write to stderr to a file."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    start_fork_server()


def start_command(
    arguments: list[str], output: Path, prepare: Callable[[], object] | None = None
) -> multiprocessing.process.BaseProcess:
    """Start an llm2clip command in a new process, which leads a process group of its own. Its output goes to a file.

    The process first calls `prepare`.
    """
    return start_process(_run_command, arguments, output, prepare)


def _run_command(arguments: list[str], output: Path, prepare: Callable[[], object] | None) -> None:
    os.setsid()
    # The signal is ignored in a process that inherits this from the shell, for example if tests run in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    start_fork_server()  # for the workers of this process
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def load_benchmark(name: str) -> Any:
    """Import a script in the folder `benchmarks`."""
    file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_with_few_open_files(function: Callable[..., None], *args: Any) -> None:
    """Run `function(*args)` in a new process that may open only 128 files. Usual limits are 256 and 1,024."""
    assert run_in_process(_limit_open_files, function, args) == 0


def _limit_open_files(function: Callable[..., None], args: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    start_fork_server()  # for the workers of this process
    function(*args)


def emulate_fsdp_launch() -> None:
    """Set up a process of `run_distributed` as `accelerate launch --use_fsdp --fsdp_version 2` does.

    Accelerate supports FSDP on accelerators only, so it is made to treat the CPU as one.
    """
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # the process group already exists
    os.environ.update(ACCELERATE_USE_FSDP="true")

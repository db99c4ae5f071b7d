"""Training without an adapter, and the page that puts texts and photographs into one index."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from llm2clip import LLM2CLIP, CaptionEncoder
from llm2clip.cli import main
from llm2clip.config import AlignConfig
from llm2clip.models.official_checkpoint import save_official_checkpoint

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "one_index.md"
TEXTS = ["the middle is red", "a longer text about nothing in particular"]


@pytest.fixture(scope="module")
def run(image_folder: Path, llm: Path, tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `fit` without an adapter, in the default space of 512 dimensions, which must give way to the encoder's."""
    out = tmp_path_factory.mktemp("one") / "run"
    command = ["fit", str(image_folder / "captions.jsonl"), "--out", str(out), "--encoder.path", str(llm)]
    command += ["--tune.steps", "0", "--align.adapter_depth", "0", "--align.matryoshka_dims", "[8, 16]"]
    command += ["--align.tower", str(tower), "--align.image_size", "64", "--align.epochs", "10", "--align.workers", "0"]
    assert main([*command, "--align.batch_size", "15", "--align.lr", "3e-3", "--align.tower_lr", "3e-3"]) == 0
    return out


def test_fit_without_adapter_keeps_the_encoders_vectors_to_the_bit(run: Path, llm: Path) -> None:
    model = LLM2CLIP.from_pretrained(run / "model", "cpu")
    assert (model.config.text_dim, model.config.embed_dim, model.config.matryoshka_dims) == (32, 32, [8, 16])
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    assert torch.equal(model.encode_text(TEXTS), F.normalize(encoder.encode(TEXTS), dim=-1))
    assert "none (images are embedded in the caption encoder's space)" in (run / "model/README.md").read_text()
    assert [file.name for file in (run / "tune").glob("cra_*.json")] == ["cra_raw.json"], "nothing was tuned"
    assert "after tuning |" not in (run / "report.md").read_text().partition("## Caption encoder")[2]
    lines = (run / "align/metrics.jsonl").read_text().splitlines()
    losses = [float(re.findall(r'"loss": ([\d.]+)', line)[0]) for line in (lines[0], lines[-1])]
    assert losses[1] < 0.9 * losses[0], "the images learn nothing"


def test_one_index_page_runs(
    run: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PHOTOS").mkdir()
    for n in range(4):
        Image.open(image_folder / f"{n}.png").save(tmp_path / "PHOTOS" / f"{n}.jpg")
    shutil.copytree(run, tmp_path / "runs/one")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))
    namespace: dict[str, object] = {}
    exec(code, namespace)
    kinds = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(kinds) == ["photo"] * 4 + ["text"] * 2
    assert set(kinds[:2]) == {"photo", "text"}, "the best of both kinds come first"


def test_what_needs_an_adapter_is_rejected(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--align.inherit requires an adapter: set --align.adapter_depth to 1"):
        AlignConfig(adapter_depth=0, inherit=True)
    with pytest.raises(ValueError, match="there is no adapter"):
        save_official_checkpoint(LLM2CLIP.from_pretrained(run / "model", "cpu"), tmp_path / "official", "hf")
    assert not (tmp_path / "official").exists()


@pytest.mark.parametrize("dims", [[0], [64, 512], [1000]])
def test_matryoshka_dims_outside_the_space_are_rejected_before_training(dims: list[int]) -> None:
    with pytest.raises(ValueError, match=r"--align.matryoshka_dims must be (at least 1|less than --align.embed_dim)"):
        AlignConfig(matryoshka_dims=dims)
    assert AlignConfig(matryoshka_dims=[600], adapter_depth=0).matryoshka_dims == [600]  # depends on the encoder

"""A model on benchmarks by the command, against the same worked out by hand; what is absent is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from llm2clip.cli import main
from llm2clip.data.records import open_records
from llm2clip.models.dual import open_dual
from test_benchmarks import put
from test_dual import both
from test_dual import clip as clip  # the fixture


@pytest.fixture
def root(pictures: Path, tmp_path: Path) -> Path:
    """Flickr30k of eight pictures, Winoground of two, a class a picture."""
    records = [r for r in open_records(pictures / "captions.jsonl") if r.image is not None][:8]
    folder = tmp_path / "root"
    files = [Path(str(r.image)) for r in records]
    for n, file in enumerate(files):
        for name in (f"flickr30k/flickr30k-images/{n}.png", f"winoground/images/w{n}.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).save(folder / name)
    rows = [{"image": f"flickr30k-images/{n}.png", "caption": list(r.captions)} for n, r in enumerate(records)]
    put(folder / "flickr30k/flickr30k_test.json", rows)
    pairs = [
        {"id": n, "image_0": f"w{n}", "image_1": f"w{n + 1}", "caption_0": f"c {n}", "caption_1": f"d {n} " + "x" * 99}
        for n in (0, 2, 4)
    ]
    put(folder / "winoground/examples.jsonl", "\n".join(map(json.dumps, pairs)))
    (folder / "cifar10").mkdir()
    pixels = torch.randint(0, 256, (4, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = b"".join(bytes([n % 2]) + row.numpy().tobytes() for n, row in enumerate(pixels))
    (folder / "cifar10/test_batch.bin").write_bytes(data)
    put(folder / "cifar10/batches.meta.txt", "airplane\nfrog\n")
    return folder


def test_benchmarks_by_the_command(
    clip: Path, root: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    names = ["flickr30k", "winoground", "cifar10", "coco"]
    command = ["evaluate", str(clip), "--benchmarks", *names, "--root", str(root), "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "coco is left out" in said and "karpathy" in said.lower() and "% of the texts" in said
    results = json.loads((out / "benchmarks.json").read_text())
    assert [found["benchmark"] for found in results] == names[:3]
    assert main(command) == 0  # the vectors are there
    assert json.loads((out / "benchmarks.json").read_text()) == results

    model = open_dual(str(clip), "cpu")
    images, _, _ = both(model, pictures)
    captions = [list(r.captions) for r in open_records(pictures / "captions.jsonl")][:8]
    texts = model.encode_text([c for some in captions for c in some])
    owner = torch.tensor([n for n, some in enumerate(captions) for _ in some])
    best = (texts @ images.T).argmax(1)
    [row] = results[0]["rows"]
    assert row["T2I"]["R@1"] == pytest.approx(100 * float((best == owner).double().mean()))
    hits = 0
    for n in (0, 2, 4):
        scores = images[n : n + 2] @ model.encode_text([f"c {n}", f"d {n} " + "x" * 99]).T
        hits += bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0])
    assert results[1]["figures"]["text"] == pytest.approx(100 * hits / 3)
    assert results[1]["cut"] == 3 and results[1]["texts"] == 6
    assert results[2]["figures"]["chance"] == 50 and 0 <= results[2]["figures"]["top-1"] <= 100


def test_what_is_not_there(clip: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(clip), "--benchmarks", "flickr31k", "--root", str(root)]) == 1
    assert "there are flickr30k, coco" in capsys.readouterr().err
    assert main(["evaluate", str(clip), "--benchmarks", "docci", "--root", str(root)]) == 1
    assert "none of these benchmarks is under" in capsys.readouterr().err
    assert main(["evaluate", "--benchmarks", "docci", "--root", str(root)]) == 1
    assert "name the model" in capsys.readouterr().err
    assert main(["benchmarks", "--root", str(root)]) == 0
    said = capsys.readouterr().out
    assert "docci_images.tar.gz" in said and "How to get the others" in said and "flickr30k_test.json" not in said

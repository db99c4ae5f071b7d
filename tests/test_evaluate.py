"""A model on benchmarks by the command, against the same worked out by hand; what is absent is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import distributed
from llm2clip.cli import build, main
from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.precomputed import PrecomputedEmbeddings
from llm2clip.models.display_names import display_names
from llm2clip.models.dual_encoder import open_dual_encoder
from test_benchmarks import put
from test_dual_encoder import both
from test_dual_encoder import clip as clip  # the fixture


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
    results = json.loads((out / "results.json").read_text())["results"]
    assert [found["benchmark"] for found in results] == names[:3]
    assert main(command) == 0  # the vectors are there
    assert json.loads((out / "results.json").read_text())["results"] == results

    model = open_dual_encoder(str(clip), "cpu")
    images, _, _ = both(model, pictures)
    captions = [list(r.captions) for r in open_records(pictures / "captions.jsonl")][:8]
    texts = model.encode_texts([c for some in captions for c in some])
    owner = torch.tensor([n for n, some in enumerate(captions) for _ in some])
    best = (texts @ images.T).argmax(1)
    [row] = results[0]["rows"]
    assert row["T2I"]["R@1"] == pytest.approx(100 * float((best == owner).double().mean()))
    hits = 0
    for n in (0, 2, 4):
        scores = images[n : n + 2] @ model.encode_texts([f"c {n}", f"d {n} " + "x" * 99]).T
        hits += bool(scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0])
    assert results[1]["figures"]["text"] == pytest.approx(100 * hits / 3)
    assert results[1]["truncated"] == 3 and results[1]["texts"] == 6
    assert results[2]["figures"]["chance"] == 50 and 0 <= results[2]["figures"]["top-1"] <= 100


def test_models_side_by_side_and_the_report(
    clip: Path, root: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of vectors, of another image order, stands beside the model that made them, with the same figures."""
    model, out = open_dual_encoder(str(clip), "cpu"), tmp_path / "out"
    images, _, _ = both(model, pictures)
    captions = [c for r in list(open_records(pictures / "captions.jsonl"))[:8] for c in r.captions]
    names = [f"flickr30k-images/{n}.png" for n in range(8)]
    file = tmp_path / "theirs.npz"

    def save(count: int) -> None:
        order = list(range(count))[::-1]
        np.savez(
            file, images=3 * images[order].numpy(), image_names=[names[n] for n in order],
            texts=model.encode_text(captions).numpy(), captions=captions,
        )  # fmt: skip

    save(8)
    command = ["evaluate", str(clip), "--benchmarks", "flickr30k", "--root", str(root), "--out", str(out)]
    assert main([*command, "--against", str(file)]) == 0
    ours, theirs = json.loads((out / "results.json").read_text())["results"]
    assert ours["model"] == clip.name and theirs["model"] == "theirs.npz"
    for key in ("I2T", "T2I", "I2T interval", "T2I chance"):
        assert ours["rows"][0][key] == theirs["rows"][0][key]
    assert theirs["rows"][0]["truncated"] is None and ours["rows"][0]["truncated"] > 0
    page, said = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert page.count("<svg") >= 2 and page.count("data:image/jpeg") >= 5 * 6
    assert "right: " in page and "wrong: " in page and "<script" not in page
    assert "paper: Llama3-8B-CC | 92.0" in said and f"{clip.name} above theirs.npz | +0.0" in said
    assert f"above the paper's Llama3-8B-CC | {ours['rows'][0]['I2T']['R@1'] - 92.0:+.1f}" in said
    save(7)
    capsys.readouterr()
    assert main([*command, "--against", str(file)]) == 0  # the first model's figures are there
    said = capsys.readouterr().out
    assert "no vector of 1 of 8 images" in said and "7.png for one" in said
    np.savez(file, images=images.numpy())
    assert main([*command, "--against", str(file), "no/such-model"]) == 0, "the first model's report is not lost"
    said = capsys.readouterr().out
    assert "no array 'image_names'" in said and "such-model is left out" in said and "It takes" not in said


def test_what_a_file_of_vectors_may_not_be(tmp_path: Path) -> None:
    file = tmp_path / "theirs.npz"

    def saved(names: list[str], texts: np.ndarray) -> PrecomputedEmbeddings:
        np.savez(file, images=np.eye(len(names), 3), image_names=names, texts=texts, captions=["x"])
        return PrecomputedEmbeddings(file, SkipLog())

    found = saved(["cat/1.jpg", "wow!.jpg"], np.ones((1, 3)))
    vectors, kept = found.images([FileImage("/a/wow!.jpg"), FileImage("/a/b/cat/1.jpg")])
    assert kept == [0, 1] and vectors.tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"one vector for /train/cat/1.jpg and /test/cat/1.jpg"):
        found.images([FileImage("/train/cat/1.jpg"), FileImage("/test/cat/1.jpg")])
    with pytest.raises(ValueError, match="no vector of 1 of 1 texts"):
        found.texts(["y"])
    assert found.texts(["x"]).shape == (1, 3)
    np.savez(file, images=np.eye(1, 3), image_names=["1.jpg"], texts=np.ones((2, 3)), captions=[" x ", "x"])
    assert PrecomputedEmbeddings(file, SkipLog()).texts(["x"]).shape == (1, 3), "stripped, as records are"
    np.savez(file, images=np.eye(1, 3), image_names=["1.jpg"], texts=np.eye(2, 3), captions=[" x ", "x"])
    with pytest.raises(ValueError, match="'x' has two vectors"):
        PrecomputedEmbeddings(file, SkipLog())
    np.save(tmp_path / "matrix.npy", np.eye(3))
    (tmp_path / "matrix.npy").rename(tmp_path / "matrix.npz")
    with pytest.raises(ValueError, match=r"matrix\.npz"):
        PrecomputedEmbeddings(tmp_path / "matrix.npz", SkipLog())
    with pytest.raises(ValueError, match="some are the same"):
        saved(["1.jpg", "1.jpg"], np.ones((1, 3)))
    with pytest.raises(ValueError, match="not finite"):
        saved(["1.jpg"], np.full((1, 3), np.nan))
    with pytest.raises(ValueError, match="images are 3 wide, texts 2"):
        saved(["1.jpg"], np.ones((1, 2)))


def test_one_that_fails_does_not_take_the_others_with_it(
    clip: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model without some of the vectors, a benchmark with a broken picture, and one without training images."""
    out, file = tmp_path / "out", tmp_path / "theirs.npz"
    np.savez(file, images=np.eye(1, 3), image_names=["1.png"], texts=np.eye(1, 3), captions=["x"])
    folder = tmp_path / "mine/cat"
    folder.mkdir(parents=True)
    for n in range(30):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(folder / f"{n}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    names = ["--benchmarks", "flickr30k", f"folder:{tmp_path / 'mine'}", "--root", str(root), "--out", str(out)]
    command = ["evaluate", str(clip), *names, "--against", str(file), "--linear_probe"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "theirs.npz on flickr30k is left out" in said and "no linear probe: " in said
    results = json.loads((out / "results.json").read_text())["results"]
    assert [(r["model"], r["benchmark"].partition(":")[0]) for r in results] == [
        (clip.name, "flickr30k"),
        (clip.name, "folder"),
    ]
    assert results[1]["images"] == 30 and "linear probe" not in results[1]["figures"]
    assert "1 of 31 rows skipped (undecodable image: 1)" in (out / "report.md").read_text()
    (folder / "worse.png").write_bytes(b"")
    assert main(command) == 0
    assert "over the limit of 5.0%" in capsys.readouterr().out


def test_names_for_tables(tmp_path: Path) -> None:
    for name in ("a/model", "b/model", "b/other/model"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(tmp_path / n) for n in ("a/model", "b/model", "b")]
    assert display_names(paths[:2]) == ["a", "b"] and display_names([paths[0], "st:some/model"]) == [
        "a",
        "st:some/model",
    ]
    assert display_names(paths) == paths  # "b" would stand twice
    assert display_names([paths[0]] * 2) == [paths[0], f"{paths[0]} (2)"]


def test_a_folder_of_ones_own_and_its_probe(clip: Path, pictures: Path, tmp_path: Path) -> None:
    """Colours told apart by a probe: as by scikit-learn on the same vectors."""
    from sklearn.linear_model import LogisticRegression

    folder, parts = tmp_path / "mine", {"train": [], "test": []}
    for n in range(36):
        part, label = ("test" if n % 3 == 0 else "train"), f"colour_{n // 18}"
        place = folder / part / label
        place.mkdir(parents=True, exist_ok=True)
        Image.open(pictures / f"{n}.png").save(place / f"{n:02}.png")
        parts[part].append((place / f"{n:02}.png", n // 18))
    names = ["--benchmarks", f"folder:{folder}", "--linear_probe"]
    assert main(["evaluate", str(clip), *names, "--out", str(tmp_path / "out")]) == 0
    [found] = json.loads((tmp_path / "out/results.json").read_text())["results"]
    figures = found["figures"]
    assert found["images"] == 12 and figures["chance"] == 50
    model = open_dual_encoder(str(clip), "cpu")

    def encoded(part: str) -> tuple[np.ndarray, list[int]]:
        pictures = [model.transform(load_image(file)) for file, _ in parts[part]]
        return model.encode_images(pictures).numpy(), [label for _, label in parts[part]]

    probe = LogisticRegression(C=figures["its C"], max_iter=1000).fit(*encoded("train"))
    assert figures["linear probe"] == pytest.approx(100 * probe.score(*encoded("test")))


def _evaluate_without_leaving(command: list[str]) -> None:
    """What the command does, but for parting from the other process, which `distributed` does."""
    parser, verbs = build()
    given = parser.instantiate(parser.parse_args(command))
    verbs[given.subcommand](given[given.subcommand])


def test_two_processes_give_the_figures_of_one(clip: Path, root: Path, tmp_path: Path) -> None:
    command = ["evaluate", str(clip), "--benchmarks", "flickr30k", "winoground", "--root", str(root)]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    distributed(2, _evaluate_without_leaving, [*command, "--out", str(tmp_path / "two")])
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert one == two


def test_what_is_not_there(clip: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(clip), "--benchmarks", "flickr31k", "--root", str(root)]) == 1
    assert "there are flickr30k, coco" in capsys.readouterr().err
    assert main(["evaluate", str(clip), "--benchmarks", "docci", "--root", str(root)]) == 1
    said = capsys.readouterr().err
    assert "nothing could be measured" in said and "docci is left out" in said and "It takes docci_descriptions" in said
    assert main(["evaluate", "--benchmarks", "docci", "--root", str(root)]) == 1
    assert "name the model" in capsys.readouterr().err
    assert main(["benchmarks", "--root", str(root)]) == 0
    said = capsys.readouterr().out
    assert "docci_images.tar.gz" in said and "How to get the others" in said and "flickr30k_test.json" not in said


def test_a_row_that_is_not_as_expected_costs_its_benchmark_alone(
    clip: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(root, broken)
    docci = broken / "docci"
    docci.mkdir()
    (docci / "images").mkdir()
    (docci / "docci_descriptions.jsonlines").write_text('{"split": "test", "description": "a dog"}\n')
    command = ["evaluate", str(clip), "--benchmarks", "docci", "flickr30k", "--root", str(broken)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "docci is left out" in said and "not in the form of docci (KeyError('image_file'))" in said
    assert "flickr30k: 1,000 images" in said

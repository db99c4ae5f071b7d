"""The `evaluate` and `benchmarks` commands, compared with direct computations, and their errors."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from conftest import run_distributed
from dense_fixtures import COLOURS, VOC, make_coco
from format_fixtures import write_jsonl
from llm2clip.cli import main
from llm2clip.config import EvaluateOptions
from llm2clip.data.image_facts import get_distinct_image_hashes, save_training_image_hashes
from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.benchmarks.classification import SUGARCREPE_KINDS
from llm2clip.evaluate.embeddings import PrecomputedEmbeddings
from llm2clip.evaluate.runner import evaluate_models
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.loading import get_display_names
from test_benchmarks import write
from test_dual_encoder import clip as clip  # the fixture


@pytest.fixture
def root(image_folder: Path, tmp_path: Path) -> Path:
    """Folder of benchmarks: Flickr30k with eight images, SugarCrepe with three examples, CIFAR-10 with four images."""
    folder = tmp_path / "root"
    records = [r for r in open_records(image_folder / "captions.jsonl") if r.image is not None][:8]
    rows = []
    for n, record in enumerate(records):
        for name in (f"flickr30k/flickr30k-images/{n}.png", f"sugarcrepe/val2017/w{n}.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.open(str(record.image)).save(folder / name)
        sentences = [{"raw": caption} for caption in record.captions]
        rows.append({"filename": f"{n}.png", "split": "test", "sentences": sentences})
    write(folder / "flickr30k/dataset_flickr30k.json", {"images": rows})
    for kind in SUGARCREPE_KINDS:
        examples = {
            str(n): {"filename": f"w{n}.png", "caption": f"c {n}", "negative_caption": f"d {n} " + "x" * 99}
            for n in (range(3) if kind == "swap_obj" else ())
        }
        write(folder / f"sugarcrepe/{kind}.json", examples)
    (folder / "cifar10").mkdir()
    pixels = torch.randint(0, 256, (4, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = b"".join(bytes([n % 2]) + row.numpy().tobytes() for n, row in enumerate(pixels))
    (folder / "cifar10/test_batch.bin").write_bytes(data)
    write(folder / "cifar10/batches.meta.txt", "airplane\nfrog\n")
    return folder


def encode_eight_images(model: DualEncoder, image_folder: Path) -> torch.Tensor:
    """Return the embeddings of the images in the benchmark folder flickr30k."""
    records = list(open_records(image_folder / "captions.jsonl"))[:8]
    return model.encode_images([model.transform(load_image(str(record.image))) for record in records])


def read_results(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["results"]


def test_evaluate_command_matches_direct_computation(
    clip: Path, root: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    names = ["flickr30k", "sugarcrepe", "cifar10", "coco"]
    command = ["evaluate", str(clip), "--benchmarks", *names, "--root", str(root), "--out", str(out)]
    assert main(command) == 1, "coco is missing"
    output, errors = capsys.readouterr()
    assert "Skipped coco" in errors and "karpathy" in errors.lower() and "% of the texts" in output
    assert "## flickr30k: part of the benchmark, 8 of 1,000 images (published results: complete" in output
    assert "## sugarcrepe: part of the benchmark, 3 of 7,511 images\n" in output
    results = read_results(out)
    assert [result["benchmark"] for result in results] == names[:3]
    assert main(command) == 1  # now from cached embeddings
    assert read_results(out) == results

    model = open_dual_encoder(str(clip), "cpu")
    images = encode_eight_images(model, image_folder)
    captions = [list(r.captions) for r in open_records(image_folder / "captions.jsonl")][:8]
    texts = model.encode_texts([caption for image_captions in captions for caption in image_captions])
    owner = torch.tensor([n for n, image_captions in enumerate(captions) for _ in image_captions])
    best = (texts @ images.T).argmax(1)
    [row] = results[0]["rows"]
    assert row["T2I"]["R@1"] == pytest.approx(100 * float((best == owner).double().mean()))
    scores = [images[n] @ model.encode_texts([f"c {n}", f"d {n} " + "x" * 99]).T for n in range(3)]
    accuracy = 100 * sum(bool(correct > wrong) for correct, wrong in scores) / 3
    assert results[1]["metrics"] == pytest.approx({"swap_obj": accuracy, "mean": accuracy})
    assert results[1]["truncated"] == 3 and results[1]["texts"] == 6
    assert results[2]["metrics"]["chance"] == 50 and 0 <= results[2]["metrics"]["top-1"] <= 100


def test_evaluate_compares_baselines_in_a_report(
    clip: Path, root: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of a model's own embeddings, in another order of images, gives the metrics of the model."""
    model, out = open_dual_encoder(str(clip), "cpu"), tmp_path / "out"
    images = encode_eight_images(model, image_folder)
    captions = [c for r in list(open_records(image_folder / "captions.jsonl"))[:8] for c in r.captions]
    names = [f"flickr30k-images/{n}.png" for n in range(8)]
    file = tmp_path / "other.npz"

    def save(count: int) -> None:
        order = list(range(count))[::-1]
        np.savez(
            file, images=3 * images[order].numpy(), image_names=[names[n] for n in order],
            texts=model.encode_texts(captions).numpy(), captions=captions,
        )  # fmt: skip

    save(8)
    command = ["evaluate", str(clip), "--benchmarks", "flickr30k", "--root", str(root), "--out", str(out)]
    assert main([*command, "--baselines", str(file)]) == 0
    ours, other = read_results(out)
    assert ours["model"] == clip.name and other["model"] == "other.npz"
    for key in ("I2T", "T2I", "I2T interval", "T2I chance"):
        assert ours["rows"][0][key] == other["rows"][0][key]
    assert other["rows"][0]["truncated"] is None and ours["rows"][0]["truncated"] > 0
    page, report = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert page.count("data:image/jpeg") >= 5 * 6
    assert "correct: " in page and "wrong: " not in page and "<script" not in page
    assert "paper 2024: Llama3-8B-CC | 92.0" in report
    limit = 100 * binomtest(0, 8).proportion_ci(method="exact").high
    assert f"{clip.name} minus other.npz | +0.0 | {-limit:.1f} to {limit:+.1f} |" in report, "all hits are equal"
    assert other["rows"][0]["difference"]["I2T interval"]["R@1"] == pytest.approx([-limit, limit])
    run = json.loads((out / "results.json").read_text())["run"]
    assert run["settings"]["models"] == [str(clip), str(file)]
    assert f"llm2clip {run['version']}, " in report and run["machine"] in page and "<details><summary>Settings" in page
    assert f"minus paper 2024: Llama3-8B-CC | {ours['rows'][0]['I2T']['R@1'] - 92.0:+.1f}" in report

    save(7)
    capsys.readouterr()
    assert main([*command, "--baselines", str(file)]) == 1
    errors = capsys.readouterr().err
    assert "no embedding for 1 of 8 images" in errors and "7.png" in errors
    np.savez(file, images=images.numpy())
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/config.json").write_text('{"model_type": "unknown"}')
    assert main([*command, "--baselines", str(file), str(tmp_path / "unknown")]) == 1
    errors = capsys.readouterr().err
    assert (
        "must contain the arrays images, image_names" in errors
        and "Skipped unknown: " in errors
        and "Required files" not in errors
    )
    assert [result["model"] for result in read_results(out)] == [clip.name], "the first model has a result"
    assert "Skipped unknown" in (out / "report.md").read_text()


def test_precomputed_embeddings_reject_invalid_files(tmp_path: Path) -> None:
    file = tmp_path / "other.npz"

    def save(names: list[str], texts: np.ndarray, captions: Sequence[str] = ("x",)) -> PrecomputedEmbeddings:
        np.savez(file, images=np.eye(len(names), 3), image_names=names, texts=texts, captions=captions)
        return PrecomputedEmbeddings(file, SkipLog())

    embeddings = save(["cat/1.jpg", "wow!.jpg"], np.ones((1, 3)))
    images, indices = embeddings.encode_images([FileImage("/a/wow!.jpg"), FileImage("/a/b/cat/1.jpg")])
    assert indices == [0, 1] and images.tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match=r"/train/cat/1.jpg and /test/cat/1.jpg match the same entry"):
        embeddings.encode_images([FileImage("/train/cat/1.jpg"), FileImage("/test/cat/1.jpg")])
    with pytest.raises(ValueError, match="no embedding for 1 of 1 texts"):
        embeddings.encode_texts(["y"])
    assert save(["1.jpg"], np.ones((2, 3)), [" x ", "x"]).encode_texts(["x"]).shape == (1, 3), (
        "stripped, as records are"
    )
    for names, texts, captions, message in (
        (["1.jpg"], np.eye(2, 3), [" x ", "x"], "'x' has two different embeddings"),
        (["1.jpg", "1.jpg"], np.ones((1, 3)), ["x"], "contains duplicate image_names"),
        (["1.jpg"], np.full((1, 3), np.nan), ["x"], "NaN or infinity"),
        (["1.jpg"], np.ones((1, 2)), ["x"], r"image embeddings \(3\) and text embeddings \(2\) must have the same"),
    ):
        with pytest.raises(ValueError, match=message):
            save(names, texts, captions)
    np.save(tmp_path / "matrix.npy", np.eye(3))
    (tmp_path / "matrix.npy").rename(tmp_path / "matrix.npz")
    with pytest.raises(ValueError, match=r"matrix\.npz"):
        PrecomputedEmbeddings(tmp_path / "matrix.npz", SkipLog())


def test_evaluate_continues_after_a_failure(
    clip: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A baseline that lacks embeddings, a malformed row, and a broken image."""
    out, file = tmp_path / "out", tmp_path / "other.npz"
    np.savez(file, images=np.eye(1, 3), image_names=["1.png"], texts=np.eye(1, 3), captions=["x"])
    folder = tmp_path / "mine/cat"
    folder.mkdir(parents=True)
    for n in range(30):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(folder / f"{n}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (root / "docci/images").mkdir(parents=True)
    (root / "docci/docci_descriptions.jsonlines").write_text('{"split": "test", "description": "a dog"}\n')
    names = ["docci", "flickr30k", f"folder:{tmp_path / 'mine'}"]
    options = ["--root", str(root), "--out", str(out), "--baselines", str(file)]
    command = ["evaluate", str(clip), "--benchmarks", *names, *options]
    assert main(command) == 1
    errors = capsys.readouterr().err
    assert "Skipped other.npz on flickr30k" in errors
    assert "does not match the docci format (KeyError('image_file'))" in errors
    results = read_results(out)
    assert [(result["model"], result["benchmark"].partition(":")[0]) for result in results] == [
        (clip.name, "flickr30k"),
        (clip.name, "folder"),
    ]
    assert results[1]["images"] == 30
    assert "1 of 31 rows skipped (undecodable image: 1)" in (out / "report.md").read_text()
    (folder / "worse.png").write_bytes(b"")
    assert main(command) == 1
    assert "limit of 5.0%" in capsys.readouterr().err


def test_evaluate_reports_short_queries_next_to_class_accuracy(
    clip: Path, root: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second baseline lacks embeddings for words, and therefore appears only in the other tables."""
    model, out = open_dual_encoder(str(clip), "cpu"), tmp_path / "out"
    records = list(open_records(f"{image_folder / 'captions.jsonl'}@train"))
    images = model.encode_images([model.transform(load_image(str(record.image))) for record in records])
    captions = [caption for record in records for caption in record.texts]
    file = tmp_path / "other.npz"
    np.savez(
        file, images=images.numpy(), image_names=[Path(str(record.image)).name for record in records],
        texts=model.encode_texts(captions).numpy(), captions=captions,
    )  # fmt: skip
    copy = shutil.copytree(clip, tmp_path / "copy")
    command = ["evaluate", str(clip), f"{image_folder / 'captions.jsonl'}@train", "--short_queries", "--out", str(out)]
    command += ["--baselines", str(copy), str(file), "--templates", "a photo of a {}"]
    assert main([*command, "--benchmarks", "cifar10", "--root", str(root)]) == 1
    errors = capsys.readouterr().err
    assert "Skipped short queries for other.npz on data, captions" in errors and "no embedding for" in errors

    results = {(result["model"], result["benchmark"]): result for result in read_results(out)}
    row, _ = results[clip.name, "data"]["rows"]  # the second row is for the long captions
    assert [entry["words"] for entry in row["short queries"]] == ["1", "2", "3", "4–7", "8+"]
    for entry, averaged in zip(row["short queries"], row["short queries with templates"], strict=True):
        assert (averaged["mAP"] == entry["mAP"]) == (entry["words"] in ("4–7", "8+"))
    assert "short queries" not in results["other.npz", "data"]["rows"][0]

    top1 = results[clip.name, "cifar10"]["metrics"]["top-1"]
    report = (out / "report.md").read_text()
    _, section, long_section = re.split(r"## data, \w+: retrieval quality by query length", report)
    assert "8+ words: mAP" in long_section and "4–7 words" not in long_section
    assert "1 word: mAP" in section and "cifar10: top-1" in section and "other.npz" not in section
    assert re.search(rf"^\| {clip.name} \| .* \| {top1:.1f} \(\d+\.\d to \d+\.\d\) \|$", section, re.M)
    zero = r" \| \+0\.0 \(-\d+\.\d to \+\d+\.\d\)"
    assert re.search(rf"^\| {clip.name} minus copy({zero}){{6}} \|$", section, re.M)
    assert re.search(rf"^\| {clip.name} minus copy \| –({zero}){{3}} \| – \| – \|$", report, re.M), "zero-shot accuracy"
    assert f"{clip.name} minus {clip.name}, with templates" in section
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1 and "words in the caption" in page, "recall by caption length"


def test_display_names_are_short_and_unique(tmp_path: Path) -> None:
    for name in ("a/model", "b/model", "b/other/model"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(tmp_path / name) for name in ("a/model", "b/model", "b")]
    assert get_display_names(paths[:2]) == ["a", "b"]
    assert get_display_names([paths[0], "st:some/model"]) == ["a", "st:some/model"]
    assert get_display_names(paths) == paths  # the short name "b" would not be unique
    assert get_display_names([paths[0]] * 2) == [paths[0], f"{paths[0]} (2)"]


def test_evaluate_on_a_folder_of_classes(clip: Path, image_folder: Path, tmp_path: Path) -> None:
    for n in range(12):
        file = tmp_path / "mine/test" / f"colour_{n // 6}" / f"{n:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.open(image_folder / f"{3 * n}.png").save(file)
    command = ["evaluate", str(clip), "--benchmarks", f"folder:{tmp_path / 'mine'}"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    [result] = read_results(tmp_path / "out")
    assert result["images"] == 12 and result["metrics"]["chance"] == 50


def test_evaluate_dense_benchmarks_in_a_report_and_on_two_ranks(
    clip: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks share images and texts, and get the results of one process. One of COCO's images cannot be decoded."""
    file = make_coco(root / "coco")
    (root / "coco/val2017/1.png").write_bytes(b"no image")
    VOC.save(root / "voc2012", [0, 1, 20, 255])
    monkeypatch.setattr("llm2clip.evaluate.benchmarks.segmentation.get_imagenet_templates", lambda: ["a {}"])
    benchmarks = ["flickr30k", "sugarcrepe", *(f"{kind}:{file}" for kind in ("boxes", "segmentation", "detection"))]
    out = tmp_path / "out"
    options = EvaluateOptions(
        benchmarks=[*benchmarks, "voc20"], root=str(root), out=str(out), templates=["a {}"], proposals="ground-truth",
        crop_proposals=True, max_skipped=0.5, dense_variants=["plain", "naclip"],
    )  # fmt: skip
    evaluate_models([str(clip), str(clip)], [], options)
    results = read_results(out)
    on_two_ranks = replace(options, benchmarks=benchmarks, out=str(tmp_path / "two"))
    run_distributed(2, evaluate_models, [str(clip)], [], on_two_ranks)
    expected = [result | {"model": clip.name} for result in results[::2] if result["benchmark"] != "voc20"]
    assert read_results(tmp_path / "two") == expected

    by_kind = {result["kind"]: result for result in results[::2] if result["benchmark"] != "voc20"}
    regions, segmentation = by_kind["regions"], by_kind["segmentation"]
    [voc] = [result for result in results[::2] if result["benchmark"] == "voc20"]
    methods = ["plain", "plain, learned scale", "naclip", "naclip, learned scale"]
    assert [row["method"] for row in regions["rows"]] == ["crop", "plain", "naclip"]
    assert (regions["images"], regions["regions"], regions["texts"]) == (2, 3, 3)
    assert regions["chance"] == pytest.approx(100 / 3) and set(regions["rows"][0]["class top-1"]) == set(COLOURS)
    assert [row["method"] for row in segmentation["rows"]] == methods and segmentation["images"] == 2
    assert [row["logit scale"] for row in segmentation["rows"]] == pytest.approx([50, 14.3] * 2, abs=0.05)
    assert set(segmentation["rows"][0]["metrics"]) == {"mIoU", "pixel accuracy", "mean class accuracy"}
    assert set(segmentation["rows"][0]["IoU"]) == {"background", *COLOURS}
    assert (voc["benchmark"], voc["images"], voc["texts"]) == ("voc20", 1, 30)
    for result in results[1::2]:
        for row in result.get("rows", ()):
            assert set(row["difference"].get("metrics", {"": 0}).values()) == {0}, "the baseline is the same model"
    page, report = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "paper 2026: EVA02 + LLM2CLIP | " in report and "The authors published no code" in report
    assert f"{clip} minus {clip} (2) | crop" in report and "| model | method | logit scale |" in report
    assert ("classified as" in page) == (regions["rows"][0]["metrics"]["top-1"] < 100)
    assert 'class="legend"' in page and "<summary>IoU per class, %</summary>" in page


def test_evaluate_reports_missing_benchmarks_and_models(
    clip: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(clip), "--benchmarks", "flickr31k", "--root", str(root)]) == 1
    assert "choose from flickr30k, coco" in capsys.readouterr().err
    assert main(["evaluate", str(clip), "--benchmarks", "docci", "--root", str(root)]) == 1
    errors = capsys.readouterr().err
    assert "nothing could be evaluated" in errors and "Skipped docci" in errors
    assert "Required files: docci_descriptions" in errors
    assert main(["evaluate", str(clip), "--benchmarks", "all", "--root", str(root)]) == 0, "requests only what exists"
    assert "Skipped coco" in capsys.readouterr().out
    assert main(["evaluate", "--benchmarks", "docci", "--root", str(root)]) == 1
    assert "pass a model before the data" in capsys.readouterr().err
    command = ["evaluate", str(clip), "--benchmarks", "flickr30k", "--root", str(root)]
    assert main([*command, "--dense_variants", "slip"]) == 1
    assert "unknown dense variant 'slip': choose from plain" in capsys.readouterr().err


def test_evaluate_states_what_it_evaluates_and_warns_about_training_images(
    clip: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (image_folder / "captions.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = str(image_folder / row["image"])
        row.pop("split")
    data = write_jsonl(tmp_path / "unsplit.jsonl", rows)
    model, out = shutil.copytree(clip, tmp_path / "mine"), tmp_path / "out"
    save_training_image_hashes(model, get_distinct_image_hashes(FileImage(row["image"]) for row in rows[:30]))
    assert main(["evaluate", str(model), f"{data}@none", "--baselines", str(clip), "--out", str(out)]) == 0
    warning = "Warning: mine was trained on 30 of the images in data"
    output = capsys.readouterr().out
    assert warning in output and "## data: 36 images" in output
    assert warning in (out / "report.md").read_text() and warning in (out / "report.html").read_text()
    assert [result.get("images trained on") for result in read_results(out)] == [30, None]
    assert main(["evaluate", str(clip), str(data)]) == 0
    output = capsys.readouterr().out
    assert "Evaluating 3 held-out images out of 36 (one in 10, at most 1,000, because no split" in output
    assert "PATH@none" in output and "training images" not in output and "Warning" not in output
    assert main(["evaluate", str(clip), str(image_folder / "captions.jsonl")]) == 0
    output = capsys.readouterr().out
    assert "Evaluating 6 held-out images out of 36 (the val split)" in output and "PATH@train+val" in output


def test_benchmarks_command_lists_sources_and_published_results(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmarks", "--root", str(root)]) == 0
    output = capsys.readouterr().out
    assert "docci_images.tar.gz" in output and "To use a missing benchmark" in output
    assert "dataset_flickr30k.json" not in output and re.search(r"\| docci \|.*\| 22 \| – \|", output)
    assert re.search(r"\| xm3600 \|.*\| 4 \| – \|", output) and re.search(r"\| xtd10 \|.*\| – \| – \|", output)

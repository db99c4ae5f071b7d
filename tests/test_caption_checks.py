"""Quality control of generated captions: checks of texts, comparison with images, and the report."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from caption_fixtures import FixedCaptioner
from llm2clip.caption import checks as checks_module
from llm2clip.caption.checks import (
    BOILERPLATE,
    DUPLICATE,
    MANY_IMAGES,
    MISMATCH,
    REPETITION,
    TOO_LONG,
    TOO_SHORT,
    WRONG_LANGUAGE,
    check_captions,
    find_language_code,
    find_text_problem,
    rank_captions,
    score_captions,
    strip_boilerplate_opening,
)
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.files import (
    CaptionReport,
    build_caption_report_blocks,
    describe_caption_results,
    select_worst_images,
    write_caption_report,
)
from llm2clip.caption.options import CaptionOptions, Prompt
from llm2clip.caption.run import caption_images
from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.reports import render_plain_text

MODEL = "vlm"
SHORT, SECOND, DENSE = (
    Prompt("sentence", "short", "Describe the image."),
    Prompt("objects", "short", "Name the objects."),
    Prompt("dense", "dense", "Describe the image in detail."),
)
SCRIPT = "<script>alert(1)</script>"
# Captions of different images that have no problem.
SUBJECTS = ("a brown dog", "two children", "an old man", "a red bus", "three cyclists", "a white cat", "a surfer")
PLACES = ("in a park", "on a beach", "near a river", "in front of a shop", "under a bridge", "on a wet street")


def make_database(
    file: Path, captions: Sequence[Sequence[str | None]], prompts: Sequence[Prompt] = (SHORT, SECOND), images: str = ""
) -> CaptionDatabase:
    """Create a database with one row of captions per image, one caption per prompt. None is a failed request."""
    database = CaptionDatabase(file)
    database.replace_image_rows(
        ImageRow(n, f"key {n}", make_hash(n), {"image": f"{images}{n}.png", "id": str(n)}) for n in range(len(captions))
    )
    for n, texts in enumerate(captions):
        for prompt, text in zip(prompts, texts, strict=False):
            error = "HTTP 500: no memory" if text is None else None
            database.add_answers([StoredAnswer(make_hash(n), prompt.key, 0, MODEL, text, error, 0.0, "2026-11-29")])
    return database


def make_hash(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def list_problems(database: CaptionDatabase, number: int, prompts: Sequence[Prompt] = (SHORT, SECOND)) -> list[object]:
    answers = database.list_answers(make_hash(number), MODEL, prompts)
    return [answer.problem for answer in answers]


def make_sentences(count: int) -> list[str]:
    return [f"Picture {n}: {SUBJECTS[n % 7]} {PLACES[n % 6]} at {n} o'clock" for n in range(count)]


# ---- one text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The image shows a dog", "A dog"),
        ("This is a photo of a man on a horse.", "A man on a horse."),
        ("In this picture we can see two men and a dog", "Two men and a dog"),
        ("In the image, there is a red car", "A red car"),
        ("this photograph clearly depicts what appears to be a barn", "a barn"),
        ("Sure! Here is a caption for the photo: The image shows that a boy runs", "A boy runs"),
        ("It’s a picture showing three cats", "Three cats"),
        ("The image is a photo of a street", "A street"),
        # These are not boilerplate, or nothing could be removed.
        ("The picture on the wall shows a dog", "The picture on the wall shows a dog"),
        ("A photographer shows the picture of a dog", "A photographer shows the picture of a dog"),
        ("The image shows how a dog jumps", "The image shows how a dog jumps"),
        ("The image shows", "The image shows"),
        ("A black and white photo of a dog", "A black and white photo of a dog"),
        ("In the picture frame is a cat", "In the picture frame is a cat"),
    ],
)
def test_english_openings_are_removed(text: str, expected: str) -> None:
    assert strip_boilerplate_opening(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("The image shows how a dog jumps", BOILERPLATE),
        ("Das Bild zeigt einen Hund im Garten", BOILERPLATE),
        ("Auf diesem Foto sieht man einen Hund", BOILERPLATE),
        ("L'image montre un chien dans le jardin", BOILERPLATE),
        ("Sur cette photo, un chien court", BOILERPLATE),
        ("这张图片显示了一只狗", BOILERPLATE),
        ("图片中有一只狗在草地上", BOILERPLATE),
        ("这是一张黑白照片", BOILERPLATE),
        ("Das Bild hängt an einer Wand", None),
        ("Auf dem Bildschirm läuft ein Film", None),
        ("L'imagerie du port de nuit", None),
        ("照片墙前站着一个人", None),
        ("A sign that shows the image of a dog", None),
        ("a dog", TOO_SHORT),
        ("dog .!", TOO_SHORT),
        ("", TOO_SHORT),
        ("a dog runs", None),
        ("两只狗", TOO_SHORT),
        ("两只狗跑", None),
        ("หมา", TOO_SHORT),
        ("หมาสองตัว", None),
        ("개가 공원에서 달린다", None),
        ("a dog and a dog and a dog and a dog", REPETITION),
        ("a very very very very tall tower", REPETITION),
        ("a very very very tall tower", None),
        ("狗狗狗狗在草地上", REPETITION),
        (" ".join(f"there is a man with a {noun}," for noun in ("hat", "bag", "dog", "map")), REPETITION),
        (" ".join(f"there is a man with a {noun}," for noun in ("hat", "bag", "dog")), None),
        ("a red bus and a blue bus and a green bus and a white bus on a road", None),
    ],
)
def test_problem_of_a_text_is_found(text: str, problem: str | None) -> None:
    assert find_text_problem(text, "short") == problem


def test_length_limit_depends_on_the_kind_of_caption() -> None:
    words = " ".join(f"word{n}" for n in range(60))
    assert find_text_problem(words, "short") == TOO_LONG and find_text_problem(words, "dense") is None
    assert find_text_problem(" ".join(words.split()[:50]), "short") is None
    assert find_text_problem(" ".join(f"word{n}" for n in range(401)), "dense") == TOO_LONG
    characters = "".join(chr(0x4E00 + n) for n in range(101))
    assert find_text_problem(characters, "short") == TOO_LONG and find_text_problem(characters[:100], "short") is None


def test_long_text_with_few_distinct_words_is_a_repetition() -> None:
    rng = np.random.default_rng(0)
    few, many = (" ".join(f"w{n}" for n in rng.integers(0, size, 60)) for size in (12, 60))
    assert find_text_problem(few, "dense") == REPETITION and find_text_problem(many, "dense") is None


def test_language_is_found_by_name_and_code() -> None:
    assert [find_language_code(name) for name in ("German", "Simplified Chinese", "fr", "Klingon")] == [
        "de",
        "zh",
        "fr",
        None,
    ]


# ---- all texts -------------------------------------------------------------------------------------------------------


def test_duplicates_of_an_image_are_rejected_except_for_the_first(tmp_path: Path) -> None:
    captions = [
        ["A dog runs in the park.", "A dog runs in the park."],
        ["A dog sits in the park.", "a dog, sits in the PARK"],
        ["The image shows a cat on a sofa", "A cat on a sofa"],
        ["A bus on a street", "A street with a bus"],
        ["A dog runs in the park.", "Two people walk along a path"],
    ]
    database = make_database(tmp_path / "c.sqlite", captions)
    checks = check_captions(database, MODEL, [SHORT, SECOND])
    problems = [list_problems(database, n) for n in range(5)]
    assert problems == [[None, DUPLICATE]] * 3 + [[None, None]] * 2
    assert database.count_rejected_by_problem(MODEL, [SHORT, SECOND, DENSE]) == {DUPLICATE: 3}
    assert checks.num_captions == 10 and checks.num_shortened == 1
    text = database.list_answers(make_hash(2), MODEL, [SHORT])[0].text
    assert text == "The image shows a cat on a sofa"  # the original stays in the database


@pytest.mark.parametrize(("num_shared", "fraction", "limit"), [(5, 0.001, 5), (6, 0.001, 5), (10, 0.25, 10)])
def test_caption_of_too_many_images_is_rejected(
    num_shared: int, fraction: float, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_module, "MAX_SHARED_FRACTION", fraction)
    captions = [[f"A person {'sits' if n % 2 else 'SITS'} in a room!"] for n in range(num_shared)]
    captions += [[text] for text in make_sentences(40 - num_shared)]
    database = make_database(tmp_path / "c.sqlite", captions)
    checks = check_captions(database, MODEL, [SHORT])
    expected = [MANY_IMAGES if num_shared > limit else None] * num_shared + [None] * (40 - num_shared)
    assert [list_problems(database, n)[0] for n in range(40)] == expected and checks.max_images == limit


def test_language_of_most_captions_is_expected(tmp_path: Path) -> None:
    english = [f"{subject} is walking slowly while the sun is shining on the houses" for subject in SUBJECTS[:5]]
    german = "Zwei kleine Hunde spielen mit einem Ball auf einer grünen Wiese."
    chinese = "一只棕色的狗和一只白色的猫在公园的草地上一起快乐地奔跑玩耍"
    captions = [[text] for text in (*english, german, chinese, "Hund Auto Baum")]
    database = make_database(tmp_path / "c.sqlite", captions)
    check_captions(database, MODEL, [SHORT])
    problems = [list_problems(database, n)[0] for n in range(8)]
    assert problems[:6] == [None] * 5 + [WRONG_LANGUAGE] and problems[7] is None  # the last text is too short to know
    check_captions(database, MODEL, [SHORT], language="German")
    problems = [list_problems(database, n)[0] for n in range(8)]
    assert problems[0] == WRONG_LANGUAGE and problems[5] is None


def test_only_captions_of_the_current_prompts_model_and_images_are_checked(tmp_path: Path) -> None:
    database = make_database(tmp_path / "c.sqlite", [["dog", "dog"], ["cat", "cat"]])
    other = StoredAnswer(make_hash(0), SHORT.key, 0, "other model", "dog", None, 0.0, "2026-11-29")
    removed = StoredAnswer(make_hash(9), SHORT.key, 0, MODEL, "dog", None, 0.0, "2026-11-29")
    unused = StoredAnswer(make_hash(0), SECOND.key, 1, MODEL, "dog", None, 0.0, "2026-11-29")  # the prompt has 1 sample
    database.add_answers([other, removed, unused])
    check_captions(database, MODEL, [SECOND])
    assert database.count_rejected_by_problem(MODEL, [SECOND]) == {TOO_SHORT: 2}
    problems = database.connection.execute(
        "SELECT prompt, sample, model, problem FROM answers WHERE problem IS NOT NULL"
    )
    assert set(problems) == {(SECOND.key, 0, MODEL, TOO_SHORT)}


def test_checks_in_small_batches_give_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [[text, text if n % 3 else "A man"] for n, text in enumerate(make_sentences(20))]
    results = []
    for rows in (1000, 3):
        monkeypatch.setattr(checks_module, "ROWS_PER_BATCH", rows)
        database = make_database(tmp_path / f"{rows}.sqlite", captions)
        checks = check_captions(database, MODEL, [SHORT, SECOND])
        assert check_captions(database, MODEL, [SHORT, SECOND]) == checks  # the checks can be repeated
        results.append((checks, [list_problems(database, n) for n in range(20)]))
        assert database.count_rejected_by_problem(MODEL, [SHORT, SECOND]) == {DUPLICATE: 13, TOO_SHORT: 7}
    assert results[0] == results[1]


# ---- comparison with the images --------------------------------------------------------------------------------------


def test_score_and_rank_match_a_naive_computation(
    tmp_path: Path, image_folder: Path, dual_encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is smaller than the number of images, so some captions are compared with their own image."""
    monkeypatch.setattr(checks_module, "SAMPLE_SIZE", 14)
    monkeypatch.setattr(checks_module, "IMAGES_PER_BATCH", 4)
    captions = [[text, f"{text}, seen from above"] for text in make_sentences(18)]
    database = make_database(tmp_path / "c.sqlite", captions, images=f"{image_folder}/")
    result = score_captions(database, MODEL, [SHORT, SECOND], dual_encoder, max_rank=0.4)
    images = [dual_encoder.transform(load_image(image_folder / f"{n}.png")) for n in range(18)]
    image_embeddings = dual_encoder.encode_images(images).double().numpy()
    sample = sorted(range(18), key=make_hash)[:15]
    assert result.sample_size == 15 and result.num_captions == 36
    num_rejected = 0
    for n in range(18):
        others = [other for other in sample if other != n]
        for answer in database.list_answers(make_hash(n), MODEL, [SHORT, SECOND]):
            text = dual_encoder.encode_texts([answer.text or ""])[0].double().numpy()
            score = text @ image_embeddings[n]
            rank = np.mean([text @ image_embeddings[other] > score for other in others])
            assert answer.score == pytest.approx(score, abs=1e-5) and answer.rank == pytest.approx(rank, abs=1e-6)
            assert answer.problem == (MISMATCH if rank > 0.4 else None)
            num_rejected += rank > 0.4
    assert 0 < num_rejected == database.count_rejected_by_problem(MODEL, [SHORT, SECOND])[MISMATCH] < 36


def test_equal_similarities_count_half_and_the_own_image_does_not_count() -> None:
    texts = torch.eye(3)[:2]
    images = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    sample = torch.tensor([[0.6, 0.8, 0.0], [1.0, 0.0, 0.0], [0.6, 0.0, 0.8], [0.0, 1.0, 0.0]])
    is_own = torch.tensor([[True, False, False, False], [False] * 4])
    scores, ranks = rank_captions(texts, images, sample, is_own)
    assert scores.tolist() == pytest.approx([0.6, 0.0])
    assert ranks.tolist() == pytest.approx([1.5 / 3, 3 / 4])  # the second text equals two images, and two are better
    _, alone = rank_captions(texts[:1], images[:1], sample[:1], is_own[:1, :1])
    assert alone.tolist() == [0.0]


def test_rejection_by_the_comparison_stays_until_the_next_comparison(
    tmp_path: Path, image_folder: Path, dual_encoder: DualEncoder
) -> None:
    database = make_database(
        tmp_path / "c.sqlite", [[text, "dog"] for text in make_sentences(8)], images=f"{image_folder}/"
    )
    check_captions(database, MODEL, [SHORT, SECOND])
    result = score_captions(database, MODEL, [SHORT, SECOND], dual_encoder, max_rank=0.0)
    assert result.num_captions == 8  # captions with another problem are not compared
    rejected = [list_problems(database, n) for n in range(8)]
    assert [MISMATCH, TOO_SHORT] in rejected
    check_captions(database, MODEL, [SHORT, SECOND])
    assert [list_problems(database, n) for n in range(8)] == rejected
    score_captions(database, MODEL, [SHORT, SECOND], dual_encoder, max_rank=1.0)
    assert [list_problems(database, n) for n in range(8)] == [[None, TOO_SHORT]] * 8


def test_unreadable_images_are_not_scored(tmp_path: Path, image_folder: Path, dual_encoder: DualEncoder) -> None:
    for n in range(3):
        shutil.copy(image_folder / f"{n}.png", tmp_path)
    (tmp_path / "1.png").write_bytes(b"not an image")
    database = make_database(tmp_path / "c.sqlite", [[text] for text in make_sentences(3)])
    result = score_captions(database, MODEL, [SHORT], dual_encoder, max_rank=0.5)
    assert result.num_captions == 2
    report = replace(make_report(database, [SHORT]), scores=result)
    text = " ".join(format_report(database, report).split())
    assert "The captions of 1 image were not compared, because the images could not be decoded" in text
    scores = [database.list_answers(make_hash(n), MODEL, [SHORT])[0].score for n in range(3)]
    assert [score is None for score in scores] == [False, True, False]


# ---- report ----------------------------------------------------------------------------------------------------------


def make_report(database: CaptionDatabase, prompts: Sequence[Prompt] = (SHORT, SECOND)) -> CaptionReport:
    return CaptionReport(["photos"], MODEL, prompts, check_captions(database, MODEL, prompts))


def format_report(database: CaptionDatabase, report: CaptionReport) -> str:
    return render_plain_text(build_caption_report_blocks(database, report), describe_caption_results(database, report))


def test_report_lists_problems_and_failures(tmp_path: Path) -> None:
    captions = [["A dog runs in the park", None], ["A cat", None], ["A red bus on a street", "Two old men talk"]]
    database = make_database(tmp_path / "c.sqlite", captions)
    text = " ".join(format_report(database, make_report(database)).split())
    assert text.startswith("Rejected: 1 of 4 captions (25.0%). Main reason: too short (1). 2 requests failed. content")
    for part in (
        "images 3",
        "captions 4",
        "rejected captions 1",
        "too short 1 25.0%",
        "HTTP 500 2 no memory",
    ):
        assert part in text, part


def test_report_shows_the_worst_images_first(tmp_path: Path) -> None:
    """Failed and rejected captions come first, then high ranks. Duplicates do not count."""
    captions: list[list[str | None]] = [[text, f"{text}, from above"] for text in make_sentences(6)]
    captions[1] = ["dog", None]
    captions[3] = ["A cat on a sofa", None]
    captions[4] = ["A dog on a sofa", "A dog on a sofa"]
    database = make_database(tmp_path / "c.sqlite", captions)
    report = make_report(database)
    for n, rank in ((2, 0.5), (5, 0.2), (0, 0.1)):
        (answer, _) = database.list_answers(make_hash(n), MODEL, [SHORT, SECOND])
        database.update_check_results([replace(answer, score=0.3, rank=rank)])
    assert [row.number for row in select_worst_images(database, report)] == [1, 3, 2, 5, 0, 4]


def test_report_escapes_hostile_captions_names_and_errors(tmp_path: Path, image_folder: Path) -> None:
    name = "<b>&\"'.png"
    shutil.copy(image_folder / "0.png", tmp_path / name)
    database = CaptionDatabase(tmp_path / "c.sqlite")
    record = {"image": name, "id": SCRIPT, "captions": [f"{SCRIPT} from the source"]}
    database.replace_image_rows(
        [ImageRow(0, "a", make_hash(0), record), ImageRow(1, "b", make_hash(1), {"image": "missing.png", "id": "1"})]
    )
    texts = {
        0: (f"{SCRIPT} a dog runs `{SCRIPT}` \x1b[31m", None),
        1: (None, f"{SCRIPT}: {SCRIPT}" + "<img src=x onerror=alert(1)>" * 1000),
    }
    for n, (text, error) in texts.items():
        database.add_answers([StoredAnswer(make_hash(n), SHORT.key, 0, SCRIPT, text, error, 0.0, "2026-11-29")])
    report = CaptionReport([SCRIPT], SCRIPT, [SHORT], check_captions(database, SCRIPT, [SHORT]))
    write_caption_report(tmp_path / "report.html", database, report)
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html and "<img src=x" not in html and "<b>" not in html
    assert html.count("&lt;script&gt;") > 5 and html.count("data:image/jpeg;base64,") == 1
    assert "missing.png" in html and "from the source" in html
    assert len(html) - len((tmp_path / "0").name) < 200_000
    assert "\x1b" not in format_report(database, report)


def test_report_shows_at_most_a_few_hundred_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.caption.files.MAX_IMAGES", 5)
    database = make_database(tmp_path / "c.sqlite", [[text] for text in make_sentences(9)])
    write_caption_report(tmp_path / "report.html", database, make_report(database))
    assert (tmp_path / "report.html").read_text().count("<article>") == 5
    assert json.dumps(make_sentences(1)[0])[1:-1].replace("'", "&#39;") in (tmp_path / "report.html").read_text()


# ---- command ---------------------------------------------------------------------------------------------------------


def test_run_writes_only_accepted_captions_and_a_report(
    tmp_path: Path, image_folder: Path, dual_encoder: DualEncoder
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "captions.jsonl"
    photos.mkdir()
    for n in range(4):
        shutil.copy(image_folder / f"{n}.png", photos)
    captioner = FixedCaptioner({"sentence": "The image shows a red shape on grey", "objects": "red shape"})
    prompts, settings = [SHORT, SECOND], CaptionOptions(check_max_rank=1.0)
    opened = []

    def open_encoder() -> DualEncoder:
        opened.append(captioner.num_answers)
        return dual_encoder

    text = "\n".join(caption_images([str(photos)], out, captioner, prompts, settings, open_encoder))
    assert opened == [8]  # after all captions have been requested
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["captions"] for record in records] == [["A red shape on grey"]] * 4
    assert "(4 captions of 4 records)" in text and "too short" in text and "compare 4 captions with 4 images" in text
    html = (tmp_path / "captions_report.html").read_text()
    assert html.count("<article>") == 4 and "rejected: too short" in html and "(rank " in html
    caption_images([str(photos)], out, captioner, prompts, CaptionOptions(check_max_rank=0.0), lambda: dual_encoder)
    lines = caption_images([str(photos)], out, captioner, prompts, CaptionOptions())  # does not compare them again
    num_best = sum(json.loads(line)["captions"] == ["A red shape on grey"] for line in out.read_text().splitlines())
    text = " ".join("\n".join(lines).split())
    assert num_best < 4 and f"({num_best} caption of" in text
    assert f"rejected captions {8 - num_best}" in text and f"{MISMATCH} {4 - num_best} " in text
    assert "Rejections by earlier comparisons remain in effect" in text

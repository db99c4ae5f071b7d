"""Text recognition in images (OCR) with the PP-OCR models from the package rapidocr.

Large images are scaled down, and the number of text lines, their aspect ratio and the time per image are limited.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llm2clip.data.images import iter_image_batches, shrink_image
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import describe_error, format_install_command, require_extra
from llm2clip.progress import ProgressBar
from llm2clip.search.backends import IndexBackend

MAX_SIDE = 960  # length of the longer side to which larger images are scaled down, in pixels
MAX_LINES = 100  # maximum number of text lines per image
MAX_ASPECT = 60  # maximum aspect ratio of a text line; other lines are skipped, because they are slow to read
MAX_SECONDS = 30.0  # time limit per image, in seconds; checked before each line is read
MAX_TEXT_LENGTH = 10_000  # maximum length of the text of an image, in characters
MIN_CONFIDENCE = 0.5  # minimum confidence of a text line, from 0 to 1
BATCH_SIZE = 16  # number of images per commit

RecognizeText = Callable[[np.ndarray], str]  # maps a uint8 RGB image of shape (H, W, 3) to lines of text


def open_text_recognizer() -> RecognizeText:
    """Return a function that recognises the text in an image with the PP-OCR models.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed, or rapidocr does not contain the weights.
    """
    require_extra("ocr", "--ocr")
    from rapidocr import RapidOCR
    from rapidocr.utils.process_img import get_rotate_crop_image

    params: dict[str, Any] = {
        "Global.log_level": "critical",  # rapidocr warns about each image without text
        "Global.use_preprocess_img": False,  # preprocessing would enlarge narrow images
        "Det.limit_type": "max",
        "Det.limit_side_len": MAX_SIDE,
        "Det.max_candidates": MAX_LINES,
    }
    params.update({f"{part}.model_path": path for part, path in _find_ocr_weights().items()})
    engine: Any = RapidOCR(params=params)  # the return type depends on the arguments of each call

    def recognize_text(image: np.ndarray) -> str:
        deadline = time.monotonic() + MAX_SECONDS
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        boxes = engine(bgr, use_det=True, use_cls=False, use_rec=False).boxes
        lines: list[str] = []
        for box in () if boxes is None else boxes[:MAX_LINES]:
            if time.monotonic() > deadline:
                break
            line = get_rotate_crop_image(bgr, np.asarray(box, np.float32))
            height, width = line.shape[:2]
            if min(height, width) > 0 and max(height, width) <= MAX_ASPECT * min(height, width):
                result = engine(line, use_det=False, use_cls=True, use_rec=True)
                pairs = zip(result.txts or (), result.scores or (), strict=True)
                lines.extend(text for text, confidence in pairs if confidence >= MIN_CONFIDENCE)
        return "\n".join(lines)

    return recognize_text


def _find_ocr_weights() -> dict[str, str]:
    """Return the paths of rapidocr's weight files. Without explicit paths, rapidocr would download missing files."""
    spec = find_spec("rapidocr")
    assert spec is not None and spec.origin is not None
    folder, weights = Path(spec.origin).parent / "models", {}
    for part in ("det", "cls", "rec"):
        files = sorted(folder.glob(f"*_{part}_*.onnx"))
        if not files:
            raise ImportError(f"{folder} does not contain PP-OCR weights. Run {format_install_command('ocr')}")
        weights[part.capitalize()] = str(files[-1])
    return weights


def prepare_image_for_ocr(image: Tensor) -> np.ndarray:
    """Shrink an image of shape (3, H, W) to at most MAX_SIDE pixels per side, and convert it to shape (h, w, 3)."""
    return shrink_image(image, MAX_SIDE).permute(1, 2, 0).contiguous().numpy()


def recognize_text_in_images(
    sources: Sequence[str], backend: IndexBackend, recognize: RecognizeText, log: SkipLog, workers: int | None = None
) -> int:
    """Recognise the text in those images of the sources that have no OCR result. Return the number of new results.

    Images whose text recognition fails are recorded in the log. The next call tries these images again.
    """
    contents = backend.find_contents_without_text(sources)
    stored = 0
    with ProgressBar(total=len(contents), desc="ocr", unit="image", disable=not contents) as bar:
        for texts, errors, count in _iterate_recognized_texts([image.ref for _, image in contents], recognize, workers):
            backend.save_recognized_texts({contents[index][0]: text for index, text in texts.items()})
            for index, reason in errors.items():
                log.record_dropped(contents[index][1].name, 0, "text not recognised", reason)
            stored += len(texts)
            bar.update(count)
    return stored


def _iterate_recognized_texts(
    refs: Sequence[Any], recognize: RecognizeText, workers: int | None
) -> Iterator[tuple[dict[int, str], dict[int, str], int]]:
    """Yield the texts and error messages of each batch, keyed by image index, and the number of images in the batch."""
    for indices, images, errors in iter_image_batches(refs, prepare_image_for_ocr, BATCH_SIZE, workers):
        texts: dict[int, str] = {}
        for index, image in zip(indices, images, strict=True):
            try:
                texts[index] = recognize(np.asarray(image))[:MAX_TEXT_LENGTH]
            except Exception as error:  # a failure of one image must not stop the run
                errors[index] = describe_error(error)
        yield texts, errors, len(texts) + len(errors)

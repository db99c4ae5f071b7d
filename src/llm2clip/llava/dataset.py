"""Training data for LLaVA models: patch features of the frozen vision tower, dataset, collator and sampler.

During training, the vision tower is replaced by a `PrecomputedVisionTower`, which returns patch features from a store,
or patch features that were computed just before the forward pass.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2.functional import resize

from llm2clip.data.images import decode_or_return_error
from llm2clip.data.transforms import EvalTransform, PreprocessConfig
from llm2clip.llava.conversations import IGNORE_INDEX, IMAGE_TOKEN, Conversation, tokenize_and_label
from llm2clip.models.loading import hash_weights, select_output_entries
from llm2clip.store.layout import make_image_keys
from llm2clip.store.store import EmbeddingStore

log = logging.getLogger(__name__)

MAX_SCALE = 8  # longer sides are limited to `MAX_SCALE` times the input size before padding
MEGABATCH = 50  # number of batches per group in `LengthGroupedSampler`, as in LLaVA
MIN_TEXT_TOKENS = 64  # `max_length` must leave at least this many tokens for text
MAX_REPLACEMENTS = 1000  # maximum number of consecutive unusable conversations


class LlavaTransform:
    """Image transform that is equivalent to the image processor of a LLaVA model."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor.image_processor
        settings = self.processor.to_dict()
        self.preprocess = replace(PreprocessConfig.from_dict(settings), crop_rounding="down")  # as in transformers
        self.transform = EvalTransform(self.preprocess)
        self.mean = torch.tensor(self.preprocess.mean).view(3, 1, 1)
        self.std = torch.tensor(self.preprocess.std).view(3, 1, 1)
        self.pad = bool(settings.get("do_pad"))

    def __call__(self, image: Tensor) -> Tensor:
        """Convert a uint8 image of shape (3, H, W) to normalised float32 pixels of shape (3, S, S)."""
        if self.pad:
            max_side = MAX_SCALE * self.preprocess.resize_size
            longer_side = max(image.shape[-2:])
            if longer_side > max_side:  # padding a very long image to a square would exhaust the memory
                shape = [max(1, round(side * max_side / longer_side)) for side in image.shape[-2:]]
                image = resize(image, shape, antialias=True)
            colour = tuple(int(255 * value) for value in self.preprocess.mean)
            image = self.processor.pad_to_square(image, background_color=colour)
        pixels: Tensor = self.transform(image)
        return (pixels.float() / 255 - self.mean) / self.std


def get_patch_feature_size(config: Any) -> int:
    layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    size: int = config.vision_config.hidden_size * layers
    return size


class PatchFeatureEncoder:
    """Encoder that runs the vision tower of a LLaVA model and returns the input of the projector.

    It implements the `ImageEncoder` protocol from `store/encode.py`.
    """

    def __init__(self, model: Any, processor: Any, bf16: bool = False) -> None:
        """If `bf16` is True, run the vision tower with bfloat16 autocast. The tower stays on its device."""
        self.tower = model.model.vision_tower.eval()
        self.config = model.config
        self.transform = LlavaTransform(processor)
        self.bf16 = bf16
        size = self.transform.preprocess.size
        self.num_tokens, feature_size = self(torch.zeros(1, 3, size, size)).shape[1:]
        self.embed_dim = self.num_tokens * feature_size

    @property
    def device(self) -> torch.device:
        return next(self.tower.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Map pixels of shape (N, 3, S, S) to patch features of shape (N, tokens, feature size)."""
        pixels = pixels.to(self.device, self.tower.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.config.model_type == "fast_vlm":
                feature_map: Tensor = self.tower(pixels).last_hidden_state  # (N, channels, rows, columns)
                return feature_map.flatten(2).transpose(1, 2)
            hidden_states = self.tower(pixels, output_hidden_states=True).hidden_states
            layers = self.config.vision_feature_layer
            selected = [hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            if self.config.vision_feature_select_strategy == "default":
                selected = [state[:, 1:] for state in selected]  # remove the class token
            return torch.cat(selected, -1)

    def identity(self) -> dict[str, Any]:
        """Return all settings that affect the features, and a hash of the weights, for the fingerprint of a store."""
        return {
            "tower": select_output_entries(self.tower.config),
            "weights": hash_weights(self.tower),
            "preprocess": {**self.transform.preprocess.to_dict(), "pad": self.transform.pad},
            "layer": self.config.vision_feature_layer,
            "patches": self.num_tokens,
            "low": self.bf16,
        }

    def encode_images(self, images: list[Any]) -> Tensor:
        """Encode preprocessed images as a float32 tensor of shape (N, tokens * feature size) on the CPU."""
        return self(torch.stack(images)).float().flatten(1).cpu()


class PrecomputedVisionTower(nn.Module):
    """Replacement for a vision tower that returns precomputed patch features.

    Model inputs must select the last layer and all tokens, as in `LlavaCollator`. If `feature_maps` is True, features
    are returned channels-first, as FastVLM requires.
    """

    def __init__(self, feature_maps: bool) -> None:
        super().__init__()
        self.feature_maps = feature_maps

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Return patch features of shape (N, tokens, feature size) as the output of a vision tower."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        last: Any = pixel_values.transpose(1, 2) if self.feature_maps else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=(pixel_values,))


class ConversationDataset(Dataset):
    """Dataset of tokenized and labelled conversations. Images are pixels or cached patch features."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Any,
        num_image_tokens: int,
        max_length: int,
        store: EmbeddingStore | None = None,
    ) -> None:
        """
        Args:
            num_image_tokens: Number of tokens per image.
            max_length: Maximum number of tokens. Longer conversations are truncated.
            store: Cached patch features of all images. If None, the images are decoded.
        """
        minimum = num_image_tokens + MIN_TEXT_TOKENS
        if max_length < minimum:
            raise ValueError(
                f"--llava.max_length must be at least {minimum} (got {max_length}), "
                f"because an image has {num_image_tokens} tokens"
            )
        self.conversations = list(conversations)
        self.tokenizer = processor.tokenizer
        self.transform = LlavaTransform(processor)
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self.store = store
        self.store_rows: dict[int, int] = {}  # row of an image in the store, keyed by conversation index
        if store is not None:
            images = {n: each.image for n, each in enumerate(self.conversations) if each.image is not None}
            self.store_rows = dict(zip(images, store.find_keys(make_image_keys(images.values())).tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.conversations)

    def estimate_token_counts(self) -> list[int]:
        """Estimate token counts from the number of characters in each conversation, because tokenization is slow."""
        lengths = []
        for conversation in self.conversations:
            characters = sum(len(question) + len(answer) for question, answer in conversation.turns)
            tokens = characters // 4 + 8 * len(conversation.turns)
            tokens += self.num_image_tokens if conversation.image else 0
            lengths.append(min(self.max_length, tokens))
        return lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a dict with `ids`, `labels` and, if there is an image, `vision` (pixels or patch features).

        If the conversation is unusable, log a warning and return the next usable conversation.
        """
        for offset in range(min(MAX_REPLACEMENTS, len(self))):
            item = self._load_conversation(index=(index + offset) % len(self))
            if isinstance(item, dict):
                return item
            log.warning("%s; the next conversation is used instead", item)
        raise ValueError(f"{item}, and all of the following conversations are also unusable")

    def _load_conversation(self, index: int) -> dict[str, Any] | str:
        conversation = self.conversations[index]
        try:
            ids, labels = tokenize_and_label(conversation, self.tokenizer, self.num_image_tokens)
        except (TypeError, ValueError) as error:
            return f"conversation {conversation.id} cannot be tokenized ({error})"
        item: dict[str, Any] = {"ids": ids[: self.max_length], "labels": labels[: self.max_length]}
        if all(label == IGNORE_INDEX for label in item["labels"]):
            return f"conversation {conversation.id} has no answer in its first {self.max_length} tokens"
        if conversation.image is None:
            return item
        if self.store is not None:
            features = self.store.take([self.store_rows[index]])[0]
            return item | {"vision": torch.from_numpy(features).view(self.num_image_tokens, -1)}
        pixels = decode_or_return_error(conversation.image, self.transform)
        if isinstance(pixels, str):
            return f"{conversation.image} cannot be decoded ({pixels})"
        return item | {"vision": pixels}


class LlavaCollator:
    """Collator that right-pads conversations to the length of the longest conversation in the batch."""

    def __init__(self, tokenizer: Any, num_image_tokens: int, empty_image: Tensor) -> None:
        """`empty_image` contains pixels or patch features of a blank image for batches without images."""
        self.pad_id: int = tokenizer.pad_token_id
        self.image_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = num_image_tokens
        self.empty_image = empty_image

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the model inputs for a batch.

        For B conversations padded to T tokens, `input_ids` and `attention_mask` are int64 tensors of shape (B, T), and
        `labels` has shape (B, K), where K is `logits_to_keep`. Logits are computed only for the last K tokens, starting
        at the token before the first answer in the batch, because the loss ignores all earlier tokens. `pixel_values`
        contains the pixels or patch features of all images.

        DDP and FSDP require that the projector receives gradients in every batch on every rank. If no conversation in
        the batch has an image, a blank image is therefore appended to the first conversation. Due to causal attention,
        the blank image does not affect the text.
        """
        rows = [torch.tensor(item["ids"]) for item in items]
        row_labels = [torch.tensor(item["labels"]) for item in items]
        vision = [item["vision"] for item in items if "vision" in item]
        if not vision:
            rows[0] = F.pad(rows[0], (0, self.num_image_tokens), value=self.image_id)
            row_labels[0] = F.pad(row_labels[0], (0, self.num_image_tokens), value=IGNORE_INDEX)
            vision = [self.empty_image]
        labels = pad_sequence(row_labels, batch_first=True, padding_value=IGNORE_INDEX)
        first_answer = int((labels != IGNORE_INDEX).any(0).nonzero()[0])
        start = max(0, first_answer - 1)
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad_id),
            "labels": labels[:, start:],
            "logits_to_keep": labels.shape[1] - start,
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "pixel_values": torch.stack(vision),
            # `PrecomputedVisionTower` returns a single layer, with only the selected tokens.
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }


class LengthGroupedSampler(Sampler):
    """Sampler that batches conversations of similar length.

    Indices are shuffled and divided into groups of about 50 batches. Each group is sorted by length and split into
    batches. Finally, the batches are shuffled. The order depends only on the seed and the epoch, so it is the same on
    all ranks and after a run is resumed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        batched = len(order) // self.batch_size * self.batch_size
        rows, remainder = order[:batched].reshape(-1, self.batch_size), order[batched:]
        batches: list[np.ndarray] = []
        for megabatch in np.array_split(rows, max(1, math.ceil(len(rows) / MEGABATCH))):
            indices = megabatch.reshape(-1)
            longest_first = indices[np.argsort(-self.lengths[indices], kind="stable")]
            batches += list(longest_first.reshape(-1, self.batch_size))
        for n in rng.permutation(len(batches)):
            yield from map(int, batches[n])
        yield from map(int, remainder)  # last, incomplete batch

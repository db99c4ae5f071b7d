"""The model: a vision tower and a caption encoder that answer in one space."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llm2clip.config import AlignConfig
from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.data.images import EvalTransform, load_image
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.convert.checkpoint_io import read_safetensors
from llm2clip.models.export.model_card import render_model_card
from llm2clip.models.fingerprint import fingerprint
from llm2clip.models.heads import Adapter
from llm2clip.models.vision_tower import VisionTower

MAX_LOGIT_SCALE = 100.0
_NAMES_IN_0_1 = {"text_width": "text_dim", "width": "embed_dim"}


@dataclass
class LLM2CLIPConfig:
    """All that is needed to build the model without its weights.

    Args:
        tower: the vision tower's own config (`VisionTower.config`).
        text_dim: width of the caption encoder's vectors.
        embed_dim: of the shared space.
        adapter_depth: as in `Adapter`.
        adapter_expansion: as in `Adapter`, and of gated layers.
        normalize_input: as in `Adapter`.
        projection_bias: a linear projection adds one.
        logit_bias: there is a bias on the logits, as the sigmoid loss wants.
        encoder: identity of the caption encoder whose embeddings the adapter was trained on.
    """

    tower: dict[str, Any]
    text_dim: int
    embed_dim: int = 1280
    adapter_depth: int = 4
    adapter_expansion: int = 2
    normalize_input: bool = True
    projection_bias: bool = False
    logit_bias: bool = False
    encoder: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls, recipe: AlignConfig, tower: dict[str, Any], text_width: int, encoder: dict[str, Any] | None = None
    ) -> LLM2CLIPConfig:
        """What align trains by a recipe, on a tower and an encoder's vectors; arguments as above."""
        return cls(
            tower=tower,
            text_dim=text_width,
            embed_dim=recipe.embed_dim,
            adapter_depth=recipe.adapter_depth,
            normalize_input=recipe.normalize_input,
            logit_bias=recipe.loss == "sigmoid",
            encoder=encoder or {},
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LLM2CLIPConfig:
        """Read the content of a model folder's config.json, written by this version or by 0.1."""
        values = {_NAMES_IN_0_1.get(name, name): value for name, value in values.items()}
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


class LLM2CLIP(nn.Module):
    """Vision tower + projection on one side, (caption encoder +) adapter on the other.

    The caption encoder is frozen and stays outside the module's parameters: training reads its embeddings from a
    store, `encode_text` runs it.
    """

    def __init__(self, config: LLM2CLIPConfig, tower: VisionTower, encoder: CaptionEncoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.tower = tower
        self.projection = _projection(config, tower.feature_dim)
        self.adapter = _adapter(config)
        # Of one number and not of none, so that it can be shared out over processes.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10 if config.logit_bias else 1 / 0.07)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0])) if config.logit_bias else None
        self._encoder = [encoder] if encoder is not None else []  # in a list, so that its weights are not ours
        self._text_folder: Path | None = None

    def forward(
        self, pixels: Tensor | None = None, embeddings: Tensor | None = None, features: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Either side or both.

        Args:
            pixels: (N, 3, S, S) uint8.
            embeddings: (M, text_width) floats of the caption encoder.
            features: (N, tower.feature_dim) floats, what the tower gave for some pixels, in their place.

        Returns:
            Image vectors (N, width) and text vectors (M, width), L2-normalised float32, None for a side that was not
            given; the factor on their cosines, at most 100, and the bias of their logits, float32 scalars.
        """
        if pixels is not None:
            features = self.tower(pixels)
        image = F.normalize(self.projection(features).float(), dim=-1) if features is not None else None
        text = F.normalize(self.adapter(embeddings).float(), dim=-1) if embeddings is not None else None
        scale = self.logit_scale.float().exp().clamp(max=MAX_LOGIT_SCALE)[0]
        return image, text, scale, scale.new_zeros(()) if self.logit_bias is None else self.logit_bias.float()[0]

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the logit scale's parameter where its gradient lives; call after every optimizer step."""
        self.logit_scale.clamp_(
            max=math.log(MAX_LOGIT_SCALE) - 1e-6
        )  # at the limit itself there is no gradient to leave it

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def encoder(self) -> CaptionEncoder:
        """The caption encoder, opened at first use.

        Raises:
            ValueError: the model has none, or one whose width is not the adapter's.
        """
        if not self._encoder:
            if self._text_folder is None:
                raise ValueError(
                    "this model has no caption encoder: add the one it was trained with, by set_encoder(...) or by "
                    "llm2clip convert MODEL --text ENCODER --out MODEL"
                )
            encoder = CaptionEncoder.from_pretrained(self._text_folder, device=self.device)
            if encoder.embed_dim != self.config.text_dim:
                raise ValueError(
                    f"{self._text_folder} gives vectors of width {encoder.embed_dim}, "
                    f"the adapter takes {self.config.text_dim}: they are not a pair"
                )
            self._encoder.append(encoder)
        return self._encoder[0]

    @property
    def has_encoder(self) -> bool:
        return bool(self._encoder) or self._text_folder is not None

    def set_encoder(self, encoder: CaptionEncoder) -> None:
        """Take a caption encoder for the one that the adapter was trained with.

        Raises:
            ValueError: it is not that one, where the model knows which it was, or its width is not the adapter's.
        """
        if encoder.embed_dim != self.config.text_dim:
            raise ValueError(
                f"the encoder gives vectors of width {encoder.embed_dim}, the adapter takes {self.config.text_dim}: "
                "they are not a pair"
            )
        there, now = self.config.encoder, encoder.identity()
        apart = ("precision", "config")  # the one is chosen anew, the other grows with each release of transformers
        if differs := [name for name in now if name in there and name not in apart and there[name] != now[name]]:
            raise ValueError(
                f"the adapter was trained on another caption encoder: it differs in {', '.join(differs)}; open the one "
                "that was used, with the same settings"
            )
        self._encoder[:] = [encoder]
        self.config.encoder = {**now, **there}

    @torch.no_grad()  # and not inference_mode, whose tensors no probe could be trained on
    @onednn_matmul()
    def encode_image(self, images: Any, batch: int = 64) -> Tensor:
        """Pictures to vectors: (N, width) float32, L2-normalised, on the CPU.

        Args:
            images: one or a list of paths, encoded bytes, PIL images, or uint8 tensors (3, H, W).
            batch: pictures in a forward pass.

        Raises:
            ImageError: a picture cannot be read; the message names it.
        """
        items = list(images) if isinstance(images, list | tuple) else [images]
        transform = EvalTransform(self.tower.preprocess)
        self.eval()
        parts = [torch.empty(0, self.config.embed_dim)]
        for start in range(0, len(items), batch):
            pixels = torch.stack([transform(load_image(i)) for i in items[start : start + batch]])
            vectors, *_ = self(pixels=pixels.to(self.device))
            parts.append(vectors.cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str], progress: bool = False, precision: str = "fp32") -> Tensor:
        """Texts to vectors: (N, width) float32, L2-normalised, on the CPU.

        Args:
            texts: one or some.
            progress: show a bar.
            precision: of the caption encoder, as in `CaptionEncoder.encode`.
        """
        captions = [texts] if isinstance(texts, str) else list(texts)
        return self.project_text_embeddings(self.encoder.encode(captions, progress=progress, precision=precision))

    @torch.no_grad()
    def project_text_embeddings(self, embeddings: Tensor) -> Tensor:
        """Cached embeddings (N, text_width) to text vectors (N, width) float32, L2-normalised, on the CPU."""
        self.eval()
        _, text, *_ = self(embeddings=embeddings.to(self.device))
        assert text is not None
        return text.cpu()

    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Cosines of vectors: (texts, images) float32."""
        return texts @ images.T

    def save_pretrained(
        self,
        folder: str | Path,
        text_folder: str | Path | None = None,
        encoder: CaptionEncoder | None = None,
    ) -> Path:
        """Write the model folder: whole, or not at all.

        Args:
            folder: where; replaced if it is a model folder already.
            text_folder: a saved caption encoder to copy, or
            encoder: one to save; neither saves the one in the model, if it has one.
        """
        folder = Path(folder)
        if folder.exists() and not is_model_folder(folder):
            raise FileExistsError(f"{folder} is there and is not a model folder; choose another place")
        tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        config = {"model_type": "llm2clip", **dataclasses.asdict(self.config)}
        config["encoder_fingerprint"] = fingerprint(self.config.encoder)  # for who compares folders by eye
        (tmp / "config.json").write_text(json.dumps(config, indent=1))
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, tmp / "model.safetensors")
        (tmp / "preprocessor_config.json").write_text(json.dumps(self.tower.preprocess.to_dict(), indent=1))
        if text_folder is not None:
            shutil.copytree(text_folder, tmp / "text")
        elif encoder is None and not self._encoder and self._text_folder is not None:
            shutil.copytree(self._text_folder, tmp / "text")  # not opened, and not to be changed
        elif encoder is not None or self.has_encoder:
            (encoder or self.encoder).save_pretrained(tmp / "text")
        (tmp / "README.md").write_text(render_model_card(tmp, folder.name))
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(tmp, folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> LLM2CLIP:
        """Open a model folder, or a hub id of one. Reads safetensors only and runs no code from the folder.

        Raises:
            FileNotFoundError: there is no model folder of that name.
            ValueError: the folder's config.json is not an llm2clip model's.
        """
        folder = Path(path)
        if not folder.is_dir():
            folder = _download(str(path))
        file = folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
        raw = json.loads(file.read_text())
        if raw.get("model_type") != "llm2clip":
            raise ValueError(f"{file}: model_type is {raw.get('model_type')!r}, not 'llm2clip'")
        config = LLM2CLIPConfig.from_dict(raw)
        model = cls(config, VisionTower.from_config(config.tower))
        try:
            model.load_state_dict(read_safetensors(folder / "model.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"{folder}: config.json and model.safetensors are not of one model ({error})") from error
        model._text_folder = folder / "text" if (folder / "text").is_dir() else None
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def is_model_folder(path: str | Path) -> bool:
    """Whether a folder is one that `save_pretrained` wrote."""
    try:
        return bool(json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["model_type"] == "llm2clip")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _projection(config: LLM2CLIPConfig, feature_dim: int) -> nn.Linear:
    linear = nn.Linear(feature_dim, config.embed_dim, bias=config.projection_bias)
    nn.init.normal_(linear.weight, std=feature_dim**-0.5)
    return linear


def _adapter(config: LLM2CLIPConfig) -> Adapter:
    return Adapter(
        config.text_dim, config.embed_dim, config.adapter_depth, config.adapter_expansion, config.normalize_input
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name} is neither a folder here nor a model on the hub ({error})") from error

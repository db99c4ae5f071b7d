"""LLM2CLIP model (arXiv 2411.04997) for transformers.

    from transformers import AutoModel, AutoProcessor
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    texts = model.get_text_features(**processor(text=["a long description ..."], padding=True, return_tensors="pt"))
    images = model.get_image_features(**processor(images=[image], return_tensors="pt"))
    scores = texts.pooler_output @ images.pooler_output.T

Requires torch, torchvision, transformers >= 5.2 and, for timm vision towers, timm.

`llm2clip export` copies this file into the exported folder, so it must not import llm2clip.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoConfig, AutoModel, CLIPImageProcessor, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils.versions import require_version

require_version("transformers>=5.2", "Earlier versions ignore `is_causal` and return wrong embeddings.")


class LLM2CLIPExportConfig(PretrainedConfig):
    """Architecture of an exported model.

    Args:
        tower: Config of the vision tower. The keys are `library` ("timm" or "transformers"), `architecture`, `args`
            (arguments for `timm.create_model`), `feature_dim`, `image_size` and `interpolate_pos_encoding` (True if a
            transformers tower must interpolate its position embeddings).
        text: Config of the LLM.
        text_dim, embed_dim: Input and output dimensions of the adapter.
        adapter: Other arguments of `Adapter`.
        pooling: Pooling mode of the LLM: "mean", "lasttoken" or "cls".
        dense: (input size, output size, has bias) of each linear layer between pooling and adapter.
        prompt_tokens: Number of tokens at the start of each text that are excluded from mean pooling.
    """

    model_type = "llm2clip_export"
    tower: Any = None  # Any, because the default is None
    text: Any = None
    text_dim: int = 0
    embed_dim: int = 0
    adapter: Any = None
    projection: bool = True
    projection_bias: bool = False
    pooling: str = "mean"
    dense: Any = ()
    prompt_tokens: int = 0
    logit_bias: bool = False


class LLM2CLIPImageProcessor(CLIPImageProcessor):
    """Image processor for timm towers. It rounds the centre crop's position as timm does, unlike transformers."""

    def center_crop(self, image: Any, size: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Crop the centre of an image of shape (..., H, W) to shape (..., size.height, size.width)."""
        return tvF.center_crop(image, [size.height, size.width])


class LLM2CLIPExport(PreTrainedModel):
    """Image encoder (vision tower and projection) and text encoder (LLM and adapter) with a shared embedding space."""

    config_class = LLM2CLIPExportConfig
    base_model_prefix = "llm2clip"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: LLM2CLIPExportConfig) -> None:
        super().__init__(config)
        self.vision = _build_tower(config.tower)
        self.llm = AutoModel.from_config(AutoConfig.for_model(**config.text))
        self.projection: nn.Module = nn.Identity()
        if config.projection:
            self.projection = nn.Linear(config.tower["feature_dim"], config.embed_dim, bias=config.projection_bias)
        self.dense = nn.Sequential(*(nn.Linear(size, out, bias=bias) for size, out, bias in config.dense))
        self.adapter = Adapter(config.text_dim, config.embed_dim, **config.adapter)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if config.logit_bias else None
        self.post_init()

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode token ids (N, T). `pooler_output` contains L2-normalised float32 embeddings (N, embed_dim)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.llm(input_ids=input_ids, attention_mask=mask).last_hidden_state
        pooled = pool_tokens(hidden, mask, self.config.pooling, self.config.prompt_tokens)
        text = F.normalize(self.adapter(self.dense(pooled)).float(), dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=text)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode pixels (N, 3, S, S). `pooler_output` contains L2-normalised float32 embeddings (N, embed_dim)."""
        tower = self.config.tower
        if tower["library"] == "timm":
            feature = self.vision(pixel_values)
        else:
            options = {"interpolate_pos_encoding": True} if tower["interpolate_pos_encoding"] else {}
            feature = self.vision(pixel_values=pixel_values, **options).pooler_output
        return BaseModelOutputWithPooling(pooler_output=F.normalize(self.projection(feature).float(), dim=-1))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CLIPOutput:
        """Encode texts, images or both. For both, also return the logits: scale * cosine similarity + bias."""
        text = image = logits = None
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask).pooler_output
        if pixel_values is not None:
            image = self.get_image_features(pixel_values).pooler_output
        if text is not None and image is not None:
            logits = text @ image.T * self.logit_scale.exp()
            if self.logit_bias is not None:
                logits = logits + self.logit_bias
        return CLIPOutput(
            text_embeds=text,
            image_embeds=image,
            logits_per_text=logits,
            logits_per_image=None if logits is None else logits.T,
        )


class Adapter(nn.Module):
    """Text adapter: L2-normalise (optional) -> `depth` residual blocks -> LayerNorm -> Linear. Depth 0: the identity.

    The adapter follows the LLM2CLIP paper (section 3.3), which uses depth 4 and expansion 2. With 4096 input and 1280
    output dimensions, it has 273.8 M parameters. In the checkpoints released with the paper, adapters trained on cached
    embeddings L2-normalise their input, whereas adapters trained with the LLM in the training loop do not.
    """

    def __init__(
        self, text_dim: int, embed_dim: int, depth: int = 4, expansion: int = 2, normalize_input: bool = True
    ) -> None:
        super().__init__()
        self.depth, self.normalize_input = depth, normalize_input
        if depth == 0:
            if text_dim != embed_dim:
                raise ValueError(f"without an adapter, embed_dim must be {text_dim} like text_dim (got {embed_dim})")
            return
        self.blocks = nn.Sequential(*(ResidualBlock(text_dim, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(text_dim)
        self.out = nn.Linear(text_dim, embed_dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map caption embeddings of shape (N, text_dim) to unnormalised text embeddings of shape (N, embed_dim)."""
        if self.depth == 0:
            return embeddings
        x = F.normalize(embeddings, dim=-1) if self.normalize_input else embeddings
        return self.out(self.norm(self.blocks(x)))


class ResidualBlock(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))), with a hidden layer of `expansion * dim` units."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def pool_tokens(hidden: Tensor, mask: Tensor, pooling: str, prompt_tokens: int) -> Tensor:
    """Pool hidden states (N, T, D) with an int64 mask (N, T) to shape (N, D). Padding may be on either side."""
    position = mask.cumsum(1)  # 1-based position of each token, excluding padding
    if pooling == "mean":
        selected = mask * (position > prompt_tokens)
    elif pooling == "lasttoken":
        selected = mask * (position == position[:, -1:])
    else:
        selected = mask * (position == 1)
    weights = selected.unsqueeze(-1).to(hidden.dtype)  # (N, T, 1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def _build_tower(config: dict[str, Any]) -> nn.Module:
    if config["library"] == "timm":
        import timm

        return timm.create_model(config["architecture"], pretrained=False, **config["args"])
    return AutoModel.from_config(AutoConfig.for_model(**config["architecture"]))

"""Dense image features: one embedding per image patch, in the embedding space shared by images and texts.

A cell is a patch of a vision transformer or a position in a convolutional network's last feature map. The embedding of
a cell is computed by applying the tower's head and the image projection to the cell alone. The embedding of a region (a
box or a mask) is an average over the region's cells.

CLIP is trained only to match complete images with texts, and the last block mixes all patches, so the output of a patch
need not describe the patch. The training-free variants change only the last block. In the formulas, x is the block's
input. q, k and v are the queries, keys and values of norm1(x), including their norms and rotary embeddings, if any. s
is the scale 1 / sqrt(head dimension). W is the attention's output projection, including any layer scale. FFN includes
the norm before the feed-forward network.

plain      y = x + W(softmax(s q k^T) v); y + FFN(y), as trained.
maskclip   y = x + W(v); y + FFN(y). arXiv 2112.01071, https://github.com/chongzhou96/MaskCLIP
sclip      y = x + W((softmax(s q q^T) + softmax(s k k^T)) v); y + FFN(y). arXiv 2312.01597,
           https://github.com/wangf3014/SCLIP
clearclip  W(softmax(s q q^T) v). arXiv 2407.12442, https://github.com/mc-lan/ClearCLIP
naclip     W(softmax(s k k^T + g) v), where g = exp(-d^2 / 50) for two patches at a distance of d patches, and g = 0 for
           class and register tokens. arXiv 2404.08181, https://github.com/sinahmr/NACLIP
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.ops import roi_align
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.models.precision import FP32, Precision
from llm2clip.models.vision.vision_tower import VisionTower

DENSE_VARIANTS = ("plain", "maskclip", "sclip", "clearclip", "naclip")
_NO_RESIDUAL = ("clearclip", "naclip")  # variants without the residual connections and the feed-forward network
_GAUSSIAN_STD = 5.0  # standard deviation in NACLIP's attention bias, in patches
# Ratio of the resized image's shorter side to the tower's training resolution, for localisation.
# As in SCLIP, the shorter side of images for a 224-pixel tower is 336 pixels.
LOCALIZATION_SCALE = 1.5
_MAX_ASPECT_RATIO = 8  # images with a larger aspect ratio are squeezed to limit their size
_DINO_PARTS = ("norm1", "attention", "layer_scale1")
# Supported classes of pre-norm blocks -> attribute names of the norm, attention and layer scale.
_BLOCK_PARTS = {
    "timm.models.vision_transformer.Block": ("norm1", "attn", "ls1"),
    "timm.models.eva.EvaBlock": ("norm1", "attn", "gamma_1"),
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer": ("layer_norm1", "self_attn", ""),
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer": ("layer_norm1", "self_attn", ""),
    "transformers.models.dinov2.modeling_dinov2.Dinov2Layer": _DINO_PARTS,
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": _DINO_PARTS,
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": _DINO_PARTS,
}


@dataclass
class DenseEncoder:
    """Image encoder that returns one embedding per cell in the shared embedding space.

    Attributes:
        cell_size: Side length of a cell in pixels: the patch size, or a convolutional network's total stride.
        image_size: The tower's training resolution, in pixels.
        variants: Supported variants. Convolutional networks support only "plain".
        localization_variant: Recommended variant for localisation. Towers that pool patches use "plain". Towers that
            pool a class token use "naclip", because training did not match their patches with texts.
        features: Function that takes pixels of shape (N, 3, H, W) on `device` and a variant, and returns unnormalised
            embeddings of shape (N, H / cell_size, W / cell_size, D).
    """

    cell_size: int
    image_size: int
    variants: tuple[str, ...]
    device: torch.device
    interpolation: str
    localization_variant: str
    features: Callable[[Tensor, str], Tensor]

    @property
    def localization_image_size(self) -> int:
        """Recommended `image_size` argument of `resize` for localisation, in pixels."""
        return round(LOCALIZATION_SCALE * self.image_size)

    @torch.no_grad()
    @use_onednn_matmul()
    def encode(self, pixels: Tensor, variant: str = "plain") -> Tensor:
        """Encode the cells of N images of shape (N, 3, H, W), uint8 or float from 0 to 1, on any device.

        H and W must be multiples of `cell_size`. Return L2-normalised float32 embeddings of shape (N, H / cell_size,
        W / cell_size, D) on `device`. The variants are defined at the top of `models/vision/dense.py`.
        """
        if variant not in self.variants:
            raise ValueError(
                f"the vision tower does not support the dense variant {variant!r}: use "
                f"{' or '.join(repr(name) for name in self.variants)}"
            )
        height, width = pixels.shape[-2:]
        if pixels.ndim != 4 or not height or not width or height % self.cell_size or width % self.cell_size:
            raise ValueError(
                f"pixels must have shape (N, 3, H, W), where H and W are multiples of {self.cell_size} (got "
                f"{tuple(pixels.shape)}). Resize the images with DenseEncoder.resize"
            )
        return F.normalize(self.features(pixels.to(self.device), variant).float(), dim=-1)

    def resize(self, image: Tensor, image_size: int | None = None) -> Tensor:
        """Resize an image of shape (3, H, W), uint8, so that both sides are multiples of `cell_size`.

        The aspect ratio is kept, except for rounding and a limit of 8:1. `image_size` is the length of the shorter side
        in pixels, rounded to a multiple of `cell_size`. Default: the tower's training resolution.
        """
        height, width = image.shape[-2:]
        shorter = max(1, round((image_size or self.image_size) / self.cell_size))  # in cells
        ratio = min(max(height, width) / min(height, width), _MAX_ASPECT_RATIO)
        longer = round(ratio * shorter)
        cells = (longer, shorter) if height > width else (shorter, longer)
        size = [count * self.cell_size for count in cells]
        return cast(Tensor, resize(image, size, InterpolationMode(self.interpolation), antialias=True))


def build_dense_encoder(
    tower: VisionTower, project: Callable[[Tensor], Tensor], precision: Precision = FP32
) -> DenseEncoder:
    """Build a dense encoder that shares the weights of a vision tower in eval mode and of an image projection.

    Raise ValueError if the tower's architecture has no grid of cells.
    """
    cell_size = _get_cell_size(tower)
    device = tower.mean.device

    def features(pixels: Tensor, variant: str) -> Tensor:
        with precision.autocast(device):
            cells = _encode_cells(tower, pixels, variant)  # (N, h, w, C)
            embeddings = project(_apply_tower_head(tower, cells.flatten(0, 2)))
        return embeddings.unflatten(0, cells.shape[:3])

    blocks = tower.get_blocks()
    has_variants = bool(blocks) and _get_class_path(blocks[-1]) in _BLOCK_PARTS
    return DenseEncoder(
        cell_size=cell_size,
        image_size=tower.preprocess.size,
        variants=DENSE_VARIANTS if has_variants else ("plain",),
        device=device,
        interpolation=tower.preprocess.interpolation,
        localization_variant="naclip" if has_variants and _has_class_token_pooling(tower) else "plain",
        features=features,
    )


def compute_feature_map(tower: VisionTower, pixels: Tensor) -> Tensor:
    """Compute the feature map before the tower's head, for example as input to a detector.

    `pixels` has shape (N, 3, H, W), uint8 or float from 0 to 1. The feature map has shape (N, C, H / cell size, W /
    cell size). Gradients flow to all tower weights except interpolated position embeddings. Raise ValueError if the
    tower's architecture has no grid of cells.
    """
    return _encode_cells(tower, pixels, "plain").permute(0, 3, 1, 2)


def _get_cell_size(tower: VisionTower) -> int:
    if tower.config["library"] == "transformers":
        return int(tower.config["architecture"]["patch_size"])
    backbone = cast(Any, tower.backbone)
    try:
        return int(backbone.feature_info[-1]["reduction"])
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError(
            f"{tower.config['architecture']} does not support dense features: timm does not specify the stride"
        ) from None


def _has_class_token_pooling(tower: VisionTower) -> bool:
    if tower.config["library"] == "transformers":
        return not hasattr(tower.backbone, "head")  # SigLIP's head pools all patches
    return getattr(tower.backbone, "global_pool", "") == "token"


def _get_class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


# ---- cells ----------------------------------------------------------------------------------------------------------


def _encode_cells(tower: VisionTower, pixels: Tensor, variant: str) -> Tensor:
    """Return the features of all cells before the tower's head, of shape (N, h, w, C)."""
    cell_size = _get_cell_size(tower)
    grid = (pixels.shape[-2] // cell_size, pixels.shape[-1] // cell_size)
    if tower.config["library"] == "timm":
        tower = _copy_with_replaced_module(
            tower, "backbone", _resize_timm_backbone(tower, (pixels.shape[-2], pixels.shape[-1]))
        )
    if variant != "plain":
        block = tower.get_blocks()[-1]
        name = next(name for name, module in tower.named_modules() if module is block)
        tower = _copy_with_replaced_module(tower, name, _DenseVariantBlock(block, variant, grid))
    features = tower.forward_features(pixels)
    if features.ndim == 3:  # shape (N, L, C); the class and register tokens come first
        return features[:, -grid[0] * grid[1] :].unflatten(1, grid)
    cells = features if _is_channels_last(tower) else features.permute(0, 2, 3, 1)
    if cells.shape[1:3] != grid:
        raise ValueError(f"{tower.config['architecture']} returned {tuple(cells.shape[1:3])} cells instead of {grid}")
    return cells


def _is_channels_last(tower: VisionTower) -> bool:
    return str(getattr(tower.backbone, "output_fmt", "NCHW")) == "NHWC"


def _apply_tower_head(tower: VisionTower, cells: Tensor) -> Tensor:
    """Apply the tower's head to each of the M cells in a tensor of shape (M, C). Return a tensor of shape
    (M, feature_dim)."""
    backbone = cast(Any, tower.backbone)
    if tower.config["library"] == "transformers":
        if hasattr(backbone, "head"):  # SigLIP pools with attention
            return cast(Tensor, backbone.head(cells[:, None]))
        # In CLIP, the last norm is part of the head.
        return cast(Tensor, backbone.post_layernorm(cells) if hasattr(backbone, "post_layernorm") else cells)
    if isinstance(backbone, VisionTransformer | Eva):
        # Some heads pool the class token, and other heads pool the patch tokens.
        # If all tokens are copies of the cell, every head returns the cell's features.
        return backbone.forward_head(cells[:, None].expand(-1, 1 + backbone.num_prefix_tokens, -1))
    maps = cells[:, None, None] if _is_channels_last(tower) else cells[:, :, None, None]
    return cast(Tensor, backbone.forward_head(maps))


def _resize_timm_backbone(tower: VisionTower, size: tuple[int, int]) -> nn.Module:
    """Return a timm backbone for images of shape `size` that shares the tower's weights, except position embeddings."""
    backbone: Any = tower.backbone
    built_size = tower.config["args"].get("img_size")
    is_vit = isinstance(backbone, VisionTransformer | Eva)
    is_built_for_size = size == (tower.preprocess.size, tower.preprocess.size) or (not is_vit and built_size is None)
    if is_built_for_size or getattr(backbone, "dynamic_img_size", False):
        return tower.backbone
    if not is_vit:
        raise ValueError(
            f"{tower.config['architecture']} supports only images of {built_size} x {built_size} pixels (got "
            f"{size[0]} x {size[1]})"
        )
    patch_embed = _shallow_copy_module(backbone.patch_embed)
    patch_embed.set_input_size(size)
    resized = _shallow_copy_module(backbone)
    resized.patch_embed = patch_embed
    if backbone.pos_embed is not None:
        pos_embed = resample_abs_pos_embed(
            backbone.pos_embed,
            new_size=list(patch_embed.grid_size),
            old_size=list(backbone.patch_embed.grid_size),
            num_prefix_tokens=0 if backbone.no_embed_class else backbone.num_prefix_tokens,
        )
        resized.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
    if hasattr(getattr(backbone, "rope", None), "update_feat_shape"):
        resized.rope = _shallow_copy_module(backbone.rope)
        resized.rope.update_feat_shape(patch_embed.grid_size)
    return cast(nn.Module, resized)


def _copy_with_replaced_module(root: Any, name: str, module: nn.Module) -> Any:
    """Return a copy of `root` with `module` as the submodule `name`. Other threads can continue to use `root`."""
    first, _, rest = name.partition(".")
    root = _shallow_copy_module(root)
    root._modules[first] = _copy_with_replaced_module(root._modules[first], rest, module) if rest else module
    return root


def _shallow_copy_module(module: Any) -> Any:
    clone = copy.copy(module)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(clone, name, dict(getattr(module, name)))
    return clone


# ---- variants -------------------------------------------------------------------------------------------------------


class _DenseVariantBlock(nn.Module):
    """Last block of a vision transformer, with the attention of a dense variant."""

    def __init__(self, block: nn.Module, variant: str, grid: tuple[int, int]) -> None:
        super().__init__()
        self.block, self.variant, self.grid = block, variant, grid

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _ReplacedAttention(self.variant, self.grid) as attention:
            if self.variant in _NO_RESIDUAL:
                output = _compute_attention_branch(self.block, x, *args, **kwargs)
            else:
                output = self.block(x, *args, **kwargs)
        if attention.calls != 1:
            raise ValueError(
                f"variant {self.variant!r} requires a last block that calls scaled_dot_product_attention once (got "
                f"{attention.calls} calls in {_get_class_path(self.block)}). Use variant 'plain'"
            )
        return output


def _compute_attention_branch(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a block's attention output, without the residual connection or feed-forward network."""
    norm_name, attention_name, scale_name = _BLOCK_PARTS[_get_class_path(block)]
    output = getattr(block, attention_name)(getattr(block, norm_name)(x), *args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output  # transformers also returns the attention weights
    scale = getattr(block, scale_name) if scale_name else None
    if scale is None:
        return cast(Tensor, output)
    return cast(Tensor, scale(output) if isinstance(scale, nn.Module) else scale * output)


class _ReplacedAttention(TorchFunctionMode):
    """Context manager that makes `scaled_dot_product_attention` compute a dense variant's attention in this thread.

    timm and transformers pass the queries, keys and values of all supported models to `scaled_dot_product_attention`.
    """

    def __init__(self, variant: str, grid: tuple[int, int]) -> None:
        super().__init__()
        self.variant, self.grid = variant, grid
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._compute_attention(*args, **(kwargs or {}))

    def _compute_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, **__: Any
    ) -> Tensor:
        """Compute attention for q, k and v of shape (N, heads, L, head_dim), without a mask or dropout."""
        attend = F.scaled_dot_product_attention
        if self.variant == "maskclip":
            return v
        if self.variant == "sclip":
            return attend(q, q, v, scale=scale) + attend(k, k, v, scale=scale)
        if self.variant == "clearclip":
            return attend(q, q, v, scale=scale)
        return attend(k, k, v, attn_mask=_build_naclip_bias(self.grid, k), scale=scale)


def _build_naclip_bias(grid: tuple[int, int], k: Tensor) -> Tensor:
    """Compute NACLIP's attention bias g, of shape (L, L), with the dtype and device of the keys `k`."""
    per_axis = []
    for length in grid:
        position = torch.arange(length, device=k.device, dtype=torch.float32)
        distance = position[:, None] - position
        per_axis.append(torch.exp(-(distance**2) / (2 * _GAUSSIAN_STD**2)))
    bias = torch.kron(per_axis[0], per_axis[1])  # (h * w, h * w)
    prefix = k.shape[-2] - len(bias)  # number of class and register tokens
    return F.pad(bias, (prefix, 0, prefix, 0)).to(k.dtype)


# ---- regions -------------------------------------------------------------------------------------------------------


def encode_boxes(
    dense: DenseEncoder,
    images: Sequence[Tensor],
    boxes: Sequence[Tensor],
    variant: str,
    embed_dim: int,
    image_size: int | None = None,
) -> list[Tensor]:
    """Encode the boxes of each image. Return L2-normalised float32 embeddings of shape (R, embed_dim) per image.

    As in CLIPSelf (arXiv 2310.01403), the entire image is encoded, and the cells in each box are averaged with RoIAlign
    (arXiv 1703.06870).

    Args:
        images: Images of shape (3, H, W), uint8.
        boxes: For each image, a float32 tensor of shape (R, 4) with rows (left, top, right, bottom) in pixels.
        image_size: Length of the resized image's shorter side in pixels. Default: `dense.localization_image_size`.
    """
    resized_by_shape: dict[torch.Size, dict[int, Tensor]] = {}  # images of the same shape are encoded together
    for n, image in enumerate(images):
        if len(boxes[n]):
            resized = dense.resize(image, image_size or dense.localization_image_size)
            resized_by_shape.setdefault(resized.shape, {})[n] = resized
    results = [torch.empty(0, embed_dim) for _ in images]
    for group in resized_by_shape.values():
        features = dense.encode(torch.stack(list(group.values())), variant)  # (N, h, w, D)
        boxes_in_cells = []
        for n in group:
            height, width = images[n].shape[1:]
            cells_per_pixel = torch.tensor([features.shape[2] / width, features.shape[1] / height] * 2)
            boxes_in_cells.append((boxes[n] * cells_per_pixel).to(features.device))
        maps = features.permute(0, 3, 1, 2).contiguous()
        pooled = roi_align(maps, boxes_in_cells, output_size=1, aligned=True)[:, :, 0, 0]  # (boxes of all images, D)
        embeddings = F.normalize(pooled, dim=-1).cpu()
        for n, part in zip(group, embeddings.split([len(boxes[n]) for n in group]), strict=True):
            results[n] = part
    return results


def pool_features_by_mask(features: Tensor, masks: Tensor) -> Tensor:
    """Average an image's cell embeddings for each mask, weighted by the mask's area in each cell.

    `features` has shape (h, w, D), float32. `masks` has shape (N, H, W), boolean. Cell (i, j) covers rows i * H / h to
    (i + 1) * H / h and columns j * W / w to (j + 1) * W / w. Return L2-normalised embeddings of shape (N, D).
    """
    h, w, dim = features.shape
    rows, columns = (
        _compute_pixel_overlaps(cells, pixels).to(features)
        for cells, pixels in zip((h, w), masks.shape[1:], strict=True)
    )
    pooled = [features.new_empty(0, dim)]
    for mask in masks:  # one mask at a time, because float masks take four times as much memory as boolean masks
        areas = rows @ mask.to(features) @ columns.T  # (h, w), in pixels
        pooled.append((areas / areas.sum()).flatten()[None] @ features.flatten(0, 1))
    return F.normalize(torch.cat(pooled), dim=-1)


def _compute_pixel_overlaps(num_cells: int, num_pixels: int) -> Tensor:
    """Return each cell's overlap with each pixel along an axis in pixels, of shape (num_cells, num_pixels), float64."""
    cell_edges = torch.arange(num_cells + 1, dtype=torch.float64) * num_pixels / num_cells
    pixel_edges = torch.arange(num_pixels + 1, dtype=torch.float64)
    ends = torch.minimum(cell_edges[1:, None], pixel_edges[1:])
    starts = torch.maximum(cell_edges[:-1, None], pixel_edges[:-1])
    return (ends - starts).clamp(min=0)


def validate_boxes(boxes: Any, height: int, width: int) -> Tensor:
    """Validate N boxes (left, top, right, bottom) in pixels. Return a float32 CPU tensor of shape (N, 4)."""
    tensor = torch.as_tensor(boxes, dtype=torch.float32).cpu()
    if tensor.numel() == 0:
        return tensor.new_empty(0, 4)
    if tensor.ndim != 2 or tensor.shape[1] != 4:
        raise ValueError(f"boxes must have shape (N, 4), with columns x0, y0, x1 and y1 (got {tuple(tensor.shape)})")
    x0, y0, x1, y1 = tensor.unbind(1)
    problems = {
        "contains NaN or infinity": ~tensor.isfinite().all(1),
        "is empty: x1 must be greater than x0, and y1 must be greater than y0": (x1 <= x0) | (y1 <= y0),
        f"is not inside the image of {width} x {height} pixels: clip the boxes to the image": (
            (x0 < 0) | (y0 < 0) | (x1 > width) | (y1 > height)
        ),
    }
    for problem, is_invalid in problems.items():
        if is_invalid.any():
            n = int(is_invalid.nonzero()[0])
            raise ValueError(f"box {n}, {tuple(tensor[n].tolist())}, {problem}")
    return tensor


def validate_masks(masks: Any, height: int, width: int) -> Tensor:
    """Validate N boolean masks. Return a boolean CPU tensor of shape (N, H, W)."""
    tensor = torch.as_tensor(masks).cpu()
    if tensor.ndim != 3 or tensor.shape[1:] != (height, width):
        raise ValueError(
            f"masks must have shape (N, {height}, {width}) to match the image size (got {tuple(tensor.shape)})"
        )
    if tensor.dtype != torch.bool:
        raise ValueError(f"masks must be boolean (got {tensor.dtype})")
    is_empty = ~tensor.flatten(1).any(1)
    if is_empty.any():
        raise ValueError(f"mask {int(is_empty.nonzero()[0])} contains no pixels: remove the mask")
    return tensor

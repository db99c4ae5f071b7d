"""Feature pyramids on vision towers, as backbones for torchvision's detectors.

Both pyramids map images, float (N, 3, H, W) from 0 to 1, to feature maps (N, 256, h, w) with strides 4, 8, 16, 32 and
64. H and W must be multiples of 32, as in torchvision's detectors.
"""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from llm2clip.models.vision.dense import compute_feature_map
from llm2clip.models.vision.vision_tower import VisionTower

CHANNELS = 256  # of the feature maps
STRIDE = 16  # pixels per cell of a ViT


def build_backbone(tower: VisionTower, bf16: bool) -> nn.Module:
    """Return a backbone with a pyramid that suits the tower's architecture. With `bf16`, the tower runs in bf16."""
    stages = getattr(tower.backbone, "feature_info", [])
    has_pyramid = len({stage["reduction"] for stage in stages}) > 1  # all feature maps of a ViT have the same stride
    return CNNPyramid(tower, bf16) if has_pyramid else ViTPyramid(tower, bf16)


class ViTPyramid(nn.Module):
    """ViTDet's simple feature pyramid (arXiv 2203.16527), which is built from the last feature map.

    torchvision derives the stride of a map from its size, and assumes a power of two. For other patch sizes, images are
    therefore resized, so that each cell covers 16 x 16 pixels of the original image.
    """

    def __init__(self, tower: VisionTower, bf16: bool) -> None:
        super().__init__()
        self.tower, self.bf16, self.out_channels = tower, bf16, CHANNELS
        size = tower.preprocess.size
        with torch.no_grad():
            channels, rows, _ = compute_feature_map(tower, torch.zeros(1, 3, size, size))[0].shape
        self.cell_size = size // rows
        upsample_to_4 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels // 2, 2, 2),
            LayerNorm2d(channels // 2),
            nn.GELU(),
            nn.ConvTranspose2d(channels // 2, channels // 4, 2, 2),
        )
        upsample_to_8 = nn.ConvTranspose2d(channels, channels // 2, 2, 2)
        self.scales = nn.ModuleList([upsample_to_4, upsample_to_8, nn.Identity(), nn.MaxPool2d(2)])
        widths = (channels // 4, channels // 2, channels, channels)
        self.outputs = nn.ModuleList([_output_layers(width) for width in widths])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.cell_size != STRIDE:
            size = [side // STRIDE * self.cell_size for side in images.shape[-2:]]
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            cells = compute_feature_map(self.tower, images)
        maps = OrderedDict()
        for n, (scale, output) in enumerate(zip(self.scales, self.outputs, strict=True)):
            maps[str(n)] = output(scale(cells.float()))
        maps["pool"] = F.max_pool2d(maps["3"], kernel_size=1, stride=2)
        return maps


def _output_layers(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, CHANNELS, 1, bias=False),
        LayerNorm2d(CHANNELS),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
        LayerNorm2d(CHANNELS),
    )


class CNNPyramid(nn.Module):
    """Feature pyramid network (arXiv 1612.03144) on the last four stages of a timm network."""

    def __init__(self, tower: VisionTower, bf16: bool) -> None:
        super().__init__()
        self.tower, self.bf16, self.out_channels = tower, bf16, CHANNELS
        with torch.no_grad():
            channels = [stage.shape[1] for stage in self._stages(torch.zeros(1, 3, 64, 64))]
        self.fpn = FeaturePyramidNetwork(channels, CHANNELS, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            stages = self._stages(images)
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(n), stage.float()) for n, stage in enumerate(stages)))
        return maps

    def _stages(self, images: Tensor) -> list[Tensor]:
        images = (images - self.tower.mean) / self.tower.std
        backbone: Any = self.tower.backbone
        stages: list[Tensor] = backbone.forward_intermediates(images, indices=4, intermediates_only=True)
        return stages

"""The families of `benchmarks.families`: torchvision's, and those that are written here.

Every family is built by the class that its users build it by, as small as the constructor lets it be where the
usual size would take minutes: fewer blocks, narrower stages, ten classes, the smallest images that the
architecture takes. What is between the layers (residuals, gates, windows, tied heads) is that of the large one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision.models as tv
from torch import Generator, Tensor, nn
from torchvision.models import convnext, efficientnet, mobilenetv3, regnet, resnet, swin_transformer, vgg
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation import FCN, DeepLabV3
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.families_written import (
    DnCNN,
    LanguageModel,
    Outputs,
    PlainEncoder,
    TwoInputs,
    UNet,
    WaveNet,
)

Draw = Callable[[int, Generator], Any]
"""Inputs of a model, drawn at random: (batch, generator) -> a tensor, a tuple or a dict of keyword arguments."""


@dataclass(frozen=True)
class Family:
    """One row. `build` makes the model, with any weights; `needs` is a package that may be missing."""

    name: str
    group: str
    build: Callable[[], nn.Module]
    draw: Draw
    needs: str = ""


def images(size: int, channels: int = 3) -> Draw:
    """Normal pixels about a normal mean for each image and colour: white noise alone averages out in pools."""

    def draw(batch: int, generator: Generator) -> Tensor:
        colours = torch.randn(batch, channels, 1, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)
        return colours + noise

    return draw


def normal(*shape: int) -> Draw:
    return lambda batch, generator: torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def tokens(length: int, words: int) -> Draw:
    return lambda batch, generator: torch.randint(words, (batch, length), generator=generator)


def several(*draws: Draw) -> Draw:
    return lambda batch, generator: tuple(draw(batch, generator) for draw in draws)


def _narrow_head(model: nn.Module, channels: int, width: int = 64) -> nn.Module:
    """A classifier of AlexNet and VGG that is `width` wide in place of 4,096, on 2 x 2 pixels in place of 6 x 6 or
    7 x 7 (`embed` inverts a dense matrix as large as what is flattened); its layers are the same."""
    first, linear, last = nn.Linear(4 * channels, width), nn.Linear(width, width), nn.Linear(width, 10)
    relu, drop = partial(nn.ReLU, inplace=True), nn.Dropout
    layers: list[nn.Module] = [first, relu(), drop(), linear, relu(), drop(), last]
    if isinstance(model, tv.AlexNet):
        layers = [drop(), first, relu(), drop(), linear, relu(), last]
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(2), nn.Sequential(*layers)
    return model


def _vgg() -> nn.Module:
    plan: list[str | int] = [16, "M", 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
    return _narrow_head(tv.VGG(vgg.make_layers(plan, batch_norm=True), init_weights=False), 128)


def _convnext() -> nn.Module:
    block = convnext.CNBlockConfig
    return tv.ConvNeXt([block(24, 48, 2), block(48, 64, 1), block(64, None, 1)], num_classes=10)


def _efficientnet() -> nn.Module:
    block = efficientnet.MBConvConfig
    stages = [
        block(1, 3, 1, 16, 8, 1, 1.0, 1.0),
        block(6, 3, 2, 8, 16, 2, 1.0, 1.0),
        block(6, 5, 2, 16, 24, 2, 1.0, 1.0),
    ]
    return tv.EfficientNet(stages, dropout=0.2, num_classes=10, last_channel=96)


def _efficientnet_v2() -> nn.Module:
    fused, block = efficientnet.FusedMBConvConfig, efficientnet.MBConvConfig
    stages = [
        fused(1, 3, 1, 16, 16, 1),
        fused(4, 3, 2, 16, 24, 2),
        block(4, 3, 2, 24, 32, 2, 1.0, 1.0),
    ]
    return tv.EfficientNet(stages, dropout=0.2, num_classes=10, last_channel=96)


def _maxvit() -> nn.Module:
    return tv.MaxVit((32, 32), 16, 4, [16, 32], [1, 2], 8, stochastic_depth_prob=0.1, num_classes=10)


def _mobilenet_v3() -> nn.Module:
    block = partial(mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    stages = [
        block(16, 3, 16, 16, True, "RE", 2),
        block(16, 3, 48, 24, False, "RE", 2),
        block(24, 5, 64, 24, True, "HS", 1),
        block(24, 5, 96, 32, True, "HS", 2),
    ]
    return tv.MobileNetV3(stages, last_channel=64, num_classes=10)


def _regnet(se_ratio: float | None) -> nn.Module:
    blocks = regnet.BlockParams.from_init_params(
        depth=7, w_0=24, w_a=16.0, w_m=2.0, group_width=8, se_ratio=se_ratio
    )
    return tv.RegNet(blocks, num_classes=10)


def _swin(**options: Any) -> nn.Module:
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10, **options)


def _fcn() -> nn.Module:
    """With its auxiliary classifier, which runs in inference too: a dict of two outputs."""
    stages = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    body = IntermediateLayerGetter(stages, {"layer3": "aux", "layer4": "out"})
    return FCN(body, FCNHead(512, 4), FCNHead(256, 4))


def _deeplab() -> nn.Module:
    stages = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    return DeepLabV3(IntermediateLayerGetter(stages, {"layer4": "out"}), DeepLabHead(512, 4))


def _fpn() -> nn.Module:
    """A detector's backbone as torchvision builds it: frozen batch norms, which are buffers and arithmetic."""
    stages = resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    layers = {f"layer{k}": str(k - 1) for k in range(1, 5)}
    return BackboneWithFPN(stages, layers, [64, 128, 256, 512], 64)


def _resnet(block: type[nn.Module], blocks: list[int], **options: Any) -> Callable[[], nn.Module]:
    return lambda: resnet.ResNet(block, blocks, num_classes=10, **options)


def _torchvision() -> list[Family]:
    make = partial(Family, group="torchvision")
    basic, bottleneck = resnet.BasicBlock, resnet.Bottleneck
    v2 = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    mobile = {"width_mult": 0.5, "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]}
    return [
        make("squeezenet1_1", build=lambda: tv.squeezenet1_1(num_classes=10), draw=images(64)),
        make("resnet18", build=_resnet(basic, [2, 1, 1, 1]), draw=images(32)),
        make("resnet50", build=_resnet(bottleneck, [2, 1, 1, 1]), draw=images(32)),
        make("densenet121", build=lambda: tv.DenseNet(8, (3, 2, 2, 2), 16, num_classes=10), draw=images(64)),
        make("mobilenet_v2", build=lambda: tv.MobileNetV2(num_classes=10, **mobile), draw=images(32)),
        make("mobilenet_v3_small", build=_mobilenet_v3, draw=images(32)),
        make("efficientnet_b0", build=_efficientnet, draw=images(32)),
        make("efficientnet_v2_s", build=_efficientnet_v2, draw=images(32)),
        make("mnasnet0_5", build=lambda: tv.MNASNet(0.35, num_classes=10), draw=images(32)),
        make("regnet_x_400mf", build=lambda: _regnet(None), draw=images(32)),
        make("regnet_y_400mf", build=lambda: _regnet(0.25), draw=images(32)),
        make("shufflenet_v2_x0_5", build=lambda: tv.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 128], num_classes=10),
             draw=images(64)),
        make("convnext_tiny", build=_convnext, draw=images(32)),
        make("swin_t", build=_swin, draw=images(32)),
        make("swin_v2_t", build=lambda: _swin(**v2), draw=images(32)),
        make("vit_b_16", build=lambda: tv.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
             draw=images(32)),
        make("maxvit_t", build=_maxvit, draw=images(32)),
        make("vgg11_bn", build=_vgg, draw=images(64)),
        make("alexnet", build=lambda: _narrow_head(tv.AlexNet(), 256), draw=images(96)),
        make("resnext50_32x4d", build=_resnet(bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4),
             draw=images(32)),
        make("wide_resnet50_2", build=_resnet(bottleneck, [1, 1, 1, 1], width_per_group=128), draw=images(32)),
        # with its auxiliary heads, which inference leaves out
        make("googlenet", build=lambda: tv.GoogLeNet(num_classes=10, init_weights=False), draw=images(64)),
        make("inception_v3", build=lambda: tv.Inception3(10, aux_logits=False, init_weights=False),
             draw=images(80)),
        make("fcn (resnet)", build=_fcn, draw=images(32)),
        make("deeplabv3 (resnet)", build=_deeplab, draw=images(32)),
        make("resnet-fpn (detector)", build=_fpn, draw=images(64)),
    ]  # fmt: skip


def _written() -> list[Family]:
    make = partial(Family, group="written")
    two = several(images(16), normal(5))
    return [
        make("tuple output", build=lambda: Outputs("tuple"), draw=images(12)),
        make("dict output", build=lambda: Outputs("dict"), draw=images(12)),
        make("dataclass output", build=lambda: Outputs("dataclass"), draw=images(12)),
        make("dataclass output, registered", build=lambda: Outputs("registered"), draw=images(12)),
        make("two inputs, two outputs", build=TwoInputs, draw=two),
        make("dncnn (denoiser)", build=DnCNN, draw=images(16, 1)),
        make("u-net", build=UNet, draw=images(16)),
        make("audio cnn", build=WaveNet, draw=normal(1, 2048)),
        make("lstm language model", build=lambda: LanguageModel(nn.LSTM), draw=tokens(9, 40)),
        make("gru language model", build=lambda: LanguageModel(nn.GRU), draw=tokens(9, 40)),
        make("encoder layer (nn.MultiheadAttention)", build=PlainEncoder, draw=normal(7, 24)),
        make("nn.TransformerEncoderLayer", draw=normal(7, 24),
             build=lambda: nn.TransformerEncoderLayer(24, 4, 40, batch_first=True)),
    ]  # fmt: skip


def families() -> dict[str, Family]:
    """All of them by name, quick ones first."""
    from benchmarks.families_libraries import huggingface, timm  # they import this module's words

    return {family.name: family for family in (*_written(), *huggingface(), *_torchvision(), *timm())}

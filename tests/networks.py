"""Modules of every kind that a posterior is put over: each with its arguments, and what estimators apply to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    where: Any = None
    # whether it has layers that "local" and "flipout" apply to
    linear: bool = True


class Tied(nn.Module):
    """An embedding whose matrix is the last layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.middle(self.embedding(tokens))))
        return logits


class Residual(nn.Module):
    """torchvision's basic block."""

    def __init__(self, planes: int, to: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes, to, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(to, to, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(to), nn.BatchNorm2d(to)
        self.downsample = nn.Sequential(nn.Conv2d(planes, to, 1, stride, bias=False), nn.BatchNorm2d(to))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    blocks = Residual(4, 4, 1), Residual(4, 8, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = x + self.mlp(self.norm2(x))
        return y


def noise(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def tokens() -> tuple[Tensor]:
    return (torch.randint(0, 7, (3, 4)),)


NETWORKS: dict[str, Network] = {
    "Linear": Network(lambda: nn.Linear(4, 3), noise(6, 4)),
    "Conv1d": Network(lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), noise(2, 3, 9)),
    "Conv2d": Network(lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1), noise(2, 4, 5, 6)),
    "Conv3d": Network(lambda: nn.Conv3d(2, 3, 2, dilation=2, bias=False), noise(2, 2, 4, 4, 5)),
    "ConvTranspose1d": Network(lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), noise(2, 3, 5)),
    "ConvTranspose2d": Network(lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), noise(2, 3, 4, 4)),
    "ConvTranspose3d": Network(lambda: nn.ConvTranspose3d(2, 2, 2), noise(2, 2, 3, 3, 3)),
    "Linear with its bias": Network(lambda: nn.Linear(4, 3), noise(6, 4), "all"),
    "Conv2d with its bias": Network(lambda: nn.Conv2d(3, 4, 3), noise(2, 3, 5, 5), "all"),
    "Linear of a vector": Network(lambda: nn.Linear(4, 3), noise(4)),
    "Embedding": Network(lambda: nn.Embedding(7, 5), tokens, linear=False),
    "LSTM": Network(lambda: nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True), noise(2, 3, 4), linear=False),
    "GRU": Network(lambda: nn.GRU(4, 5), noise(3, 2, 4), "all", linear=False),
    "MultiheadAttention": Network(
        lambda: nn.MultiheadAttention(8, 2), lambda: (torch.randn(3, 2, 8),) * 3, linear=False
    ),
    "LayerNorm": Network(lambda: nn.LayerNorm([3, 4]), noise(2, 3, 4), nn.LayerNorm, linear=False),
    "BatchNorm2d": Network(lambda: nn.BatchNorm2d(3), noise(4, 3, 2, 2), "all", linear=False),
    "tied": Network(Tied, tokens),
    "ResNet": Network(resnet, noise(4, 3, 8, 8)),
    "transformer block": Network(Block, noise(2, 3, 8)),
    "weight norm": Network(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), noise(6, 4), linear=False
    ),
}  # fmt: skip


def first(output: Any) -> Tensor:
    """The tensor among what a module gives."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output

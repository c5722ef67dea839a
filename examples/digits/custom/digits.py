"""A small convolutional network for 8 by 8 pixels. Any nn.Module will do: Holdfast needs this file and no other."""

from __future__ import annotations

from torch import Tensor, nn


class Digits(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * channels * 4 * 4, 10))

    def forward(self, features: Tensor) -> Tensor:
        """Standardised pixels, float32 (rows, 64), to logits (rows, 10)."""
        return self.classifier(self.convolutions(features))


def build(channels: int = 32, dropout: float = 0.5) -> nn.Module:
    """What `model.source: factory:stages.custom.digits:build` calls with `model.kwargs`."""
    return Digits(channels, dropout)

"""A multilayer perceptron that predicts one number."""

from __future__ import annotations

from torch import Tensor, nn


class Regressor(nn.Module):
    """Two hidden layers. They work near 0; `mean` and `scale` bring what they say to the target's range."""

    def __init__(self, features: int, hidden: int, dropout: float, mean: float, scale: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, 1),
        )
        self.mean, self.scale = mean, scale

    def forward(self, features: Tensor) -> Tensor:
        """Standardised numbers, float32 (rows, features), to predictions (rows, 1)."""
        return self.mean + self.scale * self.layers(features)


def build(features: int, hidden: int = 32, dropout: float = 0.1, mean: float = 0.0, scale: float = 1.0) -> nn.Module:
    """What `model.source: factory:stages.custom.mlp:build` calls with `model.kwargs`."""
    return Regressor(features, hidden, dropout, mean, scale)

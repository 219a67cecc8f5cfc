"""What every interaction model is: embedded and dense features in, one vector per example out."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """Base of the interaction models. Constructed as `Backbone(config, features, dense)`.

    It knows no tables, tasks or losses. It may be cast to bf16; the caller casts the inputs to its dtype.

    Attributes:
        out_features: H, the width of the output.
    """

    out_features: int

    def forward(self, embedded_BFE: Tensor, dense_BD: Tensor) -> Tensor:
        """Embedded features (B, F, E) and dense ones (B, D), D may be 0, to x_BH."""
        raise NotImplementedError

"""The interface of interaction models: embedded and dense features in, one vector per example out.

Shape suffixes as in `exfm_ray.data.batch`; R embedded rows, H features out.
"""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """Base of the interaction models, constructed as `Backbone(config, inputs)`.

    A backbone knows no tables, tasks or losses. It may be cast to bf16; the caller casts the
    inputs to its dtype.

    Attributes:
        out_features: H, the width of the output.
    """

    out_features: int

    def forward(self, embedded_BRE: Tensor, dense_BD: Tensor) -> Tensor:
        """Map embedded rows (B, R, E) and dense features (B, D), D may be 0, to x_BH."""
        raise NotImplementedError

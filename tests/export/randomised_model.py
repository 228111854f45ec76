"""Networks whose statistics differ from key to key."""

from __future__ import annotations

import torch
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    """Running statistics and affine weights that a swapped key would show."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model.eval()

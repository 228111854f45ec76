"""Any network from [0, 1] pixels to logits serves: here a plain multi-layer perceptron, scored and trained.

python examples/own_model.py
"""

import numpy as np
import torch
from torch import nn

import puma
from puma.margins import Status
from puma.training.recipe import load_recipe


class Perceptron(nn.Module):
    """Normalises inside, as every model given to PUMA has to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - 0.3) / 0.4)


threat = puma.ThreatModel.parse("L2:0.5")
pool = puma.Pool([puma.load_dataset("digits")])
run = puma.train(Perceptron(), pool, threat=threat, recipe=load_recipe("digits", steps=100), seed=0)
table = puma.score_margins(run.model, pool, norm="L2")
plan = puma.make_plan(table, strategy="puma-plus", prune_fraction=0.3, threat=threat)
for status in np.unique(table.status):
    margins = table.margin[table.status == status]
    print(f"{len(margins)} {Status(status).text}, median margin {np.median(margins):.3f}")
print(f"puma-plus keeps {plan.kept} images, mean eps {plan.mean_eps:.3f} of {threat.eps}")

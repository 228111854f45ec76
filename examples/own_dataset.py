"""Any data set serves: an object with a length that gives (uint8 image [H, W, C], label). Here real and synthetic ones.

python examples/own_dataset.py
"""

import numpy as np
from sklearn.datasets import load_digits

import puma
from puma.training.recipe import load_recipe


class Digits:
    """scikit-learn's digits enlarged to 16x16, as somebody else's data set might be."""

    def __init__(self, noise: float = 0.0) -> None:
        data = load_digits()
        images = np.kron(data.images, np.ones((2, 2))) * 15
        images += np.random.default_rng(0).normal(0, noise, images.shape)
        self.images = images.clip(0, 255).astype(np.uint8)[..., None]
        self.labels = data.target

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


pool = puma.Pool([Digits(), Digits(noise=20)], roles=["real", "synthetic"])
threat = puma.ThreatModel("Linf", 0.1)
run = puma.train("small-cnn", pool, threat=threat, recipe=load_recipe("digits", steps=40, attack_steps=3))
table = puma.score_margins(run.model, pool, norm="Linf", mode="fast")  # estimates are enough to look at a pool
plan = puma.make_plan(table, strategy="easy", prune_fraction=0.5, threat=threat)
planned = puma.PlannedDataset(pool, plan)
image, label, eps = planned[0]
print(f"{len(planned)} of {len(pool)} images; the first: {tuple(image.shape)}, label {label}, eps {eps:.3f}")

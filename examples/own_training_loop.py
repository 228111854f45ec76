"""PUMA in somebody's own training loop: the plan is a data set of (image, label, eps), the rest is plain PyTorch.

python examples/own_training_loop.py
"""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import puma

threat = puma.ThreatModel("Linf", eps=0.15)
pool = puma.Pool([puma.load_dataset("digits")])
model = puma.build_model("small-cnn", num_classes=10, in_channels=1, image_size=8)
optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def epoch(loader):
    for images, labels, eps in loader:
        worst = puma.pgd(model, images, labels, threat=threat, eps=eps.float(), steps=5)
        optimiser.zero_grad()
        cross_entropy(model(worst), labels).backward()
        optimiser.step()


plain = [(torch.from_numpy(image).permute(2, 0, 1) / 255, label, threat.eps) for image, label in pool]
for _ in range(3):  # a few epochs on everything give a first margin model
    epoch(DataLoader(plain, batch_size=64, shuffle=True))

table = puma.score_margins(model.eval(), pool, norm="Linf")
plan = puma.make_plan(table, strategy="puma", prune_fraction=0.3, threat=threat)
model.train()
for _ in range(3):
    epoch(DataLoader(puma.PlannedDataset(pool, plan), batch_size=64, shuffle=True))

hit = puma.deepfool(model.eval(), *next(iter(DataLoader(puma.PlannedDataset(pool, plan), batch_size=64)))[:2])
print(f"trained on {plan.kept} of {len(pool)} images; median margin now {float(hit.margin.nanmedian()):.3f}")

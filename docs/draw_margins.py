"""Draw docs/margins.svg: DeepFool on images of two pixels, with the library's own functions.

python docs/draw_margins.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import puma

COLOURS = ("#dbe7f5", "#fbe5d0", "#dff0dc")
STRONG = ("#2b6cb0", "#c05621", "#2f855a")


class TwoPixels(nn.Module):
    """Three classes with curved boundaries on the unit square."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 3] of images [B, 1, 1, 2]."""
        x, y = images.flatten(1).unbind(1)
        x = x + 0.13 * torch.sin(7 * y) - 0.5 * x * (1 - x)
        first = 2.2 - 3.2 * x - 2.4 * (y - 0.45) ** 2
        second = 2.0 * x - 2.5 * (y - 0.2) ** 2 - 0.1
        third = 2.6 * y + 1.2 * (x - 0.4) ** 2 - 1.15
        return 4 * torch.stack([first, second, third], 1)


def at(x: float, y: float) -> Tensor:
    """One image of two pixels."""
    return torch.tensor([x, y]).view(1, 1, 1, 2)


def first_boundary(model: nn.Module, point: Tensor, label: int) -> tuple[Tensor, float]:
    """Normal and offset of the boundary as linearised at ``point``, against the nearest class."""
    image = point.clone().requires_grad_(True)
    logits = model(image)[0]
    rivals = [k for k in range(3) if k != label]
    lines = []
    for rival in rivals:
        gap = logits[rival] - logits[label]
        (normal,) = torch.autograd.grad(gap, image, retain_graph=True)
        flat = normal.flatten()
        value = float(gap.detach())
        lines.append((-value / float(flat.norm()), flat, float(flat @ point.flatten()) - value))
    _, normal, offset = min(lines, key=lambda line: line[0])
    return normal.detach(), offset


def main() -> None:
    """Draw the picture."""
    model = TwoPixels().eval()
    side = torch.linspace(0, 1, 160)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).view(-1, 1, 1, 2)
    classes = model(grid).argmax(1).view(160, 160)
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 4.5), layout="constrained")
    image, lost = at(0.16, 0.34), at(0.8, 0.42)
    titles = (
        "margin > 0: out of the label's region",
        "L2 and Linf measure differently",
        "margin < 0: into the label's region",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.contourf(side, side, classes, levels=(-0.5, 0.5, 1.5, 2.5), colors=COLOURS)
        axis.contour(side, side, classes, levels=(0.5, 1.5), colors="#555555", linewidths=0.8)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="pixel 1", ylabel="pixel 2", title=title, aspect="equal")
    label = int(model(image).argmax())
    labels = torch.tensor([label])
    plain = puma.deepfool(model, image, labels, norm="L2", mode="deepfool")
    polished = puma.deepfool(model, image, labels, norm="L2", mode="tight")
    normal, offset = first_boundary(model, image, label)
    xs = torch.linspace(0, 1, 50)
    axes[0].plot(
        xs, (offset - normal[0] * xs) / normal[1], "--", color="#888888", label="boundary linearized at the image"
    )
    for hit, colour, text in ((plain, STRONG[1], "DeepFool"), (polished, STRONG[2], "its ray rotated")):
        arrow(axes[0], image, hit.adversarial, colour, f"{text}: {float(hit.margin):.3f}")
    square = puma.deepfool(model, image, labels, norm="Linf", mode="tight")
    for hit, colour, text in ((polished, STRONG[2], "L2"), (square, STRONG[0], "Linf")):
        arrow(axes[1], image, hit.adversarial, colour, f"{text}: {float(hit.margin):.3f}")
    centre, radius = image.flatten().tolist(), float(square.margin)
    corner = [value - radius for value in centre]
    axes[1].add_patch(plt.Rectangle(corner, 2 * radius, 2 * radius, fill=False, color=STRONG[0]))
    axes[1].add_patch(plt.Circle(centre, float(polished.margin), fill=False, color=STRONG[2]))
    back = puma.deepfool(model, lost, labels, norm="L2", mode="tight")
    arrow(axes[2], lost, back.adversarial, STRONG[0], f"into blue: {float(back.margin):.3f}")
    for axis in axes:
        axis.legend(loc="lower right", fontsize=8)
    target = Path(__file__).with_name("margins.svg")
    with matplotlib.rc_context({"svg.hashsalt": "puma"}):
        figure.savefig(target, metadata={"Date": None})


def arrow(axis: plt.Axes, start: Tensor, end: Tensor, colour: str, text: str) -> None:
    """An arrow between two images."""
    (x, y), (u, v) = start.flatten().tolist(), end.flatten().tolist()
    axis.plot([x, u], [y, v], color=colour, linewidth=2, label=text)
    axis.plot([u], [v], "o", color=colour, markersize=5)
    axis.plot([x], [y], "o", color="black", markersize=6)


if __name__ == "__main__":
    main()

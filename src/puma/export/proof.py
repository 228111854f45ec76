"""Proof that an export is whole: a fresh process loads it without PUMA and gives the same logits."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from puma.errors import CheckError

TOLERANCE = 1e-6
_SCRIPT = """
import sys
import numpy, torch
torch.set_num_threads(1)
folder, images, logits = sys.argv[1:]
sys.path.insert(0, folder)
from model import load
with torch.no_grad():
    numpy.save(logits, load(folder)(torch.from_numpy(numpy.load(images))).numpy())
if any(name.split(".")[0] == "puma" for name in sys.modules):
    sys.exit("model.py needs puma")
"""


def prove(model: nn.Module, folder: Path, config: dict[str, Any], seed: int = 0) -> float:
    """Load ``folder`` in a process of its own and compare logits on eight random images.

    Args:
        model: what was exported.
        folder: of the export.
        config: of ``config.json``.
        seed: of the images.

    Returns:
        The largest difference of a logit, relative to the largest logit where that is above 1.

    Raises:
        CheckError: the export does not load, or its logits differ by more than 1e-6.
    """
    size, channels = int(config["puma"]["image_size"]), int(config["puma"]["in_channels"])
    images = np.random.default_rng(seed).random((8, channels, size, size), dtype=np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "images.npy", Path(scratch) / "logits.npy"
        np.save(inputs, images)
        command = [sys.executable, "-I", "-B", "-c", _SCRIPT, str(folder.absolute()), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckError(f"the export in {folder} does not load by itself", why=last)
        found = np.load(outputs)
    with torch.no_grad():
        expected = copy.deepcopy(model).cpu().eval()(torch.from_numpy(images)).numpy()
    gap = float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not gap <= TOLERANCE:
        raise CheckError(
            f"the export in {folder} gives other logits than the model (they differ by {gap:.2g})",
            why=f"at most {TOLERANCE:g} is rounding",
        )
    return gap

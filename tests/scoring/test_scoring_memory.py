"""Scoring holds a batch at a time: its memory does not grow with the number of images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCORE = """
import re, sys, torch, puma
from pathlib import Path
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).eval()
for path in sys.argv[1:]:
    pool = puma.load_dataset(path)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    table = puma.score_margins(model, pool, mode="fast")
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print(len(table), 1024 * int(peak[1]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's record of peak memory")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    counts = (1024, 8192)
    for count in counts:
        np.savez(tmp_path / f"{count}.npz", image=np.zeros((count, 32, 32, 3), np.uint8), label=np.arange(count) % 2)
    command = [sys.executable, "-c", SCORE, *(str(tmp_path / f"{count}.npz") for count in (*counts[:1], *counts))]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc gives back what is freed
    said = subprocess.run(command, env=os.environ | at_once, capture_output=True, text=True, check=True).stdout
    _, (few, small), (many, large) = ([int(word) for word in line.split()] for line in said.splitlines())
    assert (few, many) == counts
    added = 3072 * (many - few)  # bytes of the images as they are stored, 22 MB
    assert large - small < added / 2

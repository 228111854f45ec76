from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from puma.data.load import load_dataset
from puma.data.pool import PlannedDataset, Pool, read_batch, to_tensor
from puma.errors import DataError


@dataclass
class WrittenPlan:
    """Columns of a plan without the rules that make one."""

    keep: np.ndarray
    eps: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)


def test_to_tensor_is_the_pixels_over_255() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    tensor = to_tensor(images)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
    assert to_tensor(images[:0]).shape == (0, 3, 4, 6)


def test_read_batch_gives_images_and_their_labels() -> None:
    source = load_dataset("digits")
    images, labels = read_batch(source, np.array([5, 2]))
    torch.testing.assert_close(images[1], to_tensor(source[2][0][None])[0])
    assert labels.tolist() == [source[5][1], source[2][1]]


def test_pixels_travel_as_bytes_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[torch.dtype, int]] = []
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and isinstance(args[0], (str, torch.device)):
            moved.append((tensor.dtype, tensor.numel()))
        return original(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    images, labels = read_batch(load_dataset("digits"), np.arange(5), "meta")
    assert moved == [(torch.uint8, 5 * 64), (torch.int64, 5)]
    assert (images.device.type, labels.device.type, images.dtype) == ("meta", "meta", torch.float32)


def digits_plan() -> tuple[Pool, WrittenPlan]:
    pool = Pool([load_dataset("digits"), load_dataset("digits:test")])
    rng = np.random.default_rng(0)
    keep = rng.random(len(pool)) < 0.5
    eps = np.where(keep, rng.random(len(pool)), 0).astype(np.float32)
    return pool, WrittenPlan(keep, eps, {"pool": pool.describe()})


def test_planned_dataset_holds_the_kept_rows_in_pool_order() -> None:
    pool, plan = digits_plan()
    dataset = PlannedDataset(pool, plan)
    assert len(dataset) == plan.keep.sum()
    for item in (0, 17, len(dataset) - 1):
        image, label, eps = dataset[item]
        row = int(np.flatnonzero(plan.keep)[item])
        torch.testing.assert_close(image, to_tensor(pool[row][0][None])[0])
        assert (label, eps) == (pool[row][1], float(plan.eps[row]))
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_planned_dataset_in_a_data_loader() -> None:
    pool, plan = digits_plan()
    loader = torch.utils.data.DataLoader(PlannedDataset(pool, plan, transform=lambda x: 1 - x), batch_size=100)
    images, labels, eps = (torch.cat(column) for column in zip(*loader, strict=True))
    assert (images.dtype, labels.dtype, eps.dtype) == (torch.float32, torch.int64, torch.float32)
    torch.testing.assert_close(1 - images, to_tensor(pool.read(plan.keep)))
    assert labels.tolist() == pool.labels[plan.keep].tolist()
    np.testing.assert_allclose(eps.numpy(), plan.eps[plan.keep])


def test_plan_of_another_pool_is_refused() -> None:
    pool, plan = digits_plan()
    with pytest.raises(DataError, match="for another pool"):
        PlannedDataset(Pool(pool.sources, ["real", "real"]), plan)
    with pytest.raises(DataError, match="1,797 rows, the pool 898"):
        PlannedDataset(pool.sources[0], plan)

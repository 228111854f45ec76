"""bfloat16 gradients, stand-ins for the model: faster searches that may change a margin a little, never invent one."""

from __future__ import annotations

from threading import Lock

import pytest
import torch
from test_deepfool import Curved, batch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from puma.attacks import network
from puma.attacks.deepfool import DeepFool, deepfool
from puma.attacks.network import fold_batchnorm
from puma.models.checks import true_float32

NORMS = ["Linf", "L2"]
MODES = ["deepfool", "refined", "tight"]


def images_and_labels(count: int = 90) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = Curved().eval(), batch(count, 4)
    labels = model(x).argmax(1)
    labels[::7] = (labels[::7] + 1) % 5
    return model, x, labels


def assert_crossings_are_real(model: nn.Module, x: Tensor, labels: Tensor, hit: DeepFool) -> None:
    predicted = model(hit.adversarial).argmax(1)
    crossed = torch.from_numpy(hit.status == "crossed")
    back = torch.from_numpy(hit.status == "misclassified") & hit.margin.isfinite()
    assert crossed.sum() > 60
    assert back.any()
    assert (predicted[crossed] != labels[crossed]).all()
    assert (predicted[back] == labels[back]).all()
    assert (hit.predicted == model(x).argmax(1)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_gradients_give_nearly_the_same_margins_and_only_real_crossings(norm, mode) -> None:
    model, x, labels = images_and_labels()
    exact = deepfool(model, x, labels, norm=norm, mode=mode)
    coarse = deepfool(model, x, labels, norm=norm, mode=mode, precision="bf16")
    assert_crossings_are_real(model, x, labels, coarse)
    assert (coarse.status == exact.status).all()
    assert not torch.equal(coarse.margin, exact.margin)
    ratio = (coarse.margin / exact.margin)[coarse.margin.isfinite() & exact.margin.isfinite()]
    assert abs(ratio.median() - 1) < 0.005
    assert ratio.quantile(0.05) > 0.97
    assert ratio.quantile(0.9) < 1.05
    assert (coarse.predicted == exact.predicted).all()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_looks_are_in_float32_whatever_the_surroundings_say(precision) -> None:
    model, x, labels = images_and_labels()
    alone = deepfool(model, x, labels, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        inside = deepfool(model, x, labels, precision=precision)
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(inside.margin, alone.margin, rtol=0, atol=0, equal_nan=True)


def test_true_float32_puts_back_what_it_finds(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with true_float32("cpu"):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32


class Shifted(nn.Module):
    """Another model than it claims to be: its boundaries lie elsewhere."""

    def __init__(self, model: nn.Module, shift: float) -> None:
        super().__init__()
        self.model, self.shift, self.sizes = model, shift, set()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.add(len(x))
        logits = self.model(x)
        return logits - self.shift * (logits == logits.amax(1, keepdim=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_crossings_of_a_wrong_proxy_are_confirmed_by_the_model(norm, mode) -> None:
    model, x, labels = images_and_labels()
    hit = deepfool(model, x, labels, norm=norm, mode=mode, proxy=Shifted(model, 1e-3))
    assert_crossings_are_real(model, x, labels, hit)
    far = deepfool(model, x, labels, norm=norm, mode=mode, proxy=Shifted(model, 2.0))  # sees crossings everywhere
    crossed = torch.from_numpy(far.status == "crossed")
    assert (model(far.adversarial).argmax(1) != labels)[crossed].all()
    lost = torch.from_numpy(far.status == "unconverged")
    assert lost.any()
    assert far.margin[lost].isnan().all()
    assert torch.equal(far.adversarial[lost], x[lost])


@pytest.mark.parametrize("mode", ["fast", *MODES])
def test_filling_batches_up_changes_nothing_but_their_sizes(mode) -> None:
    model, x, labels = images_and_labels()
    proxy = Shifted(model, 0.0)
    filled = deepfool(model, x, labels, mode=mode, chunk=32, proxy=proxy)
    plain = deepfool(model, x, labels, mode=mode, chunk=32)
    torch.testing.assert_close(filled.margin, plain.margin, rtol=1e-3, atol=1e-6, equal_nan=True)
    assert (filled.codes == plain.codes).all()
    assert proxy.sizes <= {4, 8, 16, 32}


@torch._dynamo.config.patch(recompile_limit=100)  # by itself torch gives up after 8 and goes on uncompiled
def test_shrinking_batches_do_not_recompile() -> None:
    model, x, labels = images_and_labels()
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    proxy = torch.compile(model, backend=counter, dynamic=False)
    hits = [deepfool(model, x[:count], labels[:count], mode="tight", chunk=32, proxy=proxy) for count in (90, 77)]
    assert 2 <= counter.frame_count <= 2 * 4  # four sizes, with a graph and without
    deepfool(model, x[:50], labels[:50], norm="L2", mode="refined", chunk=32, proxy=proxy)
    assert counter.frame_count <= 2 * 4
    plain = deepfool(model, x, labels, mode="tight", chunk=32)
    torch.testing.assert_close(hits[0].margin, plain.margin, rtol=1e-2, atol=1e-5, equal_nan=True)
    assert_crossings_are_real(model, x, labels, hits[0])
    deepfool(model, x, labels, mode="tight", chunk=32, proxy=proxy, precision="bf16")
    assert counter.frame_count <= 3 * 4  # and one under autocast


class Normalised(nn.Module):
    """Two convolutions with batch normalisation; ``twice``: what the second returns is used by a shortcut as well."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second, self.logits = nn.Conv2d(3, 8, 2), nn.Conv2d(8, 8, 1, bias=False), nn.Linear(8, 5)
        self.norms, self.twice = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]), twice
        for norm in self.norms:
            for value in (norm.running_mean, norm.bias):
                nn.init.normal_(value, std=0.3)
            for value in (norm.running_var, norm.weight):
                nn.init.uniform_(value, 0.5, 2)
        self.logits.weight.data *= 20

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(3 * self.norms[0](self.first(x - 0.5))))
        out = torch.tanh(self.norms[1](hidden)) + (hidden if self.twice else 0)
        return self.logits(out.flatten(2).mean(2))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_batch_normalisation_is_folded_into_convolutions_and_margins_stay(norm, mode) -> None:
    model, x = Normalised().eval(), batch(90, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(x).detach()
    labels = logits.argmax(1)
    labels[::7] = (labels[::7] + 1) % 5
    folded = fold_batchnorm(model, x[:2], logits[:2])
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(x), logits, rtol=1e-5, atol=1e-5)
    hit = deepfool(model, x, labels, norm=norm, mode=mode, chunk=30)
    assert_crossings_are_real(model, x, labels, hit)
    plain = deepfool(model, x, labels, norm=norm, mode=mode, chunk=91)  # fewer images than a chunk: not folded
    assert (hit.status == plain.status).all()
    change = (hit.margin / plain.margin - 1).abs()
    assert (change < 1e-3).float().mean() > 0.95  # rounding may send an image on another path
    assert {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_a_model_is_searched_itself_where_folding_would_change_it() -> None:
    x = batch(4, 4)
    for model in (Normalised(twice=True).eval(), Curved().eval()):
        assert fold_batchnorm(model, x, model(x).detach()) is model
    model = Normalised().eval()
    model.lock = Lock()  # cannot be copied
    assert fold_batchnorm(model, x, model(x).detach()) is model
    assert deepfool(model, x, model(x).argmax(1), chunk=2).margin.isfinite().all()


class Routed(Normalised):
    """Images of little contrast take another batch normalisation than the others."""

    def forward(self, x: Tensor) -> Tensor:
        ways = zip(x, x.std((1, 2, 3)) < 0.28, strict=True)
        hidden = torch.cat([self.norms[int(flat)](self.first(image[None])) for image, flat in ways])
        return self.logits(torch.tanh(hidden).flatten(2).mean(2))


def test_a_model_that_sends_images_on_different_ways_is_not_folded() -> None:
    model, x = Routed().eval(), batch(30, 4)
    labels = model(x).argmax(1)
    hits = [deepfool(model, x, labels, chunk=chunk) for chunk in (30, 31)]  # 31: fewer images than a chunk
    assert (hits[0].status == hits[1].status).all()
    torch.testing.assert_close(hits[0].margin, hits[1].margin)


def test_a_compiled_model_is_compiled_no_further_to_fold_it() -> None:
    model, x = Normalised().eval(), batch(8, 4)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        logits, frames = compiled(x), counter.frame_count
        assert fold_batchnorm(compiled, x, logits) is compiled
    assert counter.frame_count == frames


@pytest.mark.parametrize("norm", NORMS)
def test_a_crossing_within_rounding_of_the_folded_model_is_confirmed(norm, monkeypatch) -> None:
    model, x, labels = images_and_labels()
    seen: list[int] = []

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            logits = model(x)
            largest = logits.abs().amax(1, keepdim=True)
            return logits - 1.8e-5 * (largest + largest.clamp(max=1)) * (logits == logits.amax(1, keepdim=True))

    monkeypatch.setattr(network, "batchnorm_layers", lambda model: [model])
    monkeypatch.setattr(network, "fold_batchnorm", lambda *given: Rounded())
    for mode in MODES:
        hit = deepfool(model, x, labels, norm=norm, mode=mode)
        assert_crossings_are_real(model, x, labels, hit)
        passes = hit.passes[0] - 2 * 64  # without those by which the folded model is checked
        assert 0.8 * passes < sum(seen) < passes  # the folded model searches, the model confirms
        seen.clear()

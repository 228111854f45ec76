"""One check of models and batches: `deepfool`, `pgd`, `check_model` accept and refuse the same, in the same words."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import puma
from puma.errors import DataError, ModelError, PumaError
from puma.models.checks import check_model

LINF = puma.ThreatModel("Linf", 0.1)


def classifier(classes: int = 4) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, classes)).eval()


class Around(nn.Module):
    """`classifier` with ``before`` applied to the images and ``after`` to the logits."""

    def __init__(
        self, after: Callable[..., Any] = lambda f: f, before: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        self.model, self.after, self.before = classifier(), after, before

    def forward(self, images: Tensor) -> Any:
        return self.after(self.model(self.before(images)))


def data(count: int = 9) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return images, classifier()(images).argmax(1)


def run_deepfool(model: nn.Module, images: Any, labels: Any) -> Tensor:
    return puma.deepfool(model, images, labels).adversarial


def run_pgd(model: nn.Module, images: Any, labels: Any) -> Tensor:
    return puma.pgd(model, images, labels, threat=LINF, steps=3)


def run_check(model: nn.Module, images: Any, labels: Any) -> Tensor:
    return check_model(model, images)


def run_score(model: nn.Module, images: Any, labels: Any) -> puma.MarginTable:
    return puma.score_margins(model, puma.Pool([puma.load_dataset((images, range(len(images))))]), norm="Linf", out="x")


ATTACKS = pytest.mark.parametrize("attack", [run_deepfool, run_pgd])
ALL = pytest.mark.parametrize("attack", [run_deepfool, run_pgd, run_check])


@pytest.mark.parametrize("attack", [run_deepfool, run_pgd, run_check, run_score])
@pytest.mark.parametrize("model", [None, "small-cnn", torch.tanh, lambda x: x])
def test_what_is_no_module_is_refused(attack, model) -> None:
    with pytest.raises(ModelError, match=r"the model is a .*\n.*torch.nn.Module"):
        attack(model, *data())


def raising(error: BaseException) -> Callable[[Tensor], Tensor]:
    def forward(images: Tensor) -> Tensor:
        raise error

    return forward


def noise(f: Tensor) -> Tensor:
    return f + 0.1 * torch.rand_like(f)


@ALL
@pytest.mark.parametrize(
    ("after", "said"),
    [
        (lambda f: f.softmax(1), "probabilities, not logits"),
        (lambda f: (100 * f).softmax(1), "probabilities, not logits"),
        (lambda f: f.bfloat16().softmax(1), "probabilities, not logits"),
        (lambda f: f.softmax(1).half(), "probabilities, not logits"),
        (lambda f: (f, f), "returns a tuple for"),
        (lambda f: [f], "returns a list for"),
        (lambda f: {"scores": f}, "returns a dict for"),
        (lambda f: None, "returns a NoneType for"),
        (lambda f: f.detach().numpy(), "returns a ndarray for"),
        (lambda f: f[:, :, None], "returns shape"),
        (lambda f: f.flatten(), "returns shape"),
        (lambda f: f.to("meta"), r"returns shape \[\d+, 4\] \(.*on meta"),
        (lambda f: torch.nested.as_nested_tensor(f), "returns a Tensor for"),
        (lambda f: f[:1], "returns shape"),
        (lambda f: torch.complex(f, f), r"complex64, torch\.strided"),
        (lambda f: f.to_sparse(), r"float32, torch\.sparse_coo"),
        (lambda f: f.long(), r"int64, torch\.strided"),
        (lambda f: f > 0, r"bool, torch\.strided"),
        (lambda f: f[:, 0], "puma.TwoLogits"),
        (noise, "its answer .*changes from call to call"),
        (lambda f: F.dropout(f), "its answer .*changes from call to call"),
    ],
)
def test_models_that_do_not_return_logits_are_refused(attack, after, said) -> None:
    with pytest.raises(ModelError, match=said):
        attack(Around(after), *data())


@pytest.mark.parametrize("attack", [run_deepfool, run_check])
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval(), nn.LayerNorm(9)]
)
def test_answers_that_depend_on_the_batch_are_refused(attack, layer) -> None:
    over_the_batch = (lambda f: layer(f.T[:, :9]).T) if isinstance(layer, nn.LayerNorm) else layer
    model = Around(lambda f: over_the_batch(f) if len(f) >= 9 or not isinstance(layer, nn.LayerNorm) else f)
    model.layer = layer
    with pytest.raises(ModelError, match=r"training mode|depends on the other images|Expected more than 1 value"):
        attack(model, *data())


def test_batchnorm_in_training_mode_is_refused_but_for_attacks_in_training() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), classifier()).train()
    for attack in (run_deepfool, run_check):
        with pytest.raises(ModelError, match="training mode \\(BatchNorm2d at '0'\\)"):
            attack(model, *data())
    assert run_pgd(model, *data()).shape == data()[0].shape
    model.append(nn.Dropout(0.5))
    with pytest.raises(ModelError, match="changes from call to call"):
        run_pgd(model, *data())


@ALL
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AssertionError(), "AssertionError"),
        (AssertionError("Input height (2) doesn't match model (224)."), "doesn't match model"),
        (KeyError("labels"), "KeyError: 'labels'"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore"), "RuntimeError: mat1 and mat2"),
        (StopIteration(), "StopIteration"),
        (type("Odd", (Exception,), {})("own"), "Odd: own"),
    ],
)
def test_any_exception_of_a_model_is_an_error_with_its_own_as_cause(attack, error, said) -> None:
    with pytest.raises(ModelError, match=said) as raised:
        attack(Around(before=raising(error)), *data())
    assert "[" in str(raised.value).splitlines()[0]  # the shape that it was given
    assert raised.value.__cause__ is error or isinstance(raised.value.__cause__, RuntimeError)  # PEP 479


def test_a_model_with_two_arguments_says_so_and_interruptions_pass() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x

    for attack in (run_deepfool, run_pgd, run_check):
        with pytest.raises(ModelError, match="missing 1 required positional argument: 'y'"):
            attack(Two().eval(), *data())
        for error in (KeyboardInterrupt(), MemoryError(), DataError("mine")):
            with pytest.raises(type(error)):
                attack(Around(before=raising(error)), *data())


def test_errors_in_a_backward_pass_are_the_models_too() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ValueError("no backward")

    for attack in (run_deepfool, run_pgd):
        with pytest.raises(ModelError, match="no backward"):
            attack(Around(before=Broken.apply), *data())


@ATTACKS
@pytest.mark.parametrize("detached", [torch.no_grad(), torch.inference_mode()])
def test_models_without_a_gradient_to_the_images_are_refused(attack, detached) -> None:
    with pytest.raises(ModelError, match="no gradient to the images"):
        attack(Around(before=lambda x: x.detach()), *data())

    class Under(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier()

        def forward(self, images: Tensor) -> Tensor:
            with detached:
                return self.model(images)

    with pytest.raises(ModelError, match="no gradient to the images"):
        attack(Under().eval(), *data())


def test_constant_models_do_not_react() -> None:
    constant = Around(lambda f: 0 * f + torch.arange(4.0))
    with pytest.raises(ModelError, match="does not react"):
        check_model(constant, data()[0])
    assert check_model(constant, data()[0], reacts=False).shape == (9, 4)
    with pytest.raises(ModelError, match="has 4 classes, the data 10"):
        check_model(classifier(), data()[0], 10)
    with pytest.raises(ModelError, match="TwoLogits"):
        check_model(classifier(1), data()[0])


def write(images: Tensor) -> Tensor:
    return images.mul_(2).sub_(1).add_(1).div_(2)


@ALL
@pytest.mark.parametrize(
    ("after", "before"),
    [
        (lambda f: SimpleNamespace(logits=f, hidden_states=None), lambda x: x),
        (lambda f: OrderedDict(loss=None, logits=f), lambda x: x),
        (lambda f: f, write),
    ],
)
def test_output_objects_and_models_that_write_into_their_input_are_taken(attack, after, before) -> None:
    images, labels = data()
    kept = images.clone()
    with torch.no_grad():
        expected = attack(classifier(), images, labels)
    assert torch.allclose(attack(Around(after, before).eval(), images, labels), expected, atol=1e-5)
    assert torch.equal(images, kept)


def as_given(images: Tensor, labels: Tensor) -> list[tuple[Any, Any]]:
    kinds = [torch.int32, torch.int16, torch.uint8, torch.int8]
    return [
        *((images, labels.to(kind)) for kind in kinds),
        (images.numpy(), labels.numpy()),
        (images.numpy().astype(np.float64), labels.numpy().astype(np.uint8)),
        (images.double(), labels),
        (torch.where(images == images.min(), -2.98e-08, images), labels),
        (torch.where(images == images.max(), 1 + 2.4e-07, images), labels),
        (images.requires_grad_(), labels),
        (np.flip(np.flip(images.detach().numpy()).copy()), np.flip(np.flip(labels.numpy()).copy())),  # negative strides
        (images.detach().numpy().astype(">f4"), labels.numpy().astype(">i8")),
        (images.tolist(), labels.tolist()),
    ]


@ATTACKS
@pytest.mark.parametrize("case", range(13))
def test_types_of_images_and_labels_that_people_have_are_taken(attack, case) -> None:
    images, labels = data()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 0.0, 1.0
    expected = attack(classifier(), images, labels)
    found = attack(classifier(), *as_given(images, labels)[case])
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@ATTACKS
def test_boolean_labels_of_two_classes_and_calls_in_inference_mode(attack) -> None:
    model = classifier(2)
    images, labels = data()[0], classifier(2)(data()[0]).argmax(1)
    expected = attack(model, images, labels)
    assert torch.equal(attack(model, images, labels.bool()), expected)
    with torch.inference_mode():
        inside = attack(model, images.clone(), labels.clone())
    assert torch.equal(inside, expected)
    assert torch.equal(attack(model, images[:0], labels[:0]), images[:0])


BAD: list[tuple[Callable[[Tensor, Tensor], tuple[Any, Any]], str]] = [
    (lambda x, y: (x, y - y.min() - 1), "labels reach from -1 to"),
    (lambda x, y: (x, torch.full_like(y, -100)), "labels reach from -100 to -100"),
    (lambda x, y: (x, torch.full_like(y, 4)), "labels reach from 4 to 4\n  why: the model has 4 classes"),
    (lambda x, y: (x, y.float()), "labels are torch.float32"),
    (lambda x, y: (x, y[:3]), r"labels are torch.int64 \[3\] for 9 images"),
    (lambda x, y: (x, y[:, None]), r"labels are torch.int64 \[9, 1\]"),
    (lambda x, y: (x, F.one_hot(y)), r"labels are torch.int64 \[9, \d\]"),
    (lambda x, y: (x * 255, y), "reach from .*\n.*\n.*divide by 255"),
    (lambda x, y: ((x * 255).to(torch.uint8), y), r"images are torch.uint8 .*\n.*\n.*/ 255"),
    (lambda x, y: ((x - 0.5) / 0.25, y), "undo the normalisation"),
    (lambda x, y: (x - 1e-3, y), "images reach from"),
    (lambda x, y: (x * torch.nan, y), "images reach from nan to nan"),
    (lambda x, y: (x[0, 0, 0], y), "images are torch.float32"),
    (lambda x, y: (x.to_sparse(), y), r"images are torch.float32 .*torch\.sparse_coo"),
    (lambda x, y: (None, y), "images or labels are no array of numbers"),
    (lambda x, y: (x, None), "images or labels are no array of numbers"),
    (lambda x, y: (x, np.array([None] * 9)), "images or labels are no array of numbers"),
    (lambda x, y: (x, np.array(list("abcdefghi"))), "images or labels are no array of numbers"),
    (lambda x, y: (x.numpy().astype(object), y), "no array of numbers"),
    (lambda x, y: (x, ["cat"] * 9), "no array of numbers"),
    (lambda x, y: (x, [[0], [1, 2]]), "no array of numbers"),
    (lambda x, y: (x.to("meta"), y), "no array of numbers"),
    (lambda x, y: (torch.nested.as_nested_tensor(x), y), "no array of numbers"),
    (lambda x, y: (x.to(torch.complex64), y), "images are torch.complex64"),
]


@ATTACKS
@pytest.mark.parametrize(("spoil", "said"), BAD)
def test_other_images_and_labels_are_refused_in_the_same_words(attack, spoil, said) -> None:
    images, labels = data()
    images[0, 0, 0, 0] = 0.0
    with pytest.raises(DataError, match=said):
        attack(classifier(), *spoil(images, labels))


def test_the_words_are_the_same_to_the_letter() -> None:
    """Whatever `deepfool` refuses of this file, `pgd` refuses with the same text."""
    images, labels = data()
    images[0, 0, 0, 0] = 0.0
    for spoil, _ in BAD:
        texts = []
        for attack in (run_deepfool, run_pgd):
            with pytest.raises(PumaError) as raised:
                attack(classifier(), *spoil(images, labels))
            texts.append(str(raised.value))
        assert texts[0] == texts[1]


class Counting(nn.Module):
    """Buffers that change with every forward pass: one in place, one replaced, one only in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.model = classifier()
        for name in ("calls", "moving", "trained"):
            self.register_buffer(name, torch.zeros(2))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.moving = self.moving * 0.9 + images.detach().mean()
        if self.training:
            self.trained.add_(1)
        return self.model(images)


@ATTACKS
@pytest.mark.parametrize("training", [True, False])
def test_attacks_leave_every_buffer_as_it_was(attack, training) -> None:
    model = Counting().train(training)
    model.model.eval()
    buffers = dict(model.named_buffers())
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    attack(model, *data())
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer, kept[name])
    spectral = nn.utils.spectral_norm(nn.Linear(12, 4))
    model = nn.Sequential(nn.Flatten(), spectral).train()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    puma.pgd(model.eval(), *data(), threat=LINF, steps=2)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("training", [False, True])
def test_two_logits_of_one_are_the_same_classifier(training) -> None:
    one = classifier(1).train(training)
    for squeezed in (one, nn.Sequential(one, nn.Flatten(0))):
        two = puma.TwoLogits(squeezed)
        images = data()[0]
        assert torch.equal(two(images).argmax(1), (one(images)[:, 0] > 0).long())
        assert torch.allclose(two(images).softmax(1)[:, 1], one(images)[:, 0].sigmoid())
    hit = puma.deepfool(two.eval(), images, two(images).argmax(1), norm="L2")
    assert (hit.status == "crossed").any()


def test_pgd_warns_of_images_without_a_gradient() -> None:
    images, labels = data()
    said: list[str] = []
    saturated = Around(lambda f: f * 1e4).eval()
    for loss, count in (("ce", 9), ("cw", 0)):
        said.clear()
        puma.pgd(saturated, images, labels, threat=LINF, loss=loss, start="none", warn=said.append)
        assert len(said) == (count > 0)
        assert all(f"zero gradient: the loss of {count} of 9" in text for text in said)
    said.clear()
    puma.pgd(saturated, images, labels, threat=LINF, eps=torch.arange(9) % 2 * 0.1, start="none", warn=said.append)
    assert "of 9 attacked" in said[0]
    assert "loss of 4 of" in said[0]  # images of eps 0 need no gradient


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_pgd_never_returns_nan(factor) -> None:
    with pytest.raises(ModelError, match="is NaN"):
        run_pgd(Around(lambda f: f * factor).eval(), *data())
    assert (puma.deepfool(Around(lambda f: f * factor).eval(), *data()).status == "nan").all()

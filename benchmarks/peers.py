"""The other implementations of minimal perturbations, behind one signature: ``attack(model, images, labels)``.

They come with ``make peers``; one that is missing is left out of the benchmark and named.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor, nn

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
PACKAGES = ("foolbox", "adv-lib", "torchattacks", "adversarial-robustness-toolbox", "pyautoattack")


def versions() -> dict[str, str]:
    """What is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _stub_adv_lib_imports() -> None:
    """adv-lib imports torchvision (for LPIPS), visdom (for plots) and distutils (gone from Python 3.12) when loaded.

    DeepFool and SuperDeepFool use none of them, and none is worth installing here: empty modules do.
    """
    for name in ("torchvision", "torchvision.models", "visdom"):
        if name in sys.modules:
            continue
        try:
            importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__path__ = []
            module.Visdom = object
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    try:
        importlib.import_module("distutils.version")
    except ImportError:
        module = types.ModuleType("distutils.version")
        module.LooseVersion = str
        sys.modules["distutils"] = types.ModuleType("distutils")
        sys.modules["distutils.version"] = module


def foolbox_deepfool(norm: str) -> Attack:
    """foolbox 3: defaults (logits, 10 candidates with the label, 50 steps)."""
    import foolbox

    def attack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        method = foolbox.attacks.LinfDeepFoolAttack() if norm == "Linf" else foolbox.attacks.L2DeepFoolAttack()
        return method.run(wrapped, images, foolbox.criteria.Misclassification(labels))

    return attack


def adv_lib_deepfool(norm: str) -> Attack:
    """adversarial-library: 50 steps."""
    _stub_adv_lib_imports()
    from adv_lib.attacks.deepfool import df

    return lambda model, images, labels: df(model, images, labels, steps=50, norm=float("inf") if norm == "Linf" else 2)


def adv_lib_superdeepfool(norm: str) -> Attack:
    """adversarial-library's SuperDeepFool (L2 only): 20 steps of 50 (its defaults are 100 of 100)."""
    if norm != "L2":
        raise ImportError("SuperDeepFool is L2 only")
    _stub_adv_lib_imports()
    from adv_lib.attacks.superdeepfool import sdf

    return lambda model, images, labels: sdf(model, images, labels, steps=20, df_steps=50)


def torchattacks_deepfool(norm: str) -> Attack:
    """torchattacks (L2 only): 50 steps, one image at a time."""
    if norm != "L2":
        raise ImportError("torchattacks' DeepFool is L2 only")
    import torchattacks

    return lambda model, images, labels: torchattacks.DeepFool(model, steps=50)(images, labels)


def art_deepfool(norm: str) -> Attack:
    """ART (L2 only): cut to 10 iterations (its default of 100 takes ten times as long)."""
    if norm != "L2":
        raise ImportError("ART's DeepFool is L2 only")
    from art.attacks.evasion import DeepFool
    from art.estimators.classification import PyTorchClassifier

    def attack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(images.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = DeepFool(classifier, max_iter=10, batch_size=len(images), verbose=False)
            return torch.from_numpy(method.generate(images.numpy().astype(np.float32)))

    return attack


def fab(norm: str) -> Attack:
    """pyautoattack's FAB, 20 iterations: slow and tight, the yardstick of the estimates' ranks."""
    from pyautoattack.fab_pt import FABAttack_PT

    def attack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        method = FABAttack_PT(
            model, norm=norm, n_iter=20, n_restarts=1, eps=1.0 if norm == "Linf" else 10.0, device="cpu"
        )
        return method.attack_single_run(images, labels)

    return attack


PEERS: dict[str, Callable[[str], Attack]] = {
    "foolbox": foolbox_deepfool,
    "adv-lib": adv_lib_deepfool,
    "adv-lib SuperDeepFool": adv_lib_superdeepfool,
    "torchattacks": torchattacks_deepfool,
    "ART": art_deepfool,
    "FAB-20": fab,
}

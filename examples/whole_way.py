"""The whole way in twenty lines: margins, plan, training, AutoAttack, on scikit-learn's digits (a minute).

python examples/whole_way.py [FOLDER]
"""

import sys
from pathlib import Path

import puma
from puma.training.recipe import load_recipe

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/whole-way")
threat = puma.ThreatModel("Linf", eps=0.1)
pool = puma.Pool([puma.load_dataset("digits")])
test = puma.load_dataset("digits:test")
recipe = load_recipe("digits", steps=100)  # a fifth of it: this is an example


def network():
    return puma.build_model("small-cnn", num_classes=10, in_channels=1, image_size=8)


probe = puma.train(network(), pool, threat=threat, recipe=recipe, out=out / "margin-model", seed=1).model
table = puma.score_margins(probe, pool, norm="Linf", out=out / "margins")
plan = puma.make_plan(table, strategy="puma", prune_fraction=0.3, threat=threat)
run = puma.train(network(), pool, threat=threat, plan=plan, recipe=recipe, out=out / "puma-30", seed=0)
result = puma.evaluate(run.model, test, threat, subset=50, out=out / "puma-30")
print(f"kept {plan.kept} of {len(pool)} images, mean eps {plan.mean_eps:.3f}")
print(f"clean {result.clean_accuracy:.1%}, robust {result.robust_accuracy:.1%}")

"""Adversarial training on a plan: recipe, batches, optimiser, loop and the folder of a run."""

"""Adversarial training of one network on one plan."""

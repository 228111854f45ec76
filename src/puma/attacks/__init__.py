"""Attacks as pure functions on tensors: DeepFool (distance to the boundary) and PGD (worst image within eps)."""

"""Networks from [0, 1] pixels to logits, normalisation inside, and their weights on disk."""

"""The perceptron laboratory: a learning task small enough for exact formulas."""

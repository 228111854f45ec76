"""Strategies: rules from margins and other scores to a plan."""

"""Many runs, one comparison: strategies by prune fractions by seeds with one frozen recipe."""

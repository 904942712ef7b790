"""Hypothesis: rules that hold for every input and every schedule."""

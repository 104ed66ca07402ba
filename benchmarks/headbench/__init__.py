"""The LM-head benchmark: one problem, every implementation of it, one way to measure them."""

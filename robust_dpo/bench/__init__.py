"""Benchmarks of the operators: problems, implementations, checks before timing, and one suite for every device."""

"""Calibrated, distributionally robust preference optimisation with fused kernels."""

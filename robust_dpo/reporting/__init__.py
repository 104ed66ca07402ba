"""Run directories: what a training run leaves behind, and the plots and tables made from it."""

from robust_dpo.reporting.run_directory import RunDirectory

__all__ = ["RunDirectory"]

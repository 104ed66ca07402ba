"""The whole pipeline in one command: data → start model → corruption → calibration → two trainings → one table."""

from robust_dpo.demo.pipeline import run_demo
from robust_dpo.demo.settings import DemoSettings

__all__ = ["DemoSettings", "run_demo"]

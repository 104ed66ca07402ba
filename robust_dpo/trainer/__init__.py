"""Training on `transformers.Trainer`."""

from robust_dpo.trainer.config import RobustDPOConfig
from robust_dpo.trainer.trainer import RobustDPOTrainer

__all__ = ["RobustDPOConfig", "RobustDPOTrainer"]

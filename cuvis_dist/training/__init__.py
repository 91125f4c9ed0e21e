"""How do the unfrozen nodes learn on many workers?"""

from cuvis_dist.training.trainer import GradientTrainer

__all__ = ["GradientTrainer"]

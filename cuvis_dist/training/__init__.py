"""How do the unfrozen nodes learn on many workers?"""

from cuvis_dist.training.configuration import check_training
from cuvis_dist.training.trainer import GradientTrainer

__all__ = ["GradientTrainer", "check_training"]

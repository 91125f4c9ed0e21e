"""How is a fitted pipeline calibrated and evaluated on the cluster?"""

from cuvis_dist.evaluation.steps import Evaluator, failed_split

__all__ = ["Evaluator", "failed_split"]

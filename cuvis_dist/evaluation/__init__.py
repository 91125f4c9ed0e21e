"""How is a fitted pipeline calibrated and evaluated on the cluster?"""

from cuvis_dist.evaluation.steps import evaluate, failed_split, post_fit

__all__ = ["evaluate", "failed_split", "post_fit"]

"""How does a pipeline score an archive?"""

from cuvis_dist.scoring.plan import ScorePlan, plan_scores, ports, scores_folder

__all__ = ["ScorePlan", "plan_scores", "ports", "scores_folder"]

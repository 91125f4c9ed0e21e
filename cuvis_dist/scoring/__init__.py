"""How does a saved pipeline score an archive?"""

from cuvis_dist.runs.score import score_archive
from cuvis_dist.scoring.plan import ScorePlan, plan_scores

__all__ = ["ScorePlan", "plan_scores", "score_archive"]

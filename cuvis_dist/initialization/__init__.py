"""How does an archive become frozen buffers?"""

from cuvis_dist.initialization.diagnosis import Finding, diagnose
from cuvis_dist.initialization.passes import PassRecord
from cuvis_dist.initialization.plan import Pass, make_plan, statistical_nodes
from cuvis_dist.initialization.preview import Preview, preview
from cuvis_dist.initialization.trainer import StatisticalTrainer

__all__ = [
    "Finding",
    "Pass",
    "PassRecord",
    "Preview",
    "StatisticalTrainer",
    "diagnose",
    "make_plan",
    "preview",
    "statistical_nodes",
]

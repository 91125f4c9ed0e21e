"""How does work reach workers, and how does it come back?"""

from cuvis_dist.execution import tensors

tensors.register()

"""What does a person see of a run? One page, made from what the run left in its output folder."""

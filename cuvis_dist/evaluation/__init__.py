"""How is a fitted pipeline calibrated and evaluated on the cluster?

Nothing is imported here: a worker loads no more of the folder than what it runs.
"""

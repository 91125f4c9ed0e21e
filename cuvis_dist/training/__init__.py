"""How do the unfrozen nodes learn on many workers?

Nothing is imported here: a worker loads no more of the folder than what it runs.
"""

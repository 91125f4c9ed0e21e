"""How does an archive become frozen buffers?

Nothing is imported here: a worker loads no more of the folder than what it runs.
"""

"""Entry points for ``ray job submit``: thin, one per thing that a person submits."""

"""What is waited for, while nothing else happens?"""

from __future__ import annotations

from loguru import logger


def announce(what: str) -> None:
    """Log what begins now and may take seconds, such as ``starting Ray on this machine``.

    The command shows it as a line (:mod:`cuvis_dist.runs.lines`); in Python it is an INFO of the
    log, marked ``waiting``.
    """
    logger.opt(depth=1).bind(waiting=True).info(what)

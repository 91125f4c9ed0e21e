"""What does a failure that comes out of Ray mean to a person, and which error says so?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from cuvis_ai_core.training.evaluation import TrainingCancelled
from ray.exceptions import (
    ActorDiedError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from cuvis_dist.errors import (
    ClusterError,
    CuvisDistError,
    LostWorkerError,
    one_line,
    own_message,
)
from cuvis_dist.storage import is_out_of_space


@contextmanager
def raise_cause(what: str) -> Iterator[None]:
    """Turn Ray's wrapped errors into the error of ours inside, or into a message.

    What comes out of a Ray task is an error of both classes, whose text is a traceback: that of
    ours inside it is raised instead.

    Raises
    ------
    CuvisDistError
        The first of its kind in the chain of causes, else one that gives the root cause.
    LostWorkerError
        If a worker, node or its memory was lost.
    ClusterError
        If this machine's part of the cluster was.
    """
    try:
        yield
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, TrainingCancelled) and not isinstance(cause, RayTaskError):
                raise cause from None
            if isinstance(cause, CuvisDistError) and not isinstance(cause, RayTaskError):
                plain = own_message(cause)
                if plain is error:
                    raise
                raise plain from None
        if full := out_of_space(error):
            raise full from error
        everything = list(causes(error))
        if any(isinstance(cause, LocalRayletDiedError) for cause in everything):
            raise ClusterError(
                f"{what} lost the Ray cluster: the raylet of this machine was ended. What is done "
                "is kept: start the cluster again, and go on"
            ) from error
        # The others of a group may be the first to notice, by a broken connection.
        lost: list[BaseException] = [c for c in everything if isinstance(c, _LOST)] or [
            cause for cause in everything if _BROKEN_CONNECTION.search(str(cause))
        ]
        if lost:
            raise LostWorkerError(f"{what} lost {_which(error)}{_how(lost[0])}") from error
        raise CuvisDistError(f"{what} failed: {one_line(everything[-1])}") from error


def out_of_space(error: BaseException) -> ClusterError | None:
    """Return an error that says that a disk is full, if that is what ``error`` came from."""
    if isinstance(error, CuvisDistError):
        return None
    for cause in causes(error):
        if is_out_of_space(cause) or isinstance(cause, OutOfDiskError):
            return ClusterError(
                f"a disk is full, of the output folder or a node's temporary one: "
                f"{one_line(cause)}. Make room; the same command then goes on"
            )
    return None


_LOST = (WorkerCrashedError, ActorDiedError, NodeDiedError, OutOfMemoryError)
_BROKEN_CONNECTION = re.compile(
    r"Connection (closed by|reset by) peer|gloo/transport/.*(Broken pipe|Connection refused)"
    r"|NCCL.*(remote process exited|remote error)",
    re.DOTALL,
)


def _which(error: BaseException) -> str:
    """Name the rank of a training worker that died, where it is known."""
    for cause in causes(error):
        failures = getattr(cause, "worker_failures", None) or {}
        ranks = [
            r for r in sorted(failures) if any(isinstance(c, _LOST) for c in causes(failures[r]))
        ]
        if ranks:
            return f"worker {', '.join(map(str, ranks))}"
    return "a worker"


def _how(lost: BaseException) -> str:
    """Return which process was lost, where, and why, as the end of a sentence.

    Ray says it in a paragraph, of which these are the facts.
    """
    said = str(lost)
    found = re.search(r"\bpid[:=] ?(\d+)", said), re.search(r"\bip[:=] ?([\w.]*\w)", said)
    names = [f"{word} {match[1]}" for word, match in zip(_WHERE, found, strict=True) if match]
    where = f" ({' '.join(names)})" if names else ""
    if isinstance(lost, OutOfMemoryError):
        return f"{where}, which Ray ended since its machine ran out of memory: {_MORE}"
    if isinstance(lost, NodeDiedError) or "node has died" in said:
        return f"{where} together with its node"
    if isinstance(lost, _LOST) and "creation task" not in said:
        return f"{where}, which was killed, crashed, or ran out of memory: then {_MORE}"
    if isinstance(lost, _LOST):
        return f"{where}: {one_line(lost)}"
    return ": its connection to the others broke off"


_WHERE = ("process", "on")
_MORE = "give it more, or run fewer workers per machine"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then what caused it, through Ray's wrappers, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        failures = getattr(error, "worker_failures", None) or {}
        for rank in sorted(failures):
            yield from causes(failures[rank])
        # What Ray Train met when it asked a rank whether it lives.
        yield from causes(getattr(error, "health_check_failure", None))
        inner = error.cause if isinstance(error, RayTaskError) else None
        error = inner or error.__cause__ or error.__context__

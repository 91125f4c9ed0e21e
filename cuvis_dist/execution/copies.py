"""How does work in the driver's process get copies of what it uses, as a worker would?"""

from __future__ import annotations

from typing import Any, TypeVar

from ray import cloudpickle

T = TypeVar("T")


def copied(value: T) -> T:
    """Return what a worker would get of ``value``, or fail as it would fail to be sent."""
    return cloudpickle.loads(cloudpickle.dumps(value))


class Snapshot:
    """A value as it is now, of which copies are made later.

    Its own copies are itself, so that those who keep what they took of it can tell.

    Parameters
    ----------
    value : object
        Anything that can be pickled.
    """

    def __init__(self, value: Any) -> None:
        self._content = cloudpickle.dumps(value)

    def take(self) -> Any:
        """Return a copy of the value."""
        return cloudpickle.loads(self._content)

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        return self

"""How do tests write settings? Flat: each name belongs to one part of ``Scaling``."""

from __future__ import annotations

from typing import Any

from cuvis_dist.scaling import Scaling


def nested(**settings: Any) -> dict[str, dict[str, Any]]:
    """Return settings by part: ``nested(workers=2)`` is ``{"resources": {"workers": 2}}``."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        (part,) = (part for part, names in Scaling.known().items() if name in names)
        parts.setdefault(part, {})[name] = value
    return parts


def scaling_of(**settings: Any) -> Scaling:
    """Return these settings, the others as they are by default."""
    return Scaling.model_validate(nested(**settings))

"""How does a recording at a URI come to lie where the SDK and upstream's readers can open it?

Names are loaded when they are first asked for: who looks into a store needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuvis_dist.lazy import found_in

if TYPE_CHECKING:
    from cuvis_dist.staging.cache import Staging
    from cuvis_dist.staging.localizing import cache_of, localize
    from cuvis_dist.staging.opened import fetched_when_opened
    from cuvis_dist.staging.paths import original, staged_files, with_uris
    from cuvis_dist.staging.pickling import portable
    from cuvis_dist.staging.uris import etags, listed

__all__ = [
    "Staging",
    "cache_of",
    "etags",
    "fetched_when_opened",
    "listed",
    "localize",
    "original",
    "portable",
    "staged_files",
    "with_uris",
]

__getattr__ = found_in(
    __name__,
    {
        "Staging": "cache",
        "cache_of": "localizing",
        "etags": "uris",
        "fetched_when_opened": "opened",
        "listed": "uris",
        "localize": "localizing",
        "original": "paths",
        "portable": "pickling",
        "staged_files": "paths",
        "with_uris": "paths",
    },
)

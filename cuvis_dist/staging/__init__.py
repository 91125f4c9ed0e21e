"""How does a recording at a URI come to lie where the SDK and upstream's readers can open it?"""

from cuvis_dist.staging.cache import Staging
from cuvis_dist.staging.datamodules import (
    fetched_when_opened,
    localize,
    original,
    portable,
    staged_files,
    with_uris,
)

__all__ = [
    "Staging",
    "fetched_when_opened",
    "localize",
    "original",
    "portable",
    "staged_files",
    "with_uris",
]

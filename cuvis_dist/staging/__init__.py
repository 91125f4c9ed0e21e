"""How does a recording at a URI come to lie where the SDK and upstream's readers can open it?"""

from cuvis_dist.staging.cache import Staging
from cuvis_dist.staging.localizing import cache_of, localize
from cuvis_dist.staging.opened import fetched_when_opened
from cuvis_dist.staging.paths import original, staged_files, with_uris
from cuvis_dist.staging.pickling import portable
from cuvis_dist.staging.uris import etags, listed, opened

__all__ = [
    "Staging",
    "cache_of",
    "etags",
    "fetched_when_opened",
    "listed",
    "localize",
    "opened",
    "original",
    "portable",
    "staged_files",
    "with_uris",
]

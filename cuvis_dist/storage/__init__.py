"""Where does what a run writes go, and how are places reached that are no local paths?"""

from cuvis_dist.storage.disk import (
    is_out_of_space,
    require_free,
    temporary_folder,
    writing_to,
)
from cuvis_dist.storage.filesystems import Location, filesystem_of, is_uri, location_of, retried
from cuvis_dist.storage.folder import OutputFolder
from cuvis_dist.storage.mirror import Mirror, mirror_of, relocated

__all__ = [
    "Location",
    "Mirror",
    "OutputFolder",
    "filesystem_of",
    "is_out_of_space",
    "is_uri",
    "location_of",
    "mirror_of",
    "relocated",
    "require_free",
    "retried",
    "temporary_folder",
    "writing_to",
]

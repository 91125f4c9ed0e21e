"""Where do files lie that a run writes, or that are no local paths?"""

from cuvis_dist.storage.filesystems import (
    filesystem_of,
    is_out_of_space,
    is_uri,
    retried,
    writing_to,
)
from cuvis_dist.storage.mirror import Mirror, relocated
from cuvis_dist.storage.output import Location, OutputFolder, location_of, temporary_folder

__all__ = [
    "Location",
    "Mirror",
    "OutputFolder",
    "filesystem_of",
    "is_out_of_space",
    "is_uri",
    "location_of",
    "relocated",
    "retried",
    "temporary_folder",
    "writing_to",
]

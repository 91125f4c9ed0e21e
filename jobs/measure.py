"""Submit the filling of a store: ``python -m jobs.measure TRAINRUN --store S [options]``.

Takes the options of ``cuvis-dist measure``, leaves ``result.json`` in the output folder, and ends
with the same exit code. The same command again measures only what the store lacks.
"""

import sys

from cuvis_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["measure", *sys.argv[1:]]))

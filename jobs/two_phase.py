"""Submit both phases of a trainrun: ``python -m jobs.two_phase TRAINRUN [options]``.

Takes the options of ``cuvis-dist run`` (``--dry-run`` prints the plan and what it would ask the
cluster for), leaves ``result.json`` in the output folder and ends with the same exit code.
"""

import sys

from cuvis_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

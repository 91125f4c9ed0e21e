"""Submit both phases of a trainrun: ``python -m jobs.two_phase TRAINRUN [options]``.

Takes the options of ``cuvis-dist run`` and ends with its exit code.
"""

import sys

from cuvis_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

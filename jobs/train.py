"""Submit phase 2 of a trainrun: ``python -m jobs.train TRAINRUN [--initialization FILE]``.

Takes the options of ``cuvis-dist train``, begins with what :mod:`jobs.initialize` left, leaves
``result.json`` in the output folder and ends with the same exit code.
"""

import sys

from cuvis_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

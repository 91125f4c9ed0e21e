"""Submit the scoring of an archive: ``python -m jobs.score PIPELINE --data TRAINRUN``.

Takes the options of ``cuvis-dist score``, leaves a file of score maps and decisions for each frame
and ``result.json`` in the output folder, and ends with the same exit code. The same command again
computes only what is missing.
"""

import sys

from cuvis_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))

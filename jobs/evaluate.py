"""Submit an evaluation: ``python -m jobs.evaluate PIPELINE --data TRAINRUN --split test``.

Takes the options of ``cuvis-dist evaluate``, leaves the metrics of a saved pipeline in
``result.json`` in the output folder and ends with the same exit code.
"""

import sys

from cuvis_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

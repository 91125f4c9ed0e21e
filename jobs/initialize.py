"""Submit phase 1 of a trainrun: ``python -m jobs.initialize TRAINRUN [options]``.

Takes the options of ``cuvis-dist init``, leaves ``<pipeline>_initialized.yaml`` with ``.pt`` and
``.json``, its card, and ``result.json`` in the output folder, and ends with the same exit code.
"""

import sys

from cuvis_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["init", *sys.argv[1:]]))

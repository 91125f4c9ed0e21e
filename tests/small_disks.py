"""How does a test run a command whose disk is small, or can be made read-only while it runs?

In a namespace of its own, where a user may mount what nobody else sees.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def on_small_disk(
    folder: Path, size: str, command: Sequence[object], then: str = "true"
) -> list[str]:
    """Return the command that runs another with a disk of a size mounted on a folder.

    ``then`` is run after it, as the disk is gone when both have ended. It skips the test where
    namespaces are not allowed.
    """
    script = f"mount -t tmpfs -o size={size} none {shlex.quote(str(folder))}"
    mounting = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    tried = subprocess.run([*mounting, script], capture_output=True)
    if tried.returncode:
        pytest.skip(f"no disk can be mounted here: {tried.stderr.decode()}")
    return [*mounting, f"{script} && {shlex.join(map(str, command))}; code=$?; {then}; exit $code"]

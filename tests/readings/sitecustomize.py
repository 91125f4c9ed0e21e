"""Which frame files does this process open? Each is a line of a log, and takes a moment.

Python imports this file when it starts, where its folder is on the path; a process without the
variable that names the log is left alone. Another variable names files, with commas between
them, that this process cannot see, as if they lay on other machines. The tests set them by
``readings.counting``.
"""

import os
import sys
import time

_log = os.environ.get("CUVIS_DIST_READINGS")
_seconds = float(os.environ.get("CUVIS_DIST_READING_SECONDS", "0.1"))
_absent = os.environ.get("CUVIS_DIST_ABSENT", "").split(",")


def _note(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".npz"):
        name = os.path.basename(arguments[0])
        file = os.open(_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{name}\n".encode())
        os.close(file)
        time.sleep(_seconds)
        if name in _absent:
            raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))


if _log:
    sys.addaudithook(_note)

"""Where the Python processes that a command starts find their packages."""

import os
import sys


def same_packages() -> dict[str, str]:
    """Return the environment variables by which `python -m` finds this process's packages, and no others.

    Without them, it would first look in the working directory, which may be anyone's: a `tqdm.py` there would run.
    """
    return {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path), "PYTHONSAFEPATH": "1"}

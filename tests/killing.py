"""Run something in a child that kills itself before its n-th file operation.

The child is a fork of a process that has imported everything, with the one thread that it has.
"""

import os
import signal
import sys

OPERATIONS = ("fsync", "replace", "rename", "open", "unlink", "rmdir", "mkdir")
KILLED, FAILED, REFUSED = -signal.SIGKILL, 1, 3


def run(work, kill_at=0):
    """Exit code of a child that calls `work`: 0, KILLED, REFUSED if its place is taken, FAILED."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = kill_at

    def trap(real):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, trap(getattr(os, name)))
    try:
        work()
    except ValueError as error:
        if "exists already" in str(error):
            os._exit(REFUSED)
        sys.excepthook(*sys.exc_info())
        os._exit(FAILED)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(FAILED)
    os._exit(0)

"""Run by a fresh interpreter between the supervisor and a child: `launch.py PARENT_PID FILES ARGV...`.

It asks the kernel to send SIGKILL to this process when its parent is gone, then becomes the child by exec: same
process id, no process in between. This is a file of its own and not a `preexec_fn`, because Python code between fork
and exec may deadlock in a program with threads. It imports nothing but the standard library, and little of that: it is
run with `-I -S`, 20 ms on a small machine.

The kernel forgets the request when a program changes its user (see prctl(2), PR_SET_PDEATHSIG), so children must not.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
FAILED = 127


def main() -> None:
    """Become `ARGV`, bound to the life of the parent. FILES: open files allowed, 0 for what is allowed now."""
    parent, files, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have died before the request was made; then there is nobody left to be killed by.
        if os.getppid() != parent:
            os._exit(FAILED)
    if files:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = files if most == resource.RLIM_INFINITY else min(files, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    # Python ignores SIGPIPE and a child would inherit that; every program expects to start with the usual answer.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"cannot run {argv[0]}: {error}\n")
        sys.stderr.flush()
        os._exit(FAILED)


if __name__ == "__main__":
    main()

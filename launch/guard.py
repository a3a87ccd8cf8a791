"""Ends the child processes of a launcher that is gone, however it went.

Runs as a process of its own. Its standard input is a pipe that the launcher holds open. A
line `123` adds the process group 123, a line `-123` takes it off. When the pipe closes, the
launcher has ended, even if by SIGKILL: the groups that are left are killed and the
launcher's folder is removed.
"""

import contextlib
import os
import select
import shutil
import signal
import sys


def kill_group(group: int) -> None:
    """Kill a process group and wait until its leader is dead."""
    try:
        leader = os.pidfd_open(group)
    except ProcessLookupError:
        leader = None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    if leader is not None:
        # A pidfd becomes readable when its process ends; waitpid works for parents only.
        select.select([leader], [], [], 5.0)
        os.close(leader)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        number = int(line)
        if number > 0:
            groups.add(number)
        else:
            groups.discard(-number)
    for group in groups:
        kill_group(group)
    shutil.rmtree(sys.argv[1])


if __name__ == "__main__":
    main()

"""The launcher's process: `python -m launch chapter1`; see `launch.launcher`."""

import signal
import sys

if __name__ == "__main__":
    # Until the launcher has children to stop, a Ctrl-C just ends it, as it would any program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launch.launcher import main

    sys.exit(main())

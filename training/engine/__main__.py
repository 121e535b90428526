"""``python -m training.engine --fd N --recorder N --parent PID``: the engine process.

Started by the server.
"""

from __future__ import annotations

import argparse
import sys

from training.engine.process import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m training.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="our end of the server's socket pair")
    parser.add_argument("--recorder", type=int, required=True, help="memory for what we work on")
    parser.add_argument("--parent", type=int, required=True, help="process id of the server")
    arguments = parser.parse_args()
    sys.exit(main(arguments.fd, arguments.recorder, arguments.parent))

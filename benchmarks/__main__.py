"""``python -m benchmarks ...``: the same as ``torchdsc bench ...``."""

import sys

from torchdsc.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))

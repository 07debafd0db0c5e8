"""``python -m torchdsc``."""

import sys

from .cli.main import main

sys.exit(main())

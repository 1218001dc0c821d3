"""``python -m pyfastpeft.cli``."""

import sys

from . import main

sys.exit(main())

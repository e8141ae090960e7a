"""python -m hkdfast is the command hkdfast."""

import sys

from .cli import main

sys.exit(main())

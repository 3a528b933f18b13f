"""`python -m internvl_rt` is `internvl-rt`."""

import sys

from internvl_rt.cli import main

sys.exit(main())

"""Whether two versions of this repository give the same answers, byte for byte, on many mixed requests."""

import sys
from pathlib import Path

# pytest has tests/support on its path; so has this script, wherever it is started.
sys.path.append(str(Path(__file__).parents[2] / "support"))

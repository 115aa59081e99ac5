"""Let every test import `decoders` and `broken_decoders`, whatever folder it is in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

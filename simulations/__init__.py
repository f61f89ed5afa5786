"""Virtual hospitals."""

import common as _common  # noqa: F401 (before Flower: nothing reaches outside)

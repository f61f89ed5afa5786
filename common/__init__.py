"""What both sides must agree on. Importing any room keeps Flower from reaching outside, before Flower is imported."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # Flower reads it once, on its own first import
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

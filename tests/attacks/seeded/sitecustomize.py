"""Loaded first by every Python process of a test that puts this folder on PYTHONPATH: seeds every common generator."""

import random

import numpy as np
import torch

random.seed(0)
np.random.seed(0)
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)

"""One thread: models of a few thousand weights only lose time to more."""

import torch

torch.set_num_threads(1)

"""Settings for all tests."""

import torch

# The tensors are tiny: waking a second thread costs more than it computes.
torch.set_num_threads(1)

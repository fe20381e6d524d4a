"""Without a CUDA device, Triton kernels run in its interpreter: the variable is set before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

"""Without a CUDA device, Triton kernels run in its interpreter: the variable is set before triton is imported."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # for kernel_packs

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

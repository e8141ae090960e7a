import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before a backend is loaded

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it a deterministic mode has no products on CUDA

# torch.empty comes filled with NaN: an output element that a kernel forgot to write fails its test.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before a backend is loaded

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it a deterministic mode has no products on CUDA

# torch.empty comes filled with NaN: an output element that a kernel forgot to write fails its test.
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Triton's interpreter is slow: its tests count as slow where no GPU compiles the kernels."""
    for item in items:
        _, _, parameters = item.nodeid.partition("[")
        if os.environ.get("TRITON_INTERPRET") and (item.path.name == "test_triton.py" or "triton" in parameters):
            item.add_marker(pytest.mark.slow)

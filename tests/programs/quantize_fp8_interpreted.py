"""The FP8 quantizers in Triton's interpreter: runs each on poisoned outputs, and writes what they wrote.

Arguments: a file with a dict of `test_quantize_fp8.Call`, and the file to write.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Triton reads it when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_quantize_fp8 import run_kernel


def main() -> None:
    torch.set_num_threads(1)
    calls = torch.load(sys.argv[1], weights_only=False)
    # numpy warns of what the kernels count on, such as infinities.
    with np.errstate(all="ignore"):
        results = {name: run_kernel(call, native=False) for name, call in calls.items()}
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()

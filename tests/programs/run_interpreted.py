"""Kernels in Triton's interpreter: reads calls, runs each on poisoned outputs, writes what they wrote.

Arguments: a test module that has `run_interpreted`, a file with a dict of its calls, and the file to write.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

# Triton reads it when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    torch.set_num_threads(1)
    module = importlib.import_module(sys.argv[1])
    calls = torch.load(sys.argv[2], weights_only=False)
    # numpy warns of what the kernels count on, such as infinities.
    with np.errstate(all="ignore"):
        results = {name: module.run_interpreted(call) for name, call in calls.items()}
    torch.save(results, sys.argv[3])


if __name__ == "__main__":
    main()

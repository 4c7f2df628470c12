"""One rank of test_mpirun: exchanges through whatever launched it, compares with the oracle, prints ok."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import cases

from qcomm import bootstrap


def main() -> None:
    torch.set_num_threads(1)
    want_launcher, want_ranks = sys.argv[1], int(sys.argv[2])
    with bootstrap.process_group(use_cuda=False) as launch:
        assert (launch.launcher, launch.num_ranks) == (want_launcher, want_ranks), launch
        todo = [cases.Case(combine_wire=cases.FP8, static=static) for static in (False, True)]
        problems = cases.run_cases(launch.rank, launch.num_ranks, "cpu", "collective", todo)
        assert not problems, problems
        print(f"rank {launch.rank} (local {launch.local_rank}) of {launch.num_ranks}: ok", flush=True)


if __name__ == "__main__":
    main()

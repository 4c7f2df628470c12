"""What this machine has: `python tools/machine.py ranks | extras`, read by the Makefile."""

import ctypes
import sys

CPU_RANKS = 4


def gpu_count() -> int:
    """Counts the GPUs the driver shows, CUDA_VISIBLE_DEVICES obeyed.

    Asks libcuda itself, because torch is not installed yet when this is first needed.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def main() -> None:
    answers = {
        "ranks": str(gpu_count() or CPU_RANKS),
        "extras": "dev,cuda" if gpu_count() else "dev",
    }
    if len(sys.argv) != 2 or sys.argv[1] not in answers:
        raise SystemExit(f"usage: {sys.argv[0]} {' | '.join(answers)}")
    print(answers[sys.argv[1]])


if __name__ == "__main__":
    main()

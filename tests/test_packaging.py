"""The wheel, built by way of the sdist, installed outside the repository and used from there."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
KERNEL_SUFFIXES = {".cu", ".cuh"}

IMPORT_PROBE = """
import json, os, sys
import torch
modules, environ = set(sys.modules), dict(os.environ)
import qcomm
print(json.dumps({
    "file": qcomm.__file__,
    "version": qcomm.__version__,
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
    "cuda_initialized": torch.cuda.is_initialized(),
    "environ_kept": dict(os.environ) == environ,
}))
"""
KERNELS_PROBE = """
import qcomm.jit
print(qcomm.jit.kernels_dir())
"""


def kernel_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in KERNEL_SUFFIXES}


def run(args: Sequence[str], cwd: Path = REPO, env: Mapping[str, str] | None = None) -> str:
    result = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{args} exited {result.returncode}:\n{result.stdout}{result.stderr}"
    return result.stdout


class Installed:
    """An installed wheel in a folder that holds nothing else."""

    def __init__(self, site: Path, cwd: Path) -> None:
        self.site = site
        self.cwd = cwd

    def run(self, *args: str) -> str:
        # PYTHONPATH comes before the path of an editable install, and cwd is outside the repository.
        return run(args, cwd=self.cwd, env={**os.environ, "PYTHONPATH": str(self.site)})


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    work = tmp_path_factory.mktemp("packaging")
    # Without --wheel, build makes the wheel from the sdist: both are tested at once.
    run(["-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(REPO)])
    (wheel,) = (work / "dist").glob("*.whl")
    site, cwd = work / "site", work / "cwd"
    cwd.mkdir()
    run(["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)])
    return Installed(site, cwd)


def test_import_leaves_the_process_alone(installed: Installed) -> None:
    probe = json.loads(installed.run("-c", IMPORT_PROBE))
    assert Path(probe["file"]).is_relative_to(installed.site)
    assert set(probe["modules"]).isdisjoint({"cupy", "mpi4py", "nvshmem", "transformers", "triton"})
    assert not probe["cuda_initialized"]
    assert probe["environ_kept"]
    assert list(installed.site.glob(f"qcomm-{probe['version']}.dist-info"))


def test_kernels_are_found(installed: Installed) -> None:
    folder = Path(installed.run("-c", KERNELS_PROBE).strip())
    assert folder.is_relative_to(installed.site)
    assert kernel_names(folder) == kernel_names(REPO / "kernels")


def test_contents(installed: Installed) -> None:
    package = installed.site / "qcomm"
    assert (package / "py.typed").is_file()
    assert (package / "tuning.json").read_text() == (REPO / "qcomm" / "tuning.json").read_text()
    for folder in ("kernels", "benchmarks"):
        shipped = {path.name for path in (package / folder).glob("*.py")}
        assert shipped == {path.name for path in (REPO / folder).glob("*.py")}
    # Nothing may land beside the package, where it would collide with other distributions.
    top_level = {path.name for path in installed.site.iterdir()}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"qcomm"}


def test_info_command(installed: Installed) -> None:
    assert installed.run("-m", "qcomm", "info")

"""The command line and the folders it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcomm import cli, resources
from qcomm.errors import QcommError
from qcomm.table import format_table

REPO = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, sys
import helper
print(json.dumps([__name__, sys.argv, helper.VALUE]))
"""


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder as in site-packages, with two benchmarks."""
    package = tmp_path / "site" / "qcomm"
    folder = package / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "bench_codec.py").write_text(SCRIPT)
    for name in ("tune", "simulate"):
        (folder / f"{name}.py").write_text(SCRIPT)
    (folder / "bench_fails.py").write_text("raise SystemExit(3)")
    (folder / "helper.py").write_text("VALUE = 7")
    monkeypatch.setattr(resources, "_PACKAGE", package)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return package


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 2
    assert "info" in capsys.readouterr().err


def test_bench_runs_a_script_as_python_does(installation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "codec", "--rows", "5", "-v"]) == 0
    script = str(installation / "benchmarks" / "bench_codec.py")
    assert capsys.readouterr().out.strip() == f'["__main__", ["{script}", "--rows", "5", "-v"], 7]'


def test_bench_passes_the_scripts_exit_code_on(installation: Path) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", "fails"])
    assert exit_.value.code == 3


def test_bench_without_a_name_lists(installation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == "bench needs a NAME; there are: codec, fails\n"


def test_bench_unknown_name_lists(installation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "nosuch"]) == 2
    error = capsys.readouterr().err
    assert "got 'nosuch'" in error
    assert "codec, fails" in error


def test_bench_without_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "qcomm")
    for arguments in (["bench", "codec"], ["tune"], ["simulate"]):
        assert cli.main(arguments) == 2
        assert str(tmp_path / "benchmarks") in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tune", "simulate"])
def test_a_script_gets_every_argument(name: str, installation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "a", "-h", "--help", "--wire", "x,y", "b", "--tokens=5"]
    assert cli.main([name, *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == [
        "__main__",
        [str(installation / f"benchmarks/{name}.py"), *arguments],
        7,
    ]


def test_other_commands_take_no_unknown_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["info", "--jsonl"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: --jsonl" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for command in ("info", "demo", "trace", "bench", "tune", "simulate"):
        assert f"\n    {command} " in shown


def test_find_prefers_the_package(installation: Path) -> None:
    beside = installation.parent / "benchmarks"
    beside.mkdir()
    (installation.parent / "pyproject.toml").touch()
    assert resources.find("benchmarks") == installation / "benchmarks"
    (installation.parent / "kernels").mkdir()
    assert resources.find("kernels") == installation.parent / "kernels"


def test_find_takes_nothing_beside_an_installed_package(installation: Path) -> None:
    beside = installation.parent / "kernels"
    beside.mkdir()
    with pytest.raises(QcommError) as error:
        resources.find("kernels")
    assert str(beside) in str(error.value)
    assert str(installation / "kernels") in str(error.value)
    assert resources.checkout() is None


def test_find_in_this_checkout() -> None:
    assert resources.find("tests") == REPO / "tests"
    assert resources.checkout() == REPO


def test_info_imports_no_sub_command_but_its_own() -> None:
    probe = (
        "import sys; from qcomm.cli import main; main(['info', '--json']); print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for module in ("'qcomm.demo'", "'qcomm.moe'", "'mpi4py.MPI'", "'nvshmem'", "'cupy'"):
        assert module not in done.stderr


def test_table() -> None:
    table = format_table(("name", "bytes"), [("a", "1,024"), ("longer", "8")])
    assert table.splitlines() == ["name    bytes", "------  -----", "a       1,024", "longer      8"]
    assert format_table(("a", "b"), []).splitlines() == ["a  b", "-  -"]
    with pytest.raises(ValueError, match="rows must have 2 cells like the headers"):
        format_table(("a", "b"), [("x",)])

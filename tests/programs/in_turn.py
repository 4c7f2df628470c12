"""qcomm's command line, again and again in one process, which imports torch once.

Reads a JSON list of arguments a line, and writes a line with the exit code, what went to stdout and what to stderr.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import traceback


def run(arguments: list[str]) -> tuple[int, str, str]:
    """Do what `python -m qcomm` with these arguments does."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["qcomm", *arguments]
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module("qcomm", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except Exception:
            traceback.print_exc()
            code = 1
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)

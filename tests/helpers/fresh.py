"""Code in a new process that has imported torch and nothing else: forked from one that waits, so that the import, which
takes longer than most tests, is paid for once."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

# Reads requests, a JSON text a line; forks for each; answers with the exit code.
SERVER = """
import atexit, json, os, sys, threading, traceback
import torch

def run(request):
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv, code = ["-c", *request["arguments"]], 0
    try:
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def server() -> subprocess.Popen:
    command = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(_close, process)
    assert process.stdout.readline() == "ready\n"
    return process


def _close(process):
    process.kill()
    for pipe in (process.stdin, process.stdout):
        pipe.close()
    process.wait()


def fresh(code: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    """As subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=check), except
    that what torch imports is there already, and that PYTHONPATH is that of the first call."""
    process = server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        out.touch(), err.touch()
        request = dict(code=code, arguments=[str(a) for a in arguments], out=str(out), err=str(err))
        try:
            process.stdin.write(json.dumps(request | dict(environment=dict(os.environ), folder=os.getcwd())) + "\n")
            process.stdin.flush()
            returned = int(process.stdout.readline())
        except BaseException:  # interrupted, or the server is dead: its next answer would be to this request
            server.cache_clear()
            process.kill()
            raise
        result = subprocess.CompletedProcess(["-c", code], returned, out.read_text(), err.read_text())
    assert returned == 0 or not check, f"exit code {returned}: {result.stdout}{result.stderr}"
    return result

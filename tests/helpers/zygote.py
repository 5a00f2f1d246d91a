"""A process that has imported everything and computed nothing; it forks what would be slow to start.

`python -m helpers.zygote SOCKET` reads a line of JSON for each start from the socket with that number. It
answers {"pid": ...}, and {"pid": ..., "code": ...} when the process has ended.
"""

import atexit
import ctypes
import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import sys
import threading
import traceback

import numpy as np
import torch
from helpers.runs import import_all

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def redirect(start: dict) -> None:
    """Open the files of the standard streams; sys.stdin, sys.stdout and sys.stderr stay as they are."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, name, mode in ((0, "stdin", os.O_RDONLY), (1, "stdout", append), (2, "stderr", append)):
        opened = os.open(start[name], mode | os.O_NOCTTY)
        os.dup2(opened, number)
        os.close(opened)


def prepare(start: dict, parent: int) -> None:
    """Make this process what a new interpreter would be, as far as a test can see."""
    os.setsid()  # as torchrun's ranks: a signal to the tests' group does not reach it
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a test run that dies leaves nothing
    if os.getppid() != parent:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    redirect(start)
    os.environ.clear()
    os.environ.update(start["env"])
    os.chdir(start["cwd"])
    if start["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (start["file_size"], start["file_size"]))
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does at a start
    np.random.seed()  # the module random does so by itself


def run_script(argv: list[str]) -> None:
    """Run `-c CODE`, `-m MODULE` or a script as `__main__`, with the arguments after it."""
    kind = argv[0]
    sys.argv = argv if kind not in ("-c", "-m") else [kind, *argv[2:]]
    folders = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = folders
    if kind == "-c":
        sys.path.insert(0, os.getcwd())
        exec(compile(argv[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif kind == "-m":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


def exit_code(argv: list[str]) -> int:
    """Run the script and return the code with which an interpreter would exit."""
    try:
        run_script(argv)
    except SystemExit as error:
        if error.code is None:
            return 0
        if isinstance(error.code, int):
            return error.code
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_child(start: dict, parent: int) -> None:
    """Run the script to the end of the process. What is not Python's is not destroyed: that takes long."""
    code = 1
    try:
        prepare(start, parent)
        code = exit_code(start["argv"])
        threading._shutdown()  # waits for threads, and ends the executors'
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def end_of_children() -> list[dict]:
    """Return what is to be said of the children that have ended since the last call."""
    ends = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ends
        if not pid:
            return ends
        ends.append({"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def serve(channel: socket.socket) -> None:
    """Fork a child for each line that comes, until the other side closes its end."""
    signal_read, signal_write = os.pipe()
    os.set_blocking(signal_read, False)
    os.set_blocking(signal_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close the socket
    signal.set_wakeup_fd(signal_write)
    lines = channel.makefile("rb")
    parent = os.getpid()
    while True:
        ready, _, _ = select.select([channel, signal_read], [], [])
        answers = []
        if signal_read in ready:
            os.read(signal_read, 4096)
            answers = end_of_children()
        if channel in ready:
            line = lines.readline()
            if not line:
                return
            pid = os.fork()
            if pid == 0:
                lines.close()
                channel.close()
                run_child(json.loads(line), parent)
            answers.append({"pid": pid})
        for answer in answers:
            channel.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    import_all()
    gc.collect()
    gc.freeze()  # children then copy no page only to count references
    serve(socket.socket(fileno=int(sys.argv[1])))

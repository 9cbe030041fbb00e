"""
Starting, watching and killing the programs of faults.py.
"""
import contextlib
import os
import pathlib
import re
import runpy
import signal
import sys
import time
import traceback

from programs import REPO


def start(args, log, on_command_line=False):
    """Starts `python ARGS` in the repository, in a session of its own, output to `log`. Returns the pid.

    on_command_line: an interpreter of its own; else a fork of this process, with the script as __main__.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir(REPO)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if on_command_line:
            os.execv(sys.executable, [sys.executable, *args])
        if args[0] == "-m":
            sys.argv = args[1:]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = args
            runpy.run_path(args[0], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except KeyboardInterrupt:  # before the script handles it
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def wait(pid, seconds, until=None):
    """The exit status of a child, as subprocess has it. None where it lives on after so many seconds, or when
    until() is true."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        left = deadline - time.monotonic()
        if left <= 0 or (until and until()):
            return None
        time.sleep(min(0.0002 if until else 0.002, left))


def living():
    """{pid: its parent's pid} of all processes that have not ended."""
    parents = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone by now
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(path.parent.name)] = int(parent)
    return parents


def family(pid):
    """pids of a process and of all that it has started, itself first."""
    parents = living()
    found = [pid]
    for parent in found:  # grows while it is read
        found += [child for child in parents if parents[child] == parent]
    return found


def still_alive(pids, seconds=20):
    """Those of these processes that have not ended after so many seconds."""
    deadline = time.monotonic() + seconds
    while pids and time.monotonic() < deadline:
        pids = sorted(living().keys() & set(pids))
        time.sleep(0.01)
    return pids


def kill(pids, signum=signal.SIGKILL):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def is_saving(folder):
    """Whether a file is being written that is to replace another (nanorank.files.write_atomic)."""
    for _, _, names in os.walk(folder):
        if any(re.search(r"\.tmp\d+$", name) for name in names):
            return True
    return False


def fill_disk(path, keep):
    """Fills the disk that `path` is on, all but `keep` bytes."""
    with open(path, "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            file.truncate(max(0, file.tell() - keep))

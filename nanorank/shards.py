"""
What the scripts that prepare data share: work handed out to processes and taken back in order, one process a folder, bad records.

Both read the same chunks in the same order every time and append what comes of them, so a restart goes on behind a chunk's number.
No settings, nothing at import.
"""
import contextlib
import errno
import fcntl
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from nanorank.errors import UserError

NAMED = 5  # bad records named, per reason

# ------------------------------------------------------------------------------------------------------------ processes

def run_in_order(work, jobs, take, save, stop, workers, most_bytes):
    """take(work(item), *place) for each (size, item, place) of `jobs`, in order; work runs in other processes. True: to the end.

    In flight are at most 2 jobs a worker and 4 more, and `most_bytes` (for each of these) by their `size`. After a signal
    (`stop`, a common.StopSignal) nothing new is handed out: False. save() comes last: when everything is taken that was handed
    out, also where `jobs` raised, which is raised again after it; but not where work or take did, for then some is amiss.
    work: a pure function that pickles. workers: processes; 0: one per core. A killed worker ends the script with status 1.
    """
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    most, in_flight, pending, jobs, broken = 2 * workers + 4, 0, deque(), iter(jobs), None
    # fork: workers share what is imported and loaded; no thread of ours runs yet
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
            while True:
                try:
                    job = None if stop.signal else next(jobs, None)
                except Exception as error:  # a file turned out to be damaged: what came before it counts
                    job, broken = None, error
                while pending and (job is None or len(pending) >= most or in_flight + job[0] > most * most_bytes):
                    size, future, place = pending.popleft()
                    take(future.result(), *place)
                    in_flight -= size
                if job is None:
                    break
                size, item, place = job
                pending.append((size, pool.submit(work, item), place))
                in_flight += size
    except BrokenProcessPool:
        time.sleep(0.5)  # who kills workers may mean this process too: a scheduler that signals every one
        if stop.signal:
            return False
        script = os.path.basename(sys.argv[0])
        print(f"{script}: a worker was killed (out of memory? lower --workers); the same command goes on", file=sys.stderr)
        raise SystemExit(1) from None
    save()
    if broken:
        raise broken
    return not stop.signal


def start_worker():
    """Leaves Ctrl-C and signals to the group to the parent, and ends when that is gone, however it went."""
    gc.freeze()  # what is shared with the parent stays shared
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def only_process(path, what="this data set"):
    """Holds a lock file. The kernel lets go of it however this process ends; forked workers do not inherit it."""
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
                raise UserError(f"another process is at work on {what} ({path} is locked)") from None
        yield

# ------------------------------------------------------------------------------------------------------ files and checks

def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete {os.path.dirname(path)} to begin anew") from None


def check_range(settings, **least):
    """Raises UserError for a setting below its least value, and for a --dataset that is no plain name."""
    for name, value in least.items():
        if settings[name] < value:
            raise UserError(f"--{name}={settings[name]}: expects {value} or more")
    dataset = settings["dataset"]
    if dataset != os.path.basename(dataset) or dataset in ("", ".", ".."):
        raise UserError(f"--dataset={dataset}: expects a plain name; --data_dir says where its folder lies")


def refuse_other(folder, theirs, ours):
    """Raises UserError that names the first setting in which a folder begun earlier differs from this run."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            flag = name if " " in name else f"--{name}"
            raise UserError(f"{folder} was made with {flag}={theirs.get(name)}, not {value}: take another --dataset or delete it")


def check_size(path, size, fix):
    """Raises UserError where a file that was written does not hold `size` bytes; fix: what to do about it."""
    if not os.path.exists(path) or os.path.getsize(path) != size:
        raise UserError(f"{path} is missing or not as long as it was: {fix}")


def reopen(path, size, record):
    """A file to append to behind its first `size` bytes; `record`, the file that says so, is the truth, so what came later is cut."""
    if not os.path.exists(path) or os.path.getsize(path) < size:
        raise UserError(f"{path} is missing or shorter than {record} says: delete {os.path.dirname(path)} to begin anew")
    file = open(path, "r+b")
    file.truncate(size)
    file.seek(size)
    return file

# ----------------------------------------------------------------------------------------------------------- bad records

def add_bad(bad, reason, count, places):
    """Counts bad records in `bad`, {reason: {"count": n, "first": [places of the first few]}}."""
    entry = bad.setdefault(reason, {"count": 0, "first": []})
    entry["count"] += count
    entry["first"] = (entry["first"] + [place.encode("utf-8", "backslashreplace").decode() for place in places])[:NAMED]


def bad_line(bad, what="records"):
    return f"bad {what}, left out: " + "; ".join(
        f"{entry['count']:,} {reason} ({', '.join(entry['first'])}{', ...' * (entry['count'] > len(entry['first']))})"
        for reason, entry in bad.items())

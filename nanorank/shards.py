"""
The parts that both prepare scripts share: ordered work on all cores, files that survive a kill, checks.

    finished = run_in_order(work, jobs, take, save, stop, workers, most_bytes)

The scripts read the same chunks in the same order every time and append the results in that order. A restart
therefore needs only the number of the last chunk that is safely written.
"""
import contextlib
import gc
import glob
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from nanorank.errors import UserError
from nanorank.files import lock_file, save_json, writing

SPLITS = ("train", "val", "test")
NAMED = 5  # bad records named, per reason

# -----------------------------------------------------------------------------
# work on all cores

def run_in_order(work, jobs, take, save, stop, workers, most_bytes):
    """Calls take(work(item), *place) for each (size, item, place) of `jobs`, in order. True if all are done.

    work runs in other processes and is a pure function that pickles. `jobs`, take and save run here.
    stop: a StopSignal. After a signal no new job is handed out, and the result is False.
    workers: processes, 0 for one per core. At most n = 2 * workers + 4 jobs are in flight, of at most
    n * most_bytes bytes by their `size`.

    save() is called at the end. If reading `jobs` fails, the results in flight are taken and saved before the
    error is raised again. If work or take fails, nothing is saved. A killed worker ends the script, status 1.
    """
    workers = workers or n_cores()
    most_jobs = 2 * workers + 4
    pending = deque()  # (size, future, place), the oldest first
    in_flight = 0      # bytes
    jobs = iter(jobs)
    read_error = None

    def next_job():
        nonlocal read_error
        if stop.signal:
            return None
        try:
            return next(jobs, None)
        except Exception as error:  # the input is damaged; what came before it counts
            read_error = error
            return None

    # fork: workers share what is imported and loaded; no thread of ours runs yet
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
            job = next_job()
            while job or pending:
                full = len(pending) >= most_jobs or job and in_flight + job[0] > most_jobs * most_bytes
                if pending and (full or not job):
                    size, future, place = pending.popleft()
                    take(future.result(), *place)
                    in_flight -= size
                else:
                    size, item, place = job
                    pending.append((size, pool.submit(work, item), place))
                    in_flight += size
                    job = next_job()
    except BrokenProcessPool:
        time.sleep(0.5)  # a scheduler signals every process: our own signal may be on its way
        if stop.signal:
            return False
        script = os.path.basename(sys.argv[0])
        print(f"{script}: a worker was killed (out of memory? lower --workers); the same command goes on",
              file=sys.stderr)
        raise SystemExit(1) from None
    save()
    if read_error:
        raise read_error
    return not stop.signal


def n_cores():
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def start_worker():
    """Leaves Ctrl-C and signals to the parent, and ends when the parent is gone."""
    gc.freeze()  # memory shared with the parent stays shared
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

# -----------------------------------------------------------------------------
# files that survive a kill

@contextlib.contextmanager
def only_process(path, what="this data set"):
    """Holds a lock on the file `path`. Raises UserError if another process holds it."""
    try:
        file = lock_file(path)
    except BlockingIOError:
        raise UserError(f"another process is at work on {what} ({path} is locked)") from None
    with file:
        yield


class RecordedFiles:
    """Files that are only appended to, and a record of how much of them is safe.

    The record (the .json file `path`) is the truth. Each safe point fsyncs the files, then replaces the
    record. After a kill the files are cut back to it. A file is called NAME.tmp until the record says that it
    is full.

    The record is {"settings": ..., "done": bool, "splits": {split: {"files": [{"name": ..., "crc32": ...}]}}}
    and what the subclass adds. The subclass defines n_bytes(file) and is_full(file) for an entry of "files".
    Raises UserError if the record was begun with other settings, or if the files do not fit it.
    """

    def __init__(self, path, new_record, safe_interval):
        self.path = path
        self.folder = os.path.dirname(path)
        self.safe_interval = safe_interval  # seconds
        self.saved = time.monotonic()
        self.open = {}  # name: the file that is appended to
        remove_strays(path)

        begun = os.path.exists(path)
        self.record = read_json(path) if begun else new_record
        refuse_other(self.folder, self.record["settings"], new_record["settings"])
        self.name_full_files()
        for file in self.files():
            if not begun:
                self.begin(file)
            elif self.is_full(file):
                check_size(os.path.join(self.folder, file["name"]), self.n_bytes(file),
                           f"delete {self.folder} to begin anew")
            else:
                self.reopen(file)

    def files(self):
        return [file for split in self.record["splits"].values() for file in split["files"]]

    def temporary(self, file):
        return os.path.join(self.folder, file["name"]) + ".tmp"

    def begin(self, file):
        self.open[file["name"]] = open(self.temporary(file), "wb")

    def reopen(self, file):
        """Opens a file behind its recorded bytes and cuts off any that come later."""
        path = self.temporary(file)
        size = self.n_bytes(file)
        if not os.path.exists(path) or os.path.getsize(path) < size:
            raise UserError(f"{path} is missing or shorter than {self.path} says: "
                            f"delete {self.folder} to begin anew")
        stream = open(path, "r+b")
        stream.truncate(size)
        stream.seek(size)
        self.open[file["name"]] = stream

    def append(self, file, data):
        """Appends bytes to a file and brings its checksum up to date; the caller updates its own counts."""
        stream = self.open[file["name"]]
        with writing(stream.name):
            stream.write(data)
        file["crc32"] = f"{zlib.crc32(data, int(file['crc32'], 16)):08x}"

    def is_due(self):
        return time.monotonic() - self.saved >= self.safe_interval

    def save(self):
        """A safe point: first the files, then the record, then the names of full files."""
        for stream in self.open.values():
            with writing(stream.name):
                stream.flush()
                os.fsync(stream.fileno())
        save_json(self.path, self.record)
        self.name_full_files()
        self.saved = time.monotonic()

    def name_full_files(self):
        for file in self.files():
            if self.is_full(file) and os.path.exists(self.temporary(file)):
                os.replace(self.temporary(file), os.path.join(self.folder, file["name"]))
                if file["name"] in self.open:
                    self.open.pop(file["name"]).close()


def remove_strays(path):
    """Removes what kills left of earlier tries to write a file. No other process may be writing it."""
    for stray in glob.glob(glob.escape(path) + ".tmp*"):
        os.unlink(stray)


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        folder = os.path.dirname(path)
        raise UserError(f"{path} is damaged ({error}): delete {folder} to begin anew") from None

# -----------------------------------------------------------------------------
# checks

def check_range(settings, **least):
    """Raises UserError for a setting below its least value, and for a --dataset that is not a plain name."""
    for name, value in least.items():
        if settings[name] < value:
            raise UserError(f"--{name}={settings[name]}: expects {value} or more")
    dataset = settings["dataset"]
    if dataset != os.path.basename(dataset) or dataset in ("", ".", ".."):
        raise UserError(f"--dataset={dataset}: expects a plain name; --data_dir says where its folder lies")


def refuse_other(folder, theirs, ours):
    """Raises UserError that names the first setting in which a folder begun earlier differs from this run."""
    for name, value in ours.items():
        before = theirs.get(name, "")  # a setting that is newer than the folder
        if before != value:
            flag = name if " " in name else f"--{name}"
            raise UserError(f"{folder} was made with {flag}={before}, not {value}: "
                            "take another --dataset or delete it")


def check_size(path, size, fix):
    """Raises UserError if a file that was written does not hold `size` bytes; fix: what to do about it."""
    if not os.path.exists(path) or os.path.getsize(path) != size:
        raise UserError(f"{path} is missing or not as long as it was: {fix}")

# -----------------------------------------------------------------------------
# records (documents, images)

class BadRecord(ValueError):
    """A document or image that is left out. The message is the reason, under which meta.json counts it."""


def add_bad(bad, reason, count, places):
    """Counts bad records in `bad`, {reason: {"count": n, "first": [places of the first few]}}."""
    entry = bad.setdefault(reason, {"count": 0, "first": []})
    entry["count"] += count
    for place in places[:NAMED - len(entry["first"])]:
        entry["first"].append(place.encode("utf-8", "backslashreplace").decode())


def bad_line(bad, what="records"):
    """One line on all bad records, to follow another; empty if there are none."""
    reasons = []
    for reason, entry in bad.items():
        places = list(entry["first"])
        if entry["count"] > len(places):
            places.append("...")
        reasons.append(f"{entry['count']:,} {reason} ({', '.join(places)})")
    if not reasons:
        return ""
    return f"; bad {what}, left out: " + "; ".join(reasons)


def split_by_hash(data, share):
    """The split of a document or image, by the CRC32 of its bytes; share: {"val": 0.02, "test": 0.02}."""
    u = zlib.crc32(data) / 2**32  # in [0, 1)
    if u < share["test"]:
        return "test"
    if u < share["test"] + share["val"]:
        return "val"
    return "train"

"""
The two parts that both prepare scripts share: ordered work on all cores, and files that survive a kill.

    with only_process(lock):
        part = Part(path, record, safe_interval)               # a subclass of RecordedFiles
        part.fill(work, jobs, total, unit, workers, most_bytes)
        write_meta(folder, meta, records=[path])                # nanorank/data_folder.py

The scripts read the same chunks in the same order every time and append the results in that order. A restart
therefore needs only the number of the last chunk that is safely written.
"""
import contextlib
import gc
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

from tqdm import tqdm

from nanorank.console import StopSignal
from nanorank.data_folder import files_of, n_bytes, read_json, refuse_other, remove_strays
from nanorank.errors import UserError
from nanorank.files import lock_file, save_json, writing
from nanorank.tokens import check_file_size

# -----------------------------------------------------------------------------
# work on all cores

def run_in_order(work, jobs, take, save, stop, workers, most_bytes):
    """Calls take(work(item), *place) for each (size, item, *place) of `jobs`, in order. True if all are done.

    work runs in other processes and is a pure function that pickles. `jobs`, take and save run here.
    stop: a StopSignal. After a signal no new job is handed out, and the result is False.
    workers: processes, 0 for one per core. At most n = 2 * workers + 4 jobs are in flight, of at most
    n * most_bytes bytes by their `size`.

    save() is called at the end. If reading `jobs` fails, the results in flight are taken and saved before the
    error is raised again. If work or take fails, nothing is saved. A killed worker ends the script, status 1.
    """
    workers = workers or n_cores()
    most_jobs = 2 * workers + 4
    pending = deque()  # (size, future, *place), the oldest first
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

    # fork: workers share what is imported and loaded; of threads only tqdm's may run, which they do not use
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
            job = next_job()
            while job or pending:
                full = len(pending) >= most_jobs or job and in_flight + job[0] > most_jobs * most_bytes
                if pending and (full or not job):
                    size, future, *place = pending.popleft()
                    take(future.result(), *place)
                    in_flight -= size
                else:
                    size, item, *place = job
                    pending.append((size, pool.submit(work, item), *place))
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

    The record is {"settings": ..., "done": bool, "splits": {split: {"files": [{"name": ..., "crc32": ...,
    "bytes" or "tokens": ...}]}}} and what the subclass adds. The subclass defines add(made, bad, *at), which
    appends a result, and progress(seconds), a text for the progress bar.
    Raises UserError if the record was begun with other settings, or if the files do not fit it.
    """

    def __init__(self, path, new_record, safe_interval, dtype="uint8"):
        self.path = path
        self.folder = os.path.dirname(path)
        self.dtype = dtype  # of the tokens
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
                check_file_size(os.path.join(self.folder, file["name"]), n_bytes(file, dtype),
                                f"delete {self.folder} to begin anew")
            else:
                self.reopen(file)

    def fill(self, work, jobs, total, unit, workers, most_bytes):
        """Appends work(item) for each job, unless all are done. A signal ends the process at a safe point.

        jobs: a function of a StopSignal that yields (bytes in memory, item, at, seen) after what is recorded.
        at: arguments for add; seen: how much of `total`, in units, has been read then.
        """
        if self.record["done"]:
            return
        stop = StopSignal()
        bar = None

        def begun():
            nonlocal bar
            for job in jobs(stop):
                if bar is None:  # only now: what is skipped must not count as speed
                    often = 0.5 if sys.stderr.isatty() else 10  # seconds
                    bar = tqdm(total=total, initial=job[-1], unit=unit, unit_scale=True, mininterval=often)
                yield job

        def take(result, at, seen):
            self.add(*result, *at)
            if time.monotonic() - self.saved >= self.safe_interval:
                self.save()
            bar.set_postfix_str(self.progress(bar.format_dict["elapsed"]), refresh=False)
            bar.update(seen - bar.n)

        try:
            done = run_in_order(work, begun(), take, self.save, stop, workers, most_bytes)
        finally:
            if bar:
                bar.close()
        if not done:
            print(f"stopped by signal {stop.signal}; the same command goes on from here", flush=True)
            raise SystemExit(128 + stop.signal)
        self.record["done"] = True
        self.save()

    def is_full(self, file):
        return self.record["done"]

    def files(self):
        return files_of(self.record)

    def temporary(self, file):
        return os.path.join(self.folder, file["name"]) + ".tmp"

    def begin(self, file):
        self.open[file["name"]] = open(self.temporary(file), "wb")

    def reopen(self, file):
        """Opens a file behind its recorded bytes and cuts off any that come later."""
        path = self.temporary(file)
        size = n_bytes(file, self.dtype)
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

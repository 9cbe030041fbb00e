"""
A run's folder beside its checkpoints: the lock, log.jsonl, source/, and data made on first use.
"""
import errno
import glob
import os
import re
import shutil
import subprocess
import sys
import time

from nanorank.console import print0
from nanorank.errors import UserError
from nanorank.files import lock_file, to_json, writing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the repository
LOCKED = {}  # {path: file} that this process has locked: a second file, once closed, would unlock the first


def lock_folder(out_dir):
    """Keeps other processes out of out_dir until unlock_folder, or until this one ends, however it ends.

    Raises UserError where another process has it or it cannot be written to.
    """
    path = os.path.join(os.path.realpath(out_dir), ".lock")
    if path in LOCKED:  # an earlier run of this process, which ended in an error
        return
    try:
        os.makedirs(out_dir, exist_ok=True)
        LOCKED[path] = lock_file(path)
    except BlockingIOError:
        raise UserError(f"another run is at work in {out_dir}: --out_dir goes elsewhere") from None
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM):
            reason = error.strerror
            raise UserError(f"{out_dir} cannot be written to ({reason}): --out_dir goes elsewhere") from None
        raise


def unlock_folder(out_dir):
    file = LOCKED.pop(os.path.join(os.path.realpath(out_dir), ".lock"), None)
    if file:
        file.close()


def copy_source(out_dir):
    """Copies the code that runs to out_dir/source. Returns that folder."""
    source = os.path.join(out_dir, "source")
    for pattern in ("*.py", "nanorank/**/*.py", "nanorank/**/*.html", "scripts/*.py"):
        for path in glob.glob(pattern, root_dir=ROOT, recursive=True):
            copy = os.path.join(source, path)
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copy(os.path.join(ROOT, path), copy)
    return source


def remove_leftovers(out_dir, resume):
    """Removes temporary files of a run that was killed and, for a new run, what an old one has left."""
    leftover = r".*\.(pt|json)\.tmp\d+"
    if not resume:
        leftover += r"|step_\d+\.pt|result\.json"
    for name in os.listdir(out_dir):
        if re.fullmatch(leftover, name):
            os.unlink(os.path.join(out_dir, name))


def make_data(folder, *command):
    """Runs `python COMMAND ...` to make the data in `folder`, on one process of each machine.

    Another run may be making them just now, so a failure is waited out for a minute.
    Raises UserError where they are still not there.
    """
    meta = os.path.join(folder, "meta.json")
    if os.path.exists(meta) or int(os.environ.get("LOCAL_RANK", 0)):
        return
    line = " ".join(["python", *command])
    print0(f"{folder} is not there yet, making it: {line}")
    environment = {**os.environ, "PYTHONPATH": ROOT}  # the current folder may be another
    if command[0].endswith(".py"):
        command = (os.path.join(ROOT, command[0]), *command[1:])
    process = subprocess.run([sys.executable, *command], env=environment)
    for _ in range(60):
        if process.returncode == 0 or os.path.exists(meta):
            break
        time.sleep(1)
    if not os.path.exists(meta):
        raise UserError(f"{line} could not make {folder}")


class RunLog:
    """out_dir/log.jsonl, one object a line, and wandb where --wandb_log asks for it."""

    def __init__(self, out_dir, keep_bytes, settings, wandb_id="", source="."):
        """keep_bytes: the log's size when the checkpoint that is resumed was written. Later lines
        will be logged again, so they are cut. wandb_id: of the wandb run to continue."""
        self.path = os.path.join(out_dir, "log.jsonl")
        self.wandb, self.wandb_id = None, ""
        if settings["wandb_log"]:
            self.wandb = start_wandb(out_dir, settings, wandb_id, source)
            self.wandb_id = self.wandb.id
        with open(self.path, "ab") as file:
            file.truncate(min(keep_bytes, file.tell()))

    def size(self):
        return os.path.getsize(self.path)

    def write(self, step, values):
        line = {"step": step, **values}
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")
        if self.wandb:
            self.wandb.log(line)

    def close(self):
        if self.wandb:
            self.wandb.finish()


def start_wandb(out_dir, settings, wandb_id, source):
    """A wandb run, new or continued, that holds settings and source."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_log needs wandb: pip install wandb") from None
    name = settings["wandb_run_name"] or settings["out_dir"]
    try:
        run = wandb.init(project=settings["wandb_project"], name=name, config=settings, dir=out_dir,
                         id=wandb_id or None, resume="allow" if wandb_id else None)
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--wandb_log: {reason} (WANDB_MODE=offline needs no account)") from None
    run.define_metric("*", step_metric="step")
    run.log_code(source)
    return run

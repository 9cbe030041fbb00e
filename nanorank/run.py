"""
The life of a run folder, the same for every trainer: found or refused, resumed, logged, stopped, ended. No settings, nothing at import.
"""
import contextlib
import errno
import glob
import math
import os
import re
import shutil
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from nanorank.checkpoints import RUN_FILE
from nanorank.console import print0
from nanorank.device import all_sum
from nanorank.errors import UserError
from nanorank.files import to_json, writing

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where the scripts are
# these settings of a run may always change when it is resumed
FREE_ON_RESUME = (
    "out_dir", "init_from", "overwrite", "eval_only", "device", "dtype", "compile", "data_dir", "batch_size",
    "log_interval", "eval_interval", "eval_iters", "rank_interval", "snapshot_steps",
    "wandb_log", "wandb_project", "wandb_run_name",
)

LEAST_SCALE = 1e-4  # of float16's gradients; it begins at 65536 and halves with each step that is skipped: 30 in a row; ours, as fairseq's


def is_number(x, kind=float, most=math.inf):
    return type(x) is kind and 0 <= x < most


RESUMED = {  # what exact resume needs beside the weights, and what it must be
    "config": lambda x: isinstance(x, dict) and all(type(value) in (bool, int, float, str) for value in x.values()),
    "iter_num": lambda x: is_number(x, int, 2**31), "best_val_loss": lambda x: type(x) is float and x == x, "seconds": is_number,
    "log_bytes": lambda x: is_number(x, int, 2**63), "wandb_id": lambda x: isinstance(x, str), "scaler": lambda x: isinstance(x, dict),
    "decay": lambda x: isinstance(x, dict) and {"attn", "embed", "none"} <= x.keys() and all(map(is_number, x.values())),
    "optimizer": lambda x: isinstance(x, (dict, list))}

# ------------------------------------------------------------------------------------------------------- begin and resume

def check_settings(settings, world):
    """Raises UserError naming the setting, its value and the fix, for the settings that every trainer has."""
    total, batch = settings["total_batch_size"], settings["batch_size"]
    if total < 1 or batch < 1 or total % (batch * world.size):
        raise UserError(f"--total_batch_size={total} is not a multiple of batch_size * processes = {batch} * {world.size}: change one of them")
    for name, value in settings.items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise UserError(f"--{name}={value} must " + ("not be negative" if value < 0 else "be finite"))
        if type(value) is int and value >= 2**31:
            raise UserError(f"--{name}={value} is too large")
        if name in ("beta1", "beta2", "dropout", "drop_path", "label_smoothing") and value >= 1:
            raise UserError(f"--{name}={value} is not in [0, 1)")
        if name in ("log_interval", "eval_interval", "eval_iters", "block_size", "image_size") and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if settings["compile"] not in ("auto", "true", "false"):
        raise UserError(f"--compile={settings['compile']}: expects auto, true or false")


def find_run(out_dir, init_from, overwrite, eval_only):
    """(path of the run's ckpt.pt, whether to resume from it). Raises UserError where the folder or the flags do not allow what is asked."""
    os.makedirs(out_dir, exist_ok=True)
    if not os.access(out_dir, os.W_OK):
        raise UserError(f"{out_dir} cannot be written to: --out_dir goes elsewhere")
    latest, log = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "log.jsonl")
    there = os.path.exists(latest)
    resume = init_from == "resume" or (there and (init_from == "auto" or (init_from == "scratch" and eval_only)))
    if eval_only and not resume and init_from in ("scratch", "auto"):
        raise UserError(f"--eval_only has nothing to evaluate: {latest} is not there, --init_from=PATH names another checkpoint")
    begun = os.path.exists(log) and os.path.getsize(log)  # an empty log is of a run killed before its first save: nothing to lose
    if not (resume or eval_only or overwrite) and (begun or any(re.fullmatch(RUN_FILE + r"|result\.json", name) for name in os.listdir(out_dir))):
        raise UserError(f"{out_dir} holds a run: --init_from=resume continues it, --overwrite starts over, --out_dir goes elsewhere")
    return latest, resume


def lock_run(out_dir, world):
    """Keeps other runs out of `out_dir` for as long as the file that the first process gets is open: the kernel closes it however that ends.

    Raises UserError on every process where another run has it, OSError where it cannot be written to. A file system without locks keeps
    nobody out.
    """
    file, refused = None, None
    if world.rank == 0:
        try:
            os.makedirs(out_dir, exist_ok=True)
            file = open(os.path.join(out_dir, ".lock"), "ab")
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: it works over NFS, and is not inherited by what this one starts
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EEXIST, errno.ENOTDIR) or not file and error.errno == errno.EACCES:
                refused = UserError(f"{out_dir} cannot be written to ({error.strerror}): --out_dir goes elsewhere")
            elif not file:
                refused = error
            elif error.errno in (errno.EACCES, errno.EAGAIN):
                refused = UserError(f"another run is at work in {out_dir}: --out_dir goes elsewhere")
    if all_sum(world, bool(refused))[0]:
        raise refused or UserError(f"{out_dir} is not to be had")
    return file


def check_resume(checkpoint, path, script, settings, same, free, fingerprint, max_iters):
    """Raises UserError where the run on disk is not the one that these settings describe; prints what changes where that is allowed.

    same: settings that must not change; free: those that may; the others change only where --init_from=resume asks for it.
    """
    if "data" not in checkpoint:
        raise UserError(f"{path} is not {script}'s: --init_from={path} takes its weights into a new run")
    bad = next((name for name, right in RESUMED.items() if name not in checkpoint or not right(checkpoint[name])), None)
    if bad:
        raise UserError(f"{path} is damaged, its {bad} is {str(checkpoint.get(bad, 'missing'))[:50]}: --init_from={path} takes its weights into a "
                         "new run")
    old = checkpoint["config"]
    changed = [name for name in settings if name not in free and name in old and old[name] != settings[name]]  # a newer setting is no change
    words = {name: f"{name} was {old[name]}, is {settings[name]}" for name in changed}
    differ = [words[name] for name in changed if name in same or settings["init_from"] != "resume"]
    if checkpoint["data"] != fingerprint:
        differ.append("the data on disk is not what it was trained on")
    if checkpoint["iter_num"] > max_iters:
        differ.append(f"it is at step {checkpoint['iter_num']}, beyond max_iters {max_iters}")
    if differ:
        advice = "" if any(name in same for name in changed) or not changed else "; --init_from=resume goes on with the new values"
        raise UserError(f"{path} is another run: {'; '.join(differ)}{advice}")
    if changed:
        print0(f"resumed with other settings: {'; '.join(words.values())}")


def make_data(folder, *command):
    """Runs a script of ours with its flags to make the data in `folder`, unless they are there: on one process of each machine; another run
    may be making them just now. Raises UserError where it fails."""
    meta = os.path.join(folder, "meta.json")
    if os.path.exists(meta) or int(os.environ.get("LOCAL_RANK", 0)):
        return
    print0(f"{folder} is not there yet, making it: python {' '.join(command)}")
    failed, patience = subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": ROOT}).returncode, 60
    while failed and patience and not os.path.exists(meta):
        time.sleep(1)
        patience -= 1
    if not os.path.exists(meta):
        raise UserError(f"{' '.join(command)} could not make {folder}")


def parse_steps(text, max_iters):
    """The set of steps that --snapshot_steps names."""
    try:
        kind, _, number = text.partition(":")
        if "-" in text or (number and int(number) < 1):
            raise UserError
        if kind == "every":
            return set(range(0, max_iters + 1, int(number))) | {max_iters}
        if kind == "log":
            return {0} | {round(max(1, max_iters)**(i / max(1, int(number) - 1))) for i in range(int(number))}
        return {int(s) for s in text.split(",") if s.strip()}
    except ValueError:
        raise UserError(f'--snapshot_steps={text}: expects "100,200,400", "every:1000" or "log:20"') from None

# -------------------------------------------------------------------------------------------------------------------- log

def start_log(out_dir, lock, resume, past, settings, wandb_project, wandb_name):
    """The RunLog of a run, on its first process; the code that runs goes to out_dir/source, leavings of a killed or given up run go.

    lock: what lock_run gave, open until the log is closed; past: "log_bytes" and "wandb_id" of the checkpoint that is resumed, else 0 and empty.
    """
    source = os.path.join(out_dir, "source")
    for path in glob.glob("**/*.py", root_dir=ROOT, recursive=True):
        if path.count(os.sep) == 0 or path.startswith(("nanorank" + os.sep, "scripts" + os.sep)):
            os.makedirs(os.path.dirname(os.path.join(source, path)), exist_ok=True)
            shutil.copy(os.path.join(ROOT, path), os.path.join(source, path))
    log = RunLog(out_dir, past["log_bytes"], settings, wandb_project, wandb_name, past["wandb_id"], source, lock)
    stale = r".*\.(pt|json)\.tmp\d+" + ("" if resume else r"|step_\d+\.pt|result\.json")
    for name in os.listdir(out_dir):
        if re.fullmatch(stale, name):
            os.unlink(os.path.join(out_dir, name))
    return log


class RunLog:
    """`out_dir/log.jsonl`, one object a line, and wandb where asked for. Only the first process has one that writes."""

    def __init__(self, out_dir, keep_bytes, settings, wandb_project="", wandb_name="", wandb_id="", source=".", lock=None):
        """keep_bytes: the log's size when the checkpoint that is resumed was written; what came after it is redone, so cut.
        wandb_project: empty for no wandb; wandb_id: of the run to continue; source: the folder of the code to log with it."""
        self.path, self.lock = os.path.join(out_dir, "log.jsonl"), lock
        self.wandb, self.wandb_id = None, ""
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise UserError("--wandb_log needs wandb: pip install wandb") from None
            try:
                self.wandb = wandb.init(project=wandb_project, name=wandb_name, config=settings, dir=out_dir,
                                        id=wandb_id or None, resume="allow" if wandb_id else None)
            except wandb.Error as error:
                raise UserError(f"--wandb_log: {str(error).splitlines()[0]} (WANDB_MODE=offline needs no account)") from None
            self.wandb_id = self.wandb.id
            self.wandb.define_metric("*", step_metric="step")
            self.wandb.log_code(source)
        with open(self.path, "ab") as file:
            file.truncate(min(keep_bytes, file.tell()))

    def size(self):
        return os.path.getsize(self.path)

    def __call__(self, step, **values):
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json({"step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log({"step": step, **values})

    def close(self):
        if self.wandb:
            self.wandb.finish()
        if self.lock:
            self.lock.close()


def read_steps(unread, world, scaler, script, latest):
    """(losses, gradient norms) of steps [(step, lr, loss, norm), ...] whose tensors are still on the device; losses are means over processes.

    Ends the run where one is not finite, but for the norms of a step that fp16's gradient scaler skips: there it ends once the scale has
    fallen below LEAST_SCALE.
    """
    values = torch.stack([torch.stack(pair) for _, _, *pair in unread]).cpu().double()  # note: this waits for the GPU
    here, norms = values.T.tolist()
    losses = all_sum(world, *here)
    for (step, *_), mine, everywhere, norm in zip(unread, here, losses, norms):
        if not math.isfinite(everywhere) or not (math.isfinite(norm) or scaler.is_enabled()):
            if not math.isfinite(mine) or (math.isfinite(everywhere) and world.rank == 0):
                print(f"{script}: loss {mine}, gradient norm {norm} at step {step} on process {world.rank}; "
                      f"the last good checkpoint is {latest}", file=sys.stderr, flush=True)
            end(world)
            raise SystemExit(1)
    if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
        print0(f"{script}: gradients overflow float16 at any scale, the last was {scaler.get_scale():g} behind step {unread[-1][0]}, and steps are "
               f"skipped: lower --learning_rate or take bfloat16; the last good checkpoint is {latest}", file=sys.stderr)
        end(world)
        raise SystemExit(1)
    return [loss / world.size for loss in losses], norms


def check_nan(model, world, script, step, latest):
    """Ends the run where a parameter is not finite, the same on all processes, before it is saved over the last good checkpoint."""
    bad = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)  # note: this waits for the GPU
    if bad:
        print0(f"{script}: {bad} holds NaN or inf at step {step}; the last good checkpoint is {latest}", file=sys.stderr)
        end(world)
        raise SystemExit(1)

# -------------------------------------------------------------------------------------------------------------------- end

@contextlib.contextmanager
def run_errors(script):
    """A disk that refuses what a run writes, and a process that lost another: one line on stderr, exit status 1. Under torchrun a process ends at
    once, without Python's tidying: in 2 of 12 small runs torch's threads aborted it there (torch 2.13, "terminate called"), in none of 16 since."""
    script, code = os.path.basename(script), 0
    try:
        yield
    except OSError as error:
        print(f"{script}: {error}; once that is mended --init_from=resume goes on from the last save", file=sys.stderr, flush=True)
        code = 1
    except RuntimeError as error:
        if "RANK" not in os.environ or not re.search("[Cc]onnection (closed|reset)|Broken pipe", str(error)):  # gloo's
            raise
        print(f"{script}: process {os.environ['RANK']} lost another one; --init_from=resume goes on from the last save", file=sys.stderr, flush=True)
        code = 1
    except SystemExit as stop:
        code = stop.code or 0
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


def stopped(world, number, where, log=None):
    """Ends a run that a signal stops, after it was saved."""
    print0(f"stopped by signal {number} {where}: go on with --init_from=resume")
    end(world, log)
    raise SystemExit(128 + number)


def end(world, log=None):
    if log:
        log.close()
    if world.size > 1:
        dist.destroy_process_group()

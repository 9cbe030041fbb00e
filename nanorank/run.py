"""
One training run: its processes, its device and its folder. The same for every trainer.

    run = Run(__file__, current(globals()))      # joins torchrun; begins, resumes or refuses out_dir
    start, best_val_loss = run.restore(optimizers)
    for step in range(start, max_iters + 1):
        ...
        run.save(step, model, optimizers, best_val_loss)
        run.log_train(step, loss, lr, grad_norm)

Model, optimizer, forward, backward and step are the trainer's own.
"""
import contextlib
import math
import os
import re
import sys
import textwrap
import time

import numpy as np
import torch
import torch.distributed as dist

from configurator import chosen, spelled
from nanorank import distributed
from nanorank.checkpoints import RUN_FILE
from nanorank.console import StopSignal, print0, time_left
from nanorank.device import (
    compile_error,
    device_name,
    peak_flops,
    pick_device,
    pick_dtype,
    slow_dtype,
)
from nanorank.errors import UserError
from nanorank.files import load_pt, make_folder, save_json, save_pt
from nanorank.hf_gpt2 import open_init
from nanorank.optim import decay_rates
from nanorank.restore import check_resumable, load_optimizers, saved_args
from nanorank.rng import hash64
from nanorank.run_folder import RunLog, copy_source, lock_folder, remove_leftovers, unlock_folder
from nanorank.run_settings import (
    check_same_run,
    check_settings,
    lr_end_of_run,
    overruled_by,
    parse_steps,
    split_batch,
)

# float16's gradient scale starts at 65536 and halves with each skipped step: 30 in a row is hopeless
LEAST_SCALE = 1e-4


class Run:
    """Joins the processes, picks device and dtype, takes out_dir, reads the checkpoint to start from.

    rank, world_size, master_process, ddp    where this process stands
    device, dtype, compile                   what the model runs on
    batch_size, grad_accum_steps             of a micro-step on this process; micro-steps a step
    ckpt, init_path, resume                  dict to start from (None: scratch), its file, whether to resume
    snapshot_steps, max_iters, lr_end        set by check_resume; lr_end: where the cosine ends

    Raises UserError where settings, flags or the folder do not allow what is asked.
    """

    def __init__(self, script, settings):
        self.script = os.path.basename(script)
        self.settings = settings
        self.chosen = chosen(script, settings)
        self.out_dir = settings["out_dir"]
        self.ckpt_path = os.path.join(self.out_dir, "ckpt.pt")
        self.signal = StopSignal()
        distributed.training = False

        self.join_processes()  # rank, world_size, ddp, master_process, device
        check_settings(settings)
        self.batch_size, self.grad_accum_steps = split_batch(settings, self.world_size)
        self.dtype = pick_dtype(settings["dtype"], self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
        slower = slow_dtype(self.device, self.dtype) if self.master_process else 0
        if slower:
            self.print(f"note: this CPU emulates {settings['dtype']}: a matrix product takes {slower:.0f} "
                       "times as long as with --dtype=float32")

        if not settings["eval_only"]:
            self.take_folder()
        self.resume = self.should_resume()
        self.barrier()  # every process has looked before the first one writes
        self.compile = self.should_compile()

        self.ckpt = None
        self.init_path = ""
        if self.resume:
            self.init_path, self.ckpt = self.ckpt_path, load_pt(self.ckpt_path)
        elif settings["init_from"] not in ("scratch", "auto"):
            self.init_path, self.ckpt = open_init(settings["init_from"])

        # set by check_resume
        self.fingerprint = ""    # of the training data
        self.max_iters = 0
        self.snapshot_steps = set()
        self.lr_end = 0.0
        self.overruled = {}      # {setting: what was asked}, where the model of --init_from=PATH is otherwise
        # set by restore
        self.weight_decay = {}   # of each group
        self.decay_time = {}     # of each group: sum of lr * weight decay so far, in decay time constants
        self.seconds = 0.0       # of training, over all resumes
        self.log_file = None     # the master process has one
        # set by banner: a step sees per_step tokens (or images, the unit) and takes flops_per_step
        self.unit, self.per_step, self.flops_per_step, self.peak_flops = "", 0, 0, 0.0
        self.peak_beaten = False  # by a step
        # since the last report: (step, loss, lr, grad norm), tensors still on the device; and its time
        self.pending = []
        self.clock = 0.0
        # the step of ckpt.pt, and the size of log.jsonl then
        self.saved_step, self.log_bytes = -1, 0

    # ------------------------------------------------------------- processes

    def join_processes(self):
        self.device = pick_device(self.settings["device"])
        self.rank, self.world_size = 0, 1
        if "RANK" in os.environ:  # torchrun sets it
            self.device = distributed.init_process_group(self.device)
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.ddp = self.world_size > 1
        self.master_process = self.rank == 0

    def should_compile(self):
        """Whether to compile the model: as --compile says, auto on CUDA where torch.compile works.

        Raises UserError where it was asked for and does not work.
        """
        auto = str(self.settings["compile"]).lower() == "auto"
        wanted = self.device.type == "cuda" if auto else spelled(self.settings["compile"])
        if not wanted:
            return False
        reason = compile_error(self.device)
        if not distributed.all_sum(reason != "")[0]:  # the same on all processes
            return True
        reason = reason or "on another process"
        if not auto:
            raise UserError(f"--compile={self.settings['compile']}: torch.compile does not work here: "
                            f"{reason}; --compile=False does without")
        self.print(f"note: torch.compile does not work here, the model runs without: {reason}")
        return False

    def barrier(self):
        if self.ddp:
            dist.barrier()

    def print(self, text):
        print0(text)

    def print_values(self, label, values):
        """Prints `label loss 1.2345, acc 0.5000`."""
        named = [f"{name.replace('_', ' ')} {x:.4f}" for name, x in values.items()]
        print0(f"{label} " + ", ".join(named))

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def device_ids(self):
        """For DistributedDataParallel."""
        return [self.device.index] if self.device.type == "cuda" else None

    # ---------------------------------------------------------------- folder

    def take_folder(self):
        """Keeps other runs out of out_dir. Raises UserError on every process where another run has it."""
        refused = None
        if self.master_process:
            try:
                lock_folder(self.out_dir)
            except (UserError, OSError) as error:
                refused = error
        if distributed.all_sum(refused is not None)[0]:
            raise refused or UserError(f"{self.out_dir} cannot be used")

    def should_resume(self):
        """Whether to resume from ckpt.pt. Raises UserError where the folder does not allow what is asked."""
        init_from, eval_only = self.settings["init_from"], self.settings["eval_only"]
        make_folder(self.out_dir)

        has_ckpt = os.path.exists(self.ckpt_path)
        resume = init_from == "resume"
        if has_ckpt and (init_from == "auto" or (init_from == "scratch" and eval_only)):
            resume = True
        if eval_only and not resume and init_from in ("scratch", "auto"):
            raise UserError(f"--eval_only has nothing to evaluate: {self.ckpt_path} is not there, "
                            "--init_from=PATH names another checkpoint")

        # an empty log is of a run that was killed before its first save: nothing is lost
        log = os.path.join(self.out_dir, "log.jsonl")
        begun = os.path.exists(log) and os.path.getsize(log) > 0
        for name in os.listdir(self.out_dir):
            begun = begun or bool(re.fullmatch(RUN_FILE + r"|result\.json", name))
        if begun and not (resume or eval_only or self.settings["overwrite"]):
            raise UserError(f"{self.out_dir} holds a run: --init_from=resume continues it, "
                            "--overwrite starts over, --out_dir goes elsewhere")
        return resume

    def check_resume(self, fingerprint, max_iters):
        """Refuses to resume where settings, data or schedule are those of another run.

        fingerprint: of the training data, a string.
        """
        self.fingerprint = fingerprint
        self.max_iters = max_iters
        self.snapshot_steps = parse_steps(self.settings["snapshot_steps"], max_iters)
        # nodes that do not share out_dir or data_dir each find their own: without this they would train apart
        at = self.ckpt.get("iter_num", 0) if self.resume else "none"
        distributed.check_alike(f"step {at} of ckpt.pt, data {fingerprint}", "what they resume or read")
        resume = self.resume and not self.settings["eval_only"]
        if resume:
            check_resumable(self.ckpt, self.ckpt_path, self.script)
            self.overruled = self.ckpt.get("overruled", {})
        self.lr_end = lr_end_of_run(self.settings, self.chosen, self.ckpt["config"] if resume else {})
        self.settings["min_lr"] = self.lr_end
        if resume:
            changes = check_same_run(self.ckpt, self.ckpt_path, self.settings, fingerprint, max_iters)
            if changes:
                self.print(f"resumed with other settings: {'; '.join(changes)}")

    def take_shape(self, args, sizes=None):
        """Notes in the settings what the checkpoint's model has otherwise. args: the model's.

        sizes: a ViT variant's. Raises UserError where somebody has asked for another model.
        """
        if not self.ckpt:
            return
        resume = self.resume and not self.settings["eval_only"]  # its settings are checked by now
        chosen = () if resume else self.chosen
        overruled = overruled_by(args, self.init_path, self.settings, chosen, sizes or {})
        for name, value in overruled.items():
            asked = self.settings[name]
            auto = type(asked) is int and asked == 0
            if resume and auto and name not in self.overruled:
                continue
            self.overruled.setdefault(name, asked)
            self.settings[name] = value
        if overruled and not resume:
            shape = ", ".join(f"{name}={value}" for name, value in overruled.items())
            self.print(f"the model is that of {self.init_path}: {shape}")

    def restore(self, optimizers):
        """Takes up optimizers, log and counts of the run. Returns (first step, best validation loss)."""
        groups = [group for opt in optimizers for group in opt.param_groups]
        self.weight_decay = decay_rates(groups)
        self.decay_time = {name: 0.0 for name in self.weight_decay}  # sum of lr * weight decay so far
        start, best_val_loss, log_bytes, wandb_id = 0, math.inf, 0, ""
        if self.resume:
            ckpt = self.ckpt
            load_optimizers(optimizers, ckpt["optimizer"], self.ckpt_path)
            if self.scaler.is_enabled() and ckpt["scaler"]:
                self.scaler.load_state_dict(ckpt["scaler"])
            start, best_val_loss = ckpt["iter_num"], ckpt["best_val_loss"]
            self.seconds, self.decay_time = ckpt["seconds"], dict(ckpt["decay"])
            if self.decay_time.keys() != self.weight_decay.keys():
                old, new = ", ".join(self.decay_time), ", ".join(self.weight_decay)
                raise UserError(f"{self.ckpt_path} is damaged, its decay is of groups {old}, not {new}: "
                                f"--init_from={self.ckpt_path} starts a new run")
            log_bytes, wandb_id = ckpt["log_bytes"], ckpt["wandb_id"]
        self.ckpt = None  # frees its memory

        if self.master_process:
            source = copy_source(self.out_dir)
            self.log_file = RunLog(self.out_dir, log_bytes, self.settings, wandb_id, source)
            remove_leftovers(self.out_dir, self.resume)
        return start, best_val_loss

    # ----------------------------------------------------------- what is said

    def banner(self, groups, get_lr, start, unit, per_step, flops_per_step):
        """Prints what is about to run. unit, per_step: "tokens" and how many an optimizer step sees."""
        distributed.training = True
        self.unit, self.per_step, self.flops_per_step = unit, per_step, flops_per_step
        self.peak_flops, source = peak_flops(self.device, self.dtype)
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        lines = textwrap.wrap(f"settings: {settings}", 110, subsequent_indent="    ", break_long_words=False)
        self.print("\n".join(lines))
        total = self.settings["total_batch_size"]
        self.print(f"batch: {self.batch_size} * {self.world_size} processes * {self.grad_accum_steps} "
                   f"micro-steps = {total}; {per_step:,} {unit} a step")

        # decay acts over 1 / (lr * weight decay) steps: this many times in the whole run
        sum_lr = sum(get_lr(step) for step in range(start, self.max_iters))
        for group in groups:
            name = group["name"]
            wd = self.weight_decay[name]
            n_params = sum(p.numel() for p in group["params"])
            self.print(f"group {name:5}: {len(group['params']):3} tensors, {n_params:11,} parameters, "
                       f"weight decay {wd:g}, {self.decay_time[name] + sum_lr * wd:.2f} decay time constants")
        if "qk" in self.weight_decay:
            wd = self.weight_decay["qk"]
            self.print(f"      of these W_Q and W_K: weight decay {wd:g}, "
                       f"{self.decay_time['qk'] + sum_lr * wd:.2f} decay time constants")
        if "qk_nuclear" in self.weight_decay:
            wd = self.weight_decay["qk_nuclear"]
            self.print(f"      of attn W_Q and W_K: nuclear decay {wd:g}, "
                       f"{self.decay_time['qk_nuclear'] + sum_lr * wd:.2f} off each singular value")
        if self.settings["warmup_iters"] >= self.max_iters:
            self.print(f"note: warm-up takes {self.settings['warmup_iters']} steps of {self.max_iters}: "
                       f"the learning rate ends at {get_lr(self.max_iters):.2e}")
        how = "compiled" if self.compile else "eager"
        self.print(f"on {self.device}, {self.dtype}, {how}; {flops_per_step:,} FLOPs a step, "
                   f"MFU against {self.peak_flops / 1e12:.2f} TFLOP/s ({source})")

    def log(self, step, **values):
        """A line of log.jsonl, and of wandb where asked for."""
        if self.log_file:
            self.log_file.write(step, values)

    def log_train(self, step, loss, lr, grad_norm):
        """Notes a step; prints and logs every log_interval. loss, grad_norm: tensors on the device."""
        for name, wd in self.weight_decay.items():
            self.decay_time[name] += lr * wd
        self.pending.append((step, loss, lr, grad_norm))
        if (step + 1) % self.settings["log_interval"] == 0:
            self.report()

    def report(self):
        """Prints and logs the steps since the last report."""
        losses, grad_norms = self.read_steps()
        elapsed = time.perf_counter() - self.clock
        self.seconds += elapsed
        step, _, lr, _ = self.pending[-1]
        loss, grad_norm = losses[-1], grad_norms[-1]
        steps_per_s = len(self.pending) / elapsed
        speed = steps_per_s * self.per_step
        flops = steps_per_s * self.flops_per_step / self.world_size
        if flops > self.peak_flops:  # which was measured while others used the machine
            if not self.peak_beaten:
                self.print(f"note: faster than {self.peak_flops / 1e12:.2f} TFLOP/s: from here on MFU is "
                           "against the fastest steps")
            self.peak_flops, self.peak_beaten = flops, True
        mfu = flops / self.peak_flops
        remaining = time_left((self.max_iters - step - 1) / steps_per_s)
        self.log(step, train_loss=loss, lr=lr, grad_norm=grad_norm, **{f"{self.unit}_per_s": speed}, mfu=mfu)
        self.print(f"step {step}: loss {loss:.4f}, lr {lr:.2e}, grad norm {grad_norm:.3f}, "
                   f"{speed:,.0f} {self.unit}/s, mfu {100 * mfu:.1f}%, {remaining} left")
        self.pending = []

    def read_steps(self):
        """(losses, gradient norms) of the steps since the last report; losses are means over processes.

        Ends the run where one is not finite. With float16 a gradient may overflow: the scaler skips that
        step, and the run ends once the scale has fallen below LEAST_SCALE.
        """
        pairs = [torch.stack([loss, grad_norm]) for _, loss, _, grad_norm in self.pending]
        values = torch.stack(pairs).cpu().double()  # waits for the GPU
        own_losses, grad_norms = values.T.tolist()
        losses = distributed.all_sum(*own_losses)
        for (step, *_), own, summed, norm in zip(self.pending, own_losses, losses, grad_norms):
            if math.isfinite(summed) and (math.isfinite(norm) or self.scaler.is_enabled()):
                continue
            # print on the process whose loss is not finite; if only the gradient is, on the first
            if not math.isfinite(own) or (math.isfinite(summed) and self.master_process):
                print(f"{self.script}: loss {own}, gradient norm {norm} at step {step} on process "
                      f"{self.rank}; the last good checkpoint is {self.ckpt_path}",
                      file=sys.stderr, flush=True)
            self.close()
            raise SystemExit(1)
        scale = self.scaler.get_scale()
        if self.scaler.is_enabled() and scale < LEAST_SCALE:
            self.fail(f"gradients overflow float16 at any scale, the last was {scale:g} after step "
                      f"{self.pending[-1][0]}, and steps are skipped: lower --learning_rate or take bfloat16")
        return [loss / self.world_size for loss in losses], grad_norms

    def check_finite(self, step, model):
        """Ends the run where a loss, gradient or weight is not finite: it is not saved over a good one."""
        if self.pending:
            self.report()
        for name, p in model.named_parameters():
            if not p.isfinite().all():  # waits for the GPU
                self.fail(f"{name} holds NaN or inf at step {step}")

    def fail(self, message):
        print0(f"{self.script}: {message}; the last good checkpoint is {self.ckpt_path}", file=sys.stderr)
        self.close()
        raise SystemExit(1)

    # ---------------------------------------------------------------- a step

    def signalled(self):
        """The signal that any process got, 0 for none, the same answer on all of them."""
        if not self.ddp:
            return self.signal.signal
        signum = torch.tensor(self.signal.signal)
        dist.all_reduce(signum, op=dist.ReduceOp.MAX)  # on the CPU, through gloo: the GPU does not wait
        return int(signum)

    def begin_step(self, step):
        """Starts the clock, and seeds dropout by the step: then a resumed run has no generator to restore."""
        if not self.pending:  # evaluating and saving are not training time
            self.clock = time.perf_counter()
        key = hash64(hash64(self.settings["seed"]) + step)
        torch.manual_seed(hash64(key + self.rank) >> 1)

    def stop(self, signum, where):
        """Ends a run that a signal stops, after it was saved."""
        self.print(f"stopped by signal {signum} {where}: go on with --init_from=resume")
        self.close()
        raise SystemExit(128 + signum)

    # ------------------------------------------------------------------ save

    def save(self, step, model, optimizers, best_val_loss):
        """Writes ckpt.pt: all that the run needs to go on from the top of `step`, in nanoGPT's dict."""
        if not self.master_process:
            return
        if step != self.saved_step:
            self.saved_step = step
            # later lines will be logged again by a run that resumes here
            self.log_bytes = self.log_file.size()
        states = [opt.state_dict() for opt in optimizers]
        ckpt = {
            "model": model.state_dict(),
            "optimizer": states if len(states) > 1 else states[0],
            "model_args": saved_args(model.args),
            "iter_num": step,
            "best_val_loss": best_val_loss,
            "config": self.settings,
            # beyond nanoGPT's, for exact resume
            "scaler": self.scaler.state_dict(),
            "decay": self.decay_time,
            "seconds": self.seconds,
            "log_bytes": self.log_bytes,
            "wandb_id": self.log_file.wandb_id,
            "data": self.fingerprint,
        }
        if self.overruled:
            ckpt["overruled"] = self.overruled
        save_pt(self.ckpt_path, ckpt)

    def save_weights(self, step, model):
        """Writes a snapshot of the weights alone, step_0001000.pt."""
        if self.master_process:
            save_pt(os.path.join(self.out_dir, f"step_{step:07d}.pt"), {
                "model": model.state_dict(),
                "model_args": saved_args(model.args),
                "iter_num": step,
                "config": self.settings,
            })

    # -------------------------------------------------------------- evaluate

    def eval_rows(self, n_rows, wanted=None):
        """Which rows of a split this process evaluates, batch by batch: arrays (batch_size,) of row numbers.

        wanted: so many evenly spaced rows, all by default. Rows of -1 do not count: they fill the last
        batches up, so that every process has the same number of batches.
        """
        batch_size = self.settings["batch_size"]
        n = min(wanted or n_rows, n_rows)
        rows = np.linspace(0, n_rows - 1, n).round().astype(np.int64)
        n_batches = math.ceil(n / (batch_size * self.world_size))
        padded = np.full(n_batches * self.world_size * batch_size, -1)
        padded[:n] = rows
        return list(padded.reshape(n_batches, self.world_size, batch_size)[:, self.rank])

    def eval_batches(self, batches, n_batches):
        """Yields from batches, prints time left every ten seconds. A signal ends the run: it is saved."""
        began = spoke = time.monotonic()
        for i, batch in enumerate(batches):
            signum = self.signalled()
            if signum:
                self.stop(signum, "while evaluating")
            yield batch
            now = time.monotonic()
            if now - spoke > 10:
                spoke = now
                left = time_left((now - began) / (i + 1) * (n_batches - i - 1))
                self.print(f"  evaluating: batch {i + 1} of {n_batches}, {left} left")

    # ------------------------------------------------------------------- end

    def finish_eval(self, result):
        """Ends --eval_only: writes eval.json."""
        if not math.isfinite(result["val_loss"] + result.get("test_loss", 0.0)):
            raise UserError(f"{self.init_path}: its loss is not finite: weights that are damaged, "
                            f"or overflow {self.dtype}")
        if self.master_process:
            save_json(os.path.join(self.out_dir, "eval.json"), {**self.settings, **result})
        self.close()

    def finish(self, result):
        """Ends the run: writes result.json."""
        attention = self.decay_time.get("attn", 0.0)
        time_constants = {"decay_time_constants": attention}
        for name in {"mlp": 0.0, "embed": 0.0, **self.decay_time}:  # groups of a fork's own, too
            if name == "qk_nuclear":  # of another unit: a singular value
                time_constants["nuclear_decay_qk"] = self.decay_time[name]
            elif name not in ("attn", "none"):
                time_constants[f"decay_time_constants_{name}"] = self.decay_time.get(name, 0.0)
        result = {
            **self.settings, **result,
            "steps": self.max_iters,
            self.unit: self.max_iters * self.per_step,
            "seconds": self.seconds,
            **time_constants,
            "processes": self.world_size,
            "trained_on": str(self.device),
            "device_name": device_name(self.device),
            "autocast": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }
        test = {name: x for name, x in result.items() if name.startswith("test_")}
        if test:  # there may be no test split
            self.log(self.max_iters, **test)
        if self.master_process:
            save_json(os.path.join(self.out_dir, "result.json"), result)
        self.print(f"{attention:.2f} decay time constants on attention, {time_left(self.seconds)} of "
                   f"training; next: python analyze.py {self.out_dir}")
        self.close()

    def close(self):
        if self.log_file:
            self.log_file.close()
        if self.master_process:
            unlock_folder(self.out_dir)
        if dist.is_initialized():
            dist.destroy_process_group()

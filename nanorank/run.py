"""
One training run: its processes, its device and its folder. The same for every trainer.

    run = Run(__file__, current(globals()))      # joins torchrun; begins, resumes or refuses out_dir
    start, best_val_loss = run.restore(optimizers)
    for step in range(start, max_iters + 1):
        ...
        run.save(step, model, optimizers, best_val_loss)
        run.log_train(step, loss, lr, grad_norm)

Model, optimizer, forward, backward and step are the trainer's own. How a run begins stands in run_setup.py;
here is what it logs, saves and ends with.
"""
import math
import os
import sys
import textwrap
import time

import numpy as np
import torch
import torch.distributed as dist

from nanorank import distributed
from nanorank.console import print0, time_left
from nanorank.device import device_name, peak_flops, synchronize
from nanorank.errors import UserError
from nanorank.files import save_json, save_pt
from nanorank.restore import saved_args
from nanorank.rng import hash64
from nanorank.run_folder import unlock_folder
from nanorank.run_setup import RunSetup
from nanorank.save_thread import SaveThread

# float16's gradient scale starts at 65536 and halves with each skipped step: 30 in a row is hopeless
LEAST_SCALE = 1e-4


class Run(RunSetup):
    """Joins the processes, picks device and dtype, takes out_dir, reads the checkpoint to start from.

    rank, world_size, master_process, ddp    where this process stands
    device, dtype, compile                   what the model runs on
    batch_size, grad_accum_steps             of a micro-step on this process; micro-steps a step
    ckpt, init_path, resume                  dict to start from (None: scratch), its file, whether to resume
    snapshot_steps, max_iters, lr_end        set by check_resume; lr_end: where the cosine ends

    Raises UserError where settings, flags or the folder do not allow what is asked.
    """

    def __init__(self, script, settings):
        super().__init__(script, settings)
        # set by banner: a step sees per_step tokens (or images, the unit) and takes flops_per_step
        self.unit, self.per_step, self.flops_per_step, self.peak_flops = "", 0, 0, 0.0
        self.peak_beaten = False  # by a step
        # since the last report: (step, loss, lr, grad norm), tensors still on the device
        self.pending = []
        self.clock = 0.0           # when the first of them began
        self.first_seconds = None  # of this process's first step, until a report has told it
        # the step of ckpt.pt, and the size of log.jsonl then
        self.saved_step, self.log_bytes = -1, 0
        self.save_thread = SaveThread() if settings["save_in_thread"] else None
        self.asked = None  # for a signal on any process: (work, tensor) of a sum that is under way

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
        if self.first_seconds is None:  # it has compiled, and started libraries: it tells no speed
            synchronize(self.device)
            self.first_seconds = time.perf_counter() - self.clock
            self.clock += self.first_seconds
        if (step + 1) % self.settings["log_interval"] == 0:
            self.report()

    def report(self):
        """Prints and logs the steps since the last report."""
        losses, grad_norms = self.read_steps()
        elapsed = time.perf_counter() - self.clock
        step, _, lr, _ = self.pending[-1]
        loss, grad_norm = losses[-1], grad_norms[-1]
        n_timed = len(self.pending)
        if self.first_seconds and n_timed > 1:
            n_timed -= 1
        else:
            elapsed += self.first_seconds
        self.first_seconds = 0.0
        steps_per_s = n_timed / elapsed
        self.seconds += len(self.pending) / steps_per_s
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
        """The signal that any process got, 0 for none, the same answer on all of them.

        Several processes ask each other at every call and read the answer at the next one, so that none
        waits: they stop a step later than one process does.
        """
        if not self.ddp:
            return self.signal.signal
        answer = self.read_asked()
        signum = torch.tensor(self.signal.signal)
        work = dist.all_reduce(signum, op=dist.ReduceOp.MAX, async_op=True)  # on the CPU, through gloo
        self.asked = work, signum
        return answer

    def read_asked(self):
        if not self.asked:
            return 0
        work, signum = self.asked
        self.asked = None
        work.wait()
        return int(signum)

    def begin_step(self, step):
        """Starts the clock, and seeds dropout by the step: then a resumed run has no generator to restore."""
        if not self.pending:  # evaluating and saving are not training time
            self.clock = time.perf_counter()
        key = hash64(hash64(self.settings["seed"]) + step)
        torch.manual_seed(hash64(key + self.rank) >> 1)

    def stop(self, signum, where):
        """Ends a run that a signal stops, after it was saved."""
        self.wait_for_saves()
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
        self.write(self.ckpt_path, ckpt)

    def save_weights(self, step, model):
        """Writes a snapshot of the weights alone, step_0001000.pt."""
        if self.master_process:
            self.write(os.path.join(self.out_dir, f"step_{step:07d}.pt"), {
                "model": model.state_dict(),
                "model_args": saved_args(model.args),
                "iter_num": step,
                "config": self.settings,
            })

    def write(self, path, ckpt):
        if self.save_thread:
            self.save_thread.save(path, ckpt)
        else:
            save_pt(path, ckpt)

    def wait_for_saves(self):
        """Until what save and save_weights have begun is on disk. Raises OSError where it could not be."""
        if self.save_thread:
            self.save_thread.wait()

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
        self.wait_for_saves()
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
        if self.device.type == "cuda":
            result["gpu_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        test = {name: x for name, x in result.items() if name.startswith("test_")}
        if test:  # there may be no test split
            self.log(self.max_iters, **test)
        if self.master_process:
            save_json(os.path.join(self.out_dir, "result.json"), result)
        self.print(f"{attention:.2f} decay time constants on attention, {time_left(self.seconds)} of "
                   f"training; next: python analyze.py {self.out_dir}")
        self.close()

    def close(self):
        self.wait_for_saves()
        self.read_asked()
        if self.log_file:
            self.log_file.close()
        if self.master_process:
            unlock_folder(self.out_dir)
        if dist.is_initialized():
            dist.destroy_process_group()

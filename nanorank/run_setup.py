"""
How a run begins: its processes, its device, its folder, and the checkpoint that it starts from.
"""
import contextlib
import math
import os
import re

import torch
import torch.distributed as dist

from configurator import chosen, spelled
from nanorank import distributed
from nanorank.checkpoints import RUN_FILE
from nanorank.console import StopSignal, print0
from nanorank.device import compile_error, pick_device, pick_dtype, slow_dtype
from nanorank.errors import UserError
from nanorank.files import load_pt, make_folder
from nanorank.hf_gpt2 import open_init
from nanorank.optim import decay_rates
from nanorank.restore import check_resumable, load_optimizers
from nanorank.run_folder import RunLog, copy_source, lock_folder, remove_leftovers
from nanorank.run_settings import (
    check_same_run,
    check_settings,
    lr_end_of_run,
    overruled_by,
    parse_steps,
    split_batch,
)


class RunSetup:
    """The part of Run (nanorank/run.py) that comes before training."""

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

    def place(self, model):
        """Moves a model to the device; with --bf16_residual its blocks pass on bfloat16, not float32."""
        model.to(self.device)
        if self.settings.get("bf16_residual"):
            if self.dtype != torch.bfloat16:
                raise UserError(f"--bf16_residual needs bfloat16, and this run is in {str(self.dtype)[6:]}")
            if self.settings["post_norm"]:
                raise UserError("--bf16_residual does nothing with --post_norm: each block ends in a norm, "
                                "which writes float32")
            # dropout stands between embeddings and blocks; blocks add to what they get in its dtype
            model.transformer.drop.register_forward_hook(lambda module, args, x: x.bfloat16())

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

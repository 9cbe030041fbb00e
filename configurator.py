"""
The settings block at the top of a script is its command line.

    # settings
    learning_rate = 1e-3  # peak learning rate
    out_dir = "out"       # folder of the run

    if __name__ == "__main__":
        configure(globals())       # then main() reads the globals

    python script.py config/a.py config/b.py --learning_rate=3e-4 --out-dir out/x

A setting is a module-level, lower-case name bound to a literal; the comment behind it is its help text.
Config files hold nothing but such assignments and a docstring; they are parsed, never executed. Files and
flags apply left to right. Wrong input ends the script with one line and exit status 2. A script can be
imported as well: set its globals, call main().
"""
import ast
import difflib
import io
import json
import operator
import os
import re
import signal
import sys
import textwrap
import time
import tokenize

# OpenMP's idle threads spin before they sleep, for milliseconds: two jobs on the same cores then spend most
# of their time on that. Some microseconds do as well for a job alone. It stands here because every script
# imports this file before torch, which reads it once. Results do not depend on it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # times around a loop

TRUE = ("true", "1", "yes", "on", "t", "y")  # in any case
FALSE = ("false", "0", "no", "off", "f", "n")
KINDS = {bool: "true or false", int: "an int", float: "a float", str: "a string"}
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}

GIVEN = {}  # {script: names of the settings that its config files and flags gave}

# names that nanoGPT, Hugging Face's Trainer, timm and others use: what our trainers have instead
ANSWERS = {
    "lr max_lr peak_lr base_lr": "the peak is --learning_rate",
    "lr_min end_lr final_lr": "the cosine ends at --min_lr",
    "weight_decay wd decay": "it is by group: --attn_wd, --mlp_wd, --embed_wd",
    "decay_lr lr_decay_iters lr_decay_steps lr_scheduler lr_scheduler_type lr_schedule "
    "scheduler sched":
        "a cosine ends at --min_lr and --max_iters; --min_lr equal to --learning_rate keeps it constant",
    "warmup warmup_steps warmup_ratio warmup_epochs num_warmup_steps":
        "--warmup_iters is in optimizer steps",
    "epochs epoch num_epochs n_epochs num_train_epochs max_epochs max_steps num_steps n_steps "
    "steps total_steps train_steps num_iterations num_iters n_iters iters iterations":
        "--max_iters is in optimizer steps",
    "gradient_accumulation_steps grad_accum_steps grad_accum accum_steps "
    "accumulate_grad_batches":
        "it follows: --total_batch_size is that of a step, --batch_size the most a process takes at once",
    "bs per_device_train_batch_size train_batch_size device_batch_size micro_batch_size "
    "global_batch_size":
        "--total_batch_size is that of a step, --batch_size the most that a process takes at once",
    "always_save_checkpoint save_interval save_steps save_every save_freq save_strategy "
    "checkpoint_interval":
        "ckpt.pt is saved at each --eval_interval; --snapshot_steps keeps step_*.pt",
    "eval_steps eval_every eval_freq eval_strategy evaluation_strategy val_interval val_every":
        "--eval_interval is in optimizer steps",
    "logging_steps log_every log_freq print_every":
        "--log_interval is in optimizer steps",
    "save_total_limit": "--snapshot_steps says which steps are kept",
    "resume resume_from resume_from_checkpoint":
        "--init_from=resume goes on with the run in --out_dir",
    "ckpt checkpoint ckpt_path checkpoint_path load load_from pretrained model_name "
    "model_name_or_path":
        "--init_from=PATH starts from a checkpoint",
    "output_dir output save_dir log_dir logging_dir run_dir":
        "the folder of the run is --out_dir",
    "overwrite_output_dir": "--overwrite starts over in --out_dir",
    "do_eval eval evaluate": "--eval_only evaluates and ends",
    "wandb use_wandb report_to": "--wandb_log turns it on",
    "wandb_run wandb_name run_name": "it is --wandb_run_name",
    "backend ddp local_rank world_size num_processes nproc_per_node num_gpus n_gpus gpus "
    "devices deepspeed fsdp":
        "torchrun's nproc_per_node sets how many processes run, --device is cpu, cuda or mps",
    "no_cuda use_cpu cpu cuda gpu": "it is --device=cpu or --device=cuda",
    "fp16 bf16 amp mixed_precision precision":
        "it is --dtype=float16, bfloat16 or float32",
    "torch_compile": "it is --compile",
    "opt optim": "it is --optimizer",
    "adam_beta1 adam_beta2 betas": "they are --beta1 and --beta2",
    "adam_epsilon epsilon": "it is --eps",
    "max_grad_norm gradient_clip_val clip_grad clip_norm clip": "it is --grad_clip",
    "data data_path train_file dataset_name dataset_path":
        "the data are the folder --data_dir/--dataset",
    "layers n_layers num_layers num_hidden_layers depth": "it is --n_layer",
    "heads n_heads num_heads num_attention_heads": "it is --n_head",
    "d_model dim hidden_size embed_dim n_embed": "it is --n_embd",
    "seq_len seq_length max_seq_len max_seq_length max_length context context_length n_ctx":
        "it is --block_size",
    "img_size input_size resolution": "it is --image_size",
    "model arch": "its size is --n_layer, --n_head and --n_embd",
    "workers num_workers dataloader_num_workers": "none are needed",
}


class UserError(ValueError):
    """A user's mistake, and the fix. Scripts print it as one line and exit with status 2."""


def configure(settings, positional="", argv=None):
    """Overrides the settings in `settings` (a script's globals()) from config files and flags.

    positional: how --help names the other arguments ("CKPT [CKPT ...]"); empty: the script takes none.
    argv: the arguments, sys.argv[1:] by default. Returns the other arguments, a list of strings.
    Raises SystemExit(2) after one line on stderr for wrong input, SystemExit(0) after --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    defaults = script_settings(settings)
    # remembered for a script that runs, not where its settings are only looked at (as a sweep does)
    module = sys.modules.get(settings.get("__name__"))
    is_module = module is not None and vars(module) is settings
    given = GIVEN.setdefault(settings["__file__"], set()) if is_module else set()
    others = []
    try:
        while argv:
            arg = argv.pop(0)
            if arg in ("--help", "-h"):
                print(usage(settings, positional), end="")
                raise SystemExit(0)
            if arg == "--":
                others += argv
                break
            if arg.startswith("--"):
                name, equals, text = arg[2:].partition("=")
                name = known(name.replace("-", "_"), defaults, f"--{name}")
                if not equals:
                    text = value_of_flag(name, defaults[name], argv)
                settings[name] = parse(f"--{name}", defaults[name], text)
                given.add(name)
            elif arg.endswith(".py"):
                for name, value, where in read_config(arg):
                    name = known(name, defaults, f"{where}: {name}")
                    settings[name] = convert(f"{where}: {name}", defaults[name], value)
                    given.add(name)
            else:
                others.append(arg)
        if others and not positional:
            raise UserError(f"unexpected argument {others[0]!r}: settings are --name=value, "
                            "config files end in .py")
    except UserError as error:
        speak(f"{os.path.basename(settings['__file__'])}: {one_line(error)}")
        raise SystemExit(2) from None
    return others


def speak(message):
    """Prints an error that all processes have alike: torchrun's first process on each machine speaks.

    The others wait for it, since torchrun ends all processes as soon as one has failed.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(message, file=sys.stderr, flush=True)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's ends the wait
        time.sleep(10)


def one_line(error, most=1000):
    """An error's message as one line: names from strangers' files hold line breaks and terminal codes."""
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(error)).strip()
    return text if len(text) <= most else f"{text[:most - 4]} ..."


def current(settings):
    """The settings of a script as they are now, {name: value}: what a run prints, logs and stores."""
    return {name: settings[name] for name in script_settings(settings)}


def chosen(script, settings):
    """Names of the settings that somebody chose: in a config file, by a flag, or by setting a global."""
    defaults = script_settings({"__file__": script})
    names = set(GIVEN.get(script, ()))
    for name, value in settings.items():
        if value != defaults.get(name):
            names.add(name)
    return names


def script_settings(settings):
    """{name: default} of the settings in the script whose globals() are given, read from its source."""
    with tokenize.open(settings["__file__"]) as file:
        found = list(assignments(file.read()))
    return {name: value for name, value, _ in found if value is not NotImplemented}


def assignments(source):
    """Yields (name, literal or NotImplemented, line number) of each `name = ...` with a lower-case name."""
    for node in ast.parse(source).body:
        if is_assignment(node):
            name = node.targets[0].id
            if name == name.lower() and not name.startswith("_"):
                yield name, literal(node.value), node.lineno


def is_assignment(node):
    return isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)


def literal(node):
    """The value of a literal expression, arithmetic on numbers included (600 * 4); else NotImplemented."""
    if isinstance(node, ast.BinOp):
        a, b = literal(node.left), literal(node.right)
        numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
        if not numbers or type(node.op) not in ARITHMETIC:
            return NotImplemented
        try:
            return ARITHMETIC[type(node.op)](a, b)
        except ArithmeticError:
            return NotImplemented
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return NotImplemented


def read_config(path):
    """Yields (name, value, "file:line") of each assignment in a config file.

    Raises UserError where the file holds anything else.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        body = ast.parse(source).body
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}") from None
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", "?")
        raise UserError(f"config file {path}: line {line}: {error.args[0]}") from None
    for i, node in enumerate(body):
        if i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        value = literal(node.value) if is_assignment(node) else NotImplemented
        if is_assignment(node) and isinstance(node.value, ast.Name):
            value = spelled(node.value.id)  # false, yes
        if value is NotImplemented:
            line = source.splitlines()[node.lineno - 1].strip()
            raise UserError(f"{path}:{node.lineno}: a config file holds only lines `name = literal`, "
                            f"not `{line}`")
        yield node.targets[0].id, value, f"{path}:{node.lineno}"


def spelled(value):
    """The bool that a value spells (False, 0, "no", "OFF"), else NotImplemented."""
    text = str(value).strip().lower()
    if text in TRUE + FALSE:
        return text in TRUE
    return NotImplemented


def known(name, defaults, where):
    """The name, if it is a setting; else a UserError with what a trainer has instead, or the nearest one."""
    if name in defaults:
        return name
    near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.7)
    advice = f"did you mean {near[0]}?" if near else "--help lists them all"
    if "attn_wd" in defaults:  # a trainer
        for names, answer in ANSWERS.items():
            there = all(setting in defaults for setting in re.findall(r"--(\w+)", answer))
            if name in names.split() and there:
                advice = answer
    raise UserError(f"unknown setting {where}; {advice}")


def value_of_flag(name, default, argv):
    """The text of `--name value`, taken from argv.

    "true" for a bare switch: a setting that is bool, or "auto" by default.
    """
    bare = not argv or argv[0].startswith("--")
    if isinstance(default, bool) and (bare or spelled(argv[0]) is NotImplemented):
        return "true"
    if default == "auto" and (bare or argv[0].endswith(".py")):
        return "true"
    if bare:
        raise UserError(f"--{name} needs a value ({kind(default)})")
    return argv.pop(0)


def kind(default):
    return KINDS.get(type(default), f"a {type(default).__name__}")


def parse(where, default, text):
    """The value that `text` from the command line has for a setting with this default."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return convert(where, default, text)
    try:
        value = literal(ast.parse(text.strip(), mode="eval").body)
        value = float(text) if value is NotImplemented else value  # inf
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"{where} expects {kind(default)}, got {text!r}") from None
    return convert(where, default, value)


def convert(where, default, value):
    """`value` in the type of `default`.

    An int is taken for a float, 1e5 for an int, and any spelling of true and false for a switch.
    """
    if isinstance(default, bool) and spelled(value) is not NotImplemented:
        return spelled(value)
    if default == "auto" and type(value) in (bool, int) and value in (0, 1):
        return str(value).lower()  # a switch that can also be auto
    if isinstance(default, float) and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is type(default) and value == value:  # nan is nobody's setting
        return value
    raise UserError(f"{where} expects {kind(default)}, got {value!r}")


def usage(settings, positional=""):
    """The text of --help: the script's docstring, then every setting with its default and comment."""
    with open(settings["__file__"], encoding="utf-8") as file:
        source = file.read()
    code = source.splitlines()
    comments = {}  # by line number
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").rstrip()

    rows, last = [], 0
    for name, default, line in assignments(source):
        if default is NotImplemented:
            continue
        for i in range(last + 1, line):
            # a comment line of its own between two settings is a banner
            if last and i in comments and code[i - 1].startswith("#") and comments[i].strip("-= "):
                rows.append(f"\n{comments[i].strip('-= ')}:")
        shown = json.dumps(default, ensure_ascii=False) if isinstance(default, str) else default
        comment = comments.get(line, "")
        following = line + 1
        while following in comments and code[following - 1].startswith(" "):  # it goes on there
            comment += " " + comments[following]
            following += 1
        head = f"  --{name}={shown}".ljust(34) + "  "
        rows.append(textwrap.fill(head + comment, 110, subsequent_indent=" " * 36, break_long_words=False,
                                  break_on_hyphens=False, replace_whitespace=False, drop_whitespace=True))
        last = line

    doc = (settings.get("__doc__") or "").strip("\n")
    script = os.path.basename(settings["__file__"])
    if settings.get("__package__") == "scripts":
        script = f"-m scripts.{script.removesuffix('.py')}"
    use = f"usage: python {script} [config/x.py ...] [--setting=value ...] {positional}".rstrip()
    return "\n".join([doc, "", use, "", "settings:", *rows, ""])

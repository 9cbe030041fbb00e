"""
Hostile, rotten and lying files, handed to the scripts that a user would hand them to: each must get one line and exit 2, or finite numbers.

    python tests/trials/hostile.py                             # all kinds, some minutes; writes results/trust/hostile.csv
    python tests/trials/hostile.py checkpoints safetensors     # also data, images, configs, jsonl, fuzz
    python tests/trials/hostile.py fuzz --cases=20000          # the configurator, the data readers and analyze's loader under hypothesis

A case is a file and a script that reads it, run in a forked child of this process (the imports stand already; some go through the command line
itself) under a limit of memory and time. Refused: exit 2, one line that names the file, no traceback. Valid: exit 0 and no number that is not finite,
which damage may be that nothing can tell (a flipped bit of a .safetensors weight: that format has no checksums). Anything else, or a
canary file that a pickle's code would make, is wrong: it is printed, and the script ends with status 1.
"""
import argparse
import csv
import json
import math
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from typing import NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import numpy as np
import torch
import torch._dynamo  # seconds that every child's first optimizer step would take
from conftest import TINY, environment, write_data
from safetensors.torch import save_file

import analyze
import train_lm
import train_vit
from configurator import configure, current
from nanorank.checkpoints import Checkpoint
from nanorank.console import time_left
from nanorank.errors import user_errors
from nanorank.files import write_atomic
from nanorank.images import RECORD, ImageSplit
from nanorank.rng import shuffled
from nanorank.tokens import TokenSplit
from scripts import sample, saturate  # noqa: F401

cases = 200                     # of what is random (bit flips, mutations); of fuzz: examples for each of its targets
seed = 0                        # of what is random
most_seconds = 30.0             # a case may take, wall clock
most_mb = 1000.0                # of memory a case may add to what the imports take, MB
out = "results/trust/hostile.csv"   # a row a kind; empty: none

KINDS = ("checkpoints", "safetensors", "data", "images", "configs", "jsonl", "fuzz")

# ------------------------------------------------------------------------------------------------------------------ a case

class Outcome(NamedTuple):
    """How a case ended: exit status (negative: a signal), what it wrote, its wall clock in seconds and memory in MB."""
    code: int
    out: str
    err: str
    seconds: float
    mb: float


def attempt(work, folder):
    """The Outcome of work() in a forked child, or of a command line (a list); one that takes too long is killed."""
    began, (out_file, err_file) = time.monotonic(), (open(os.path.join(folder, name), "w+b") for name in ("stdout", "stderr"))
    base = open(os.path.join(folder, "base"), "w+b")  # what the child has resident when it begins
    if isinstance(work, list):
        pid = subprocess.Popen([sys.executable, *work], cwd=REPO, env=environment(), stdout=out_file, stderr=err_file).pid
    else:
        sys.stdout.flush()
        pid = os.fork()
    if not pid:
        code = 1
        try:
            base.write(str(pages(1)).encode())
            base.flush()
            os.dup2(out_file.fileno(), 1)
            os.dup2(err_file.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")  # pytest has put its own in their place
            if sys.platform == "linux":
                resource.setrlimit(resource.RLIMIT_AS, (limit := pages(0) + int(most_mb * 1e6), limit))
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while not (done := os.wait4(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > most_seconds:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    texts = []
    for file in (out_file, err_file, base):
        with file:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    used = done[2].ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6 - int(texts.pop() or 0) / 1e6
    return Outcome(os.waitstatus_to_exitcode(done[1]), *texts, time.monotonic() - began, max(used, 0.0))


def pages(which):
    """This process's memory in bytes: 0 virtual, 1 resident."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[which]) * os.sysconf("SC_PAGE_SIZE")


def judge(outcome, name, canary=None):
    """"refused", "valid", or what is wrong with it. name: what the line must name, alternatives separated by |."""
    lines = [line for line in outcome.err.strip().splitlines() if "%|" not in line]  # without progress bars
    if canary and os.path.exists(canary):
        os.unlink(canary)
        return "code in it ran"
    if outcome.seconds > most_seconds or outcome.mb > most_mb:
        return f"took {outcome.seconds:.1f} s, {outcome.mb:.0f} MB"
    if "Traceback" in outcome.err:
        return f"traceback: {lines[-1][:200]}"
    if outcome.code == 2:
        named = len(lines) == 1 and any(word in lines[0] for word in name.split("|"))
        return "refused" if named else f"exit 2 with {len(lines)} lines, or not naming {name}: {outcome.err[:300]}"
    if outcome.code == 0:
        return "valid" if not re.search(r"(?<![\w./'-])(nan|inf|infinity)\b", outcome.out, re.I) else "valid, with numbers that are not finite"
    if outcome.code == 1 and len(lines) == 1 and "the last good checkpoint is" in lines[0]:
        return "refused"  # training found the weights to overflow, and saved nothing
    return f"exit {outcome.code}: {outcome.err[-300:]}"


class Tally:
    """Counts the cases of a kind, and prints what is wrong."""

    def __init__(self, kind, folder):
        self.kind, self.folder, self.rows, self.began, self.spoke = kind, str(folder), [], time.monotonic(), time.monotonic()

    def __call__(self, label, work, name, canary=None, want=""):
        """Runs and judges a case; want: "refused" or "valid", where only one is right."""
        outcome = attempt(work, self.folder)
        verdict = judge(outcome, name, canary)
        if want and verdict in ("refused", "valid") and verdict != want:
            verdict = f"should be {want}, is {verdict}: {outcome.err[:200]}"
        self.rows.append((verdict, outcome.seconds, outcome.mb))
        if verdict not in ("refused", "valid"):
            print(f"WRONG {self.kind}: {label}: {verdict}", flush=True)
        if time.monotonic() - self.spoke > 10:
            self.spoke = time.monotonic()
            print(f"  {self.kind}: {len(self.rows)} cases, {time_left(self.spoke - self.began)}", flush=True)
        return outcome, verdict

    def row(self):
        verdicts = [verdict for verdict, _, _ in self.rows]
        refused, valid = verdicts.count("refused"), verdicts.count("valid")
        return {"kind": self.kind, "cases": len(verdicts), "refused": refused, "valid": valid, "wrong": len(verdicts) - refused - valid,
                "worst_seconds": round(max(row[1] for row in self.rows), 2), "worst_mb": round(max(row[2] for row in self.rows)),
                "seconds": round(time.monotonic() - self.began, 1)}


def main_of(module, *args, **settings):
    """A function that runs a script's main with these settings, in a child that it may change."""
    assert settings.keys() <= vars(module).keys(), settings.keys() - vars(module).keys()

    def work():
        vars(module).update(settings)
        module.peak_flops = lambda device, dtype: (1e12, "nobody's")  # a second of GEMMs, for the log alone
        with user_errors(module.__name__):
            module.main(*args)
    return work

# --------------------------------------------------------------------------------------------------------------- checkpoints

SCRIPTS = ("analyze", "init_from", "resume", "sample", "saturate")  # that read a checkpoint; train_lm.py in two ways


def flipped(data, rng):
    """The same bytes but for one bit."""
    data = bytearray(data)
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(data)


class Run:
    """Pickles as a call of `function`, which unpickling would make."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def rebuilt(size, stride, numbers=4):
    """Pickles as a tensor of this size and stride over a storage of a few numbers."""
    return Run(torch._utils._rebuild_tensor_v2, torch.zeros(numbers).storage(), 0, size, stride, False, {})


def tensor_of(size, stride):
    return torch.zeros(1).as_strided(size, stride)


def real_run(folder):
    """A run folder of two steps that train_lm.py made, its data beside it; (path of ckpt.pt, settings)."""
    rng, folder = np.random.default_rng(1), pathlib.Path(folder)
    write_data(folder / "data" / "text", {split: [rng.integers(0, 256, n)] for split, n in (("train", 4000), ("val", 500), ("test", 400))})
    settings = {**TINY, "data_dir": str(folder / "data"), "max_iters": 2, "eval_interval": 1, "warmup_iters": 1}
    done = attempt(main_of(train_lm, **settings, out_dir=str(folder / "run")), folder)
    assert done.code == 0, done.err
    return folder / "run" / "ckpt.pt", settings


def readers(path, folder, settings):
    """{name: work} of every script that takes a checkpoint."""
    def resume():
        run = os.path.join(folder, "resumed")
        shutil.rmtree(run, ignore_errors=True)
        os.makedirs(run)
        shutil.copy(path, os.path.join(run, "ckpt.pt"))
        main_of(train_lm, **{**settings, "max_iters": 3}, out_dir=run, init_from="resume")()

    scratch = os.path.join(folder, "out")
    return {"analyze": main_of(analyze, [str(path)], out_dir=scratch, figure=False, device="cpu"),
            "init_from": main_of(train_lm, **{**settings, "init_from": str(path)}, out_dir=scratch, eval_only=True),
            "resume": resume,
            "sample": main_of(sample, str(path), device="cpu", max_new_tokens=3),
            "saturate": main_of(saturate, [str(path)], out_dir=scratch, figure=False, device="cpu", samples=2, curves=False, reinit=False,
                                data_dir=settings["data_dir"])}


def damaged(raw, canary):
    """{name: content for torch.save} of what a checkpoint may hold: each from `raw`, a real one."""
    model, q, out = raw["model"], "transformer.h.0.attn.c_attn.weight", {}
    shape = model[q].shape

    def put(label, x, key=q):
        out[label] = {**raw, "model": {**model, key: x}}

    for label, x in {"transposed": model[q].T, "rows missing": model[q][:-1], "flat": model[q].flatten(), "scalar": torch.tensor(1.0),
                     "empty": torch.zeros(0, 32), "int8": model[q].to(torch.int8), "int64": model[q].long(), "bool": model[q] > 0,
                     "complex64": model[q].to(torch.complex64), "float8": model[q].to(torch.float8_e4m3fn),
                     "nan": model[q].index_fill(0, torch.tensor([40]), math.nan), "inf": model[q] * math.inf, "sparse": model[q].to_sparse(),
                     "csr": model[q].to_sparse_csr(), "quantized": torch.quantize_per_tensor(model[q], 0.1, 0, torch.qint8),
                     "meta": model[q].to("meta"), "nested": torch.nested.nested_tensor([model[q], model[q][:3]]), "no tensor": 3, "None": None,
                     "a list": model[q].tolist(), "stride 0": tensor_of(shape, (0, 0)), "1e12 numbers of one": tensor_of((10**6, 10**6), (0, 0)),
                     "1e10 rows of none": tensor_of((10**10, 32), (0, 0)), "beyond its storage": rebuilt((96, 32), (32, 1)),
                     "4e11 bytes": rebuilt((10**5, 10**6), (10**6, 1)), "negative size": rebuilt((-96, 32), (32, 1)),
                     "negative stride": rebuilt((2, 2), (-1, 1)), "overflowing size": rebuilt((2**40, 2**40), (0, 0)),
                     "a canary": Run(os.system, f"touch {canary}")}.items():
        put(f"weight: {label}", x)
    put("embedding: nan", model["transformer.wte.weight"] * math.nan, "transformer.wte.weight")
    put("norm: nan", model["transformer.ln_f.weight"] * math.nan, "transformer.ln_f.weight")
    put("a name with line breaks and terminal codes", torch.ones(2, 2), "\x1b[31m\n\ntransformer.h.0.attn.q_attn.weight")
    put("a name of 1 MB", torch.ones(2, 2), "x" * 10**6 + ".attn.q_attn.weight")
    put("a name that is a number", torch.ones(2, 2), 7)
    out["20,000 names of no model"] = {f"a{i}.b.c": torch.ones(1) for i in range(20_000)}
    for key in raw:
        out[f"without {key}"] = {name: x for name, x in raw.items() if name != key}
        for label, x in (("None", None), ("text", "x"), ("a list", [1]), ("nan", math.nan), ("huge", 10**30), ("negative", -5), ("{}", {}),
                         ("deep", {"a": {"b": {"c": torch.ones(1)}}})):
            out[f"{key} = {label}"] = {**raw, key: x}
    for key in model:
        out[f"without {key}"] = {**raw, "model": {name: x for name, x in model.items() if name != key}}
    for key in raw["model_args"]:
        for x in (0, -1, 10**9, 10**18, 1.5, "12", None, [1], math.nan, True):
            out[f"model_args.{key} = {x!r}"] = {**raw, "model_args": {**raw["model_args"], key: x}}
    for key in ("dataset", "data_dir", "standardize", "n_head", "seed", "attn_wd"):
        for x in (None, 3, [1], "x\0y", torch.ones(3)):
            out[f"config.{key} = {str(x)!r}"] = {**raw, "config": {**raw["config"], key: x}}
    states = raw["optimizer"]["state"]
    for label, x in (("wrong shape", torch.ones(3)), ("nan", states[0]["exp_avg"] * math.nan), ("text", "x"),
                     ("a canary", Run(os.system, f"touch {canary}"))):
        out[f"optimizer: {label}"] = {**raw, "optimizer": {**raw["optimizer"], "state": {**states, 0: {**states[0], "exp_avg": x}}}}
    out["optimizer: fewer groups"] = {**raw, "optimizer": {**raw["optimizer"], "param_groups": raw["optimizer"]["param_groups"][:1]}}
    cycle, laughs = {}, [1]
    cycle["n_head"] = cycle["a"] = cycle
    for _ in range(40):
        laughs = {"a": laughs, "b": laughs}
    space = argparse.Namespace(n_head=2)
    space.__dict__["__setstate__"] = Run(os.system, f"touch {canary}")
    out |= {"a cycle": {**raw, "extra": cycle}, "a billion laughs": {**raw, "extra": laughs}, "Namespace with a call": {**raw, "args": space},
            "Namespace": {**raw, "args": argparse.Namespace(n_head=2)}, "a path": {**raw, "path": pathlib.PosixPath("/etc/passwd")},
            "eval": {**raw, "x": Run(eval, f"__import__('os').system('touch {canary}')")}, "getattr": {**raw, "x": Run(getattr, raw, "keys")},
            "path.unlink": {**raw, "x": Run(pathlib.Path.touch, pathlib.PosixPath(canary))}, "open": {**raw, "x": Run(open, canary, "w")},
            "a class": {**raw, "x": Tally("a", "b")}, "a module": {**raw, "model": torch.nn.Linear(3, 3)}, "a list": [raw], "text": "model",
            "nothing": {}}
    return out


def zips(path, folder, bomb=10**9):
    """{name: bytes} of what a zip file can be made to claim, from a real checkpoint; bomb: bytes that a packed record becomes."""
    whole, files, made = zipfile.ZipFile(path), {}, os.path.join(folder, "made.zip")
    names = whole.namelist()
    big = next(name for name in names if name.endswith("data/0"))

    def pack(label, how=zipfile.ZIP_STORED, change=lambda name, data: data, more=()):
        with warnings.catch_warnings(), zipfile.ZipFile(made, "w", how) as file:
            warnings.simplefilter("ignore")  # of names that are there twice
            for name in names:
                file.writestr(name, change(name, whole.read(name)))
            for name, data in more:
                file.writestr(name, data)
        files[label] = pathlib.Path(made).read_bytes()

    pack("deflated", zipfile.ZIP_DEFLATED)
    pack("a bomb of zeros, deflated", zipfile.ZIP_DEFLATED, lambda name, data: bytes(bomb) if name == big else data)
    pack("data cut short", change=lambda name, data: data[:-100] if name == big else data)
    pack("data twice", more=[(big, b"\0" * 100)])
    pack("no data", change=lambda name, data: b"" if name == big else data)
    pack("another byte order", change=lambda name, data: b"middle" if name.endswith("byteorder") else data)
    pack("no pickle", change=lambda name, data: b"" if name.endswith("data.pkl") else data)
    pack("a path out of it", more=[("../../canary", b"x")])
    data = bytearray(pathlib.Path(path).read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24:at + 28] = (2**31).to_bytes(4, "little")  # the first record's size
    return {**files, "a record of 2 GiB, it says": bytes(data), "a zip of nothing": b"PK\x05\x06" + bytes(18),
            "a zip behind noise": bytes(99) + bytes(data)}


def checkpoints(tally, folder):
    rng, canary = np.random.default_rng(seed), os.path.join(folder, "canary")
    whole, settings = real_run(folder)
    raw, data, path = torch.load(whole, weights_only=True), whole.read_bytes(), os.path.join(folder, "hostile.pt")

    def turn(i, n=1):  # n of the scripts, in turn
        return [SCRIPTS[(n * i + j + seed) % len(SCRIPTS)] for j in range(n)]

    def hand(label, content, scripts=SCRIPTS, name="hostile.pt", want=""):
        target = os.path.join(folder, name)
        pathlib.Path(target).write_bytes(content)
        for script, work in readers(target, folder, settings).items():
            if script in scripts:
                named = ("ckpt.pt" if script == "resume" else name) + "|/data/" * label.startswith("config.data")  # a folder that it names
                tally(f"{script}: {label}", work, named, canary, want)

    hand("whole", data, want="valid")
    for tenth in range(10):
        hand(f"cut at {tenth} tenths", data[:len(data) * tenth // 10], want="refused")
    torch.save(raw, path, _use_new_zipfile_serialization=False)
    legacy = pathlib.Path(path).read_bytes()
    hand("legacy, whole", legacy, want="valid")
    for tenth in range(10):
        hand(f"legacy, cut at {tenth} tenths", legacy[:len(legacy) * tenth // 10], want="refused")
    for i in range(cases):
        hand(f"flip {i}", flipped(data, rng), turn(i))
        hand(f"legacy, flip {i}", flipped(legacy, rng), turn(i))
    for label, content in {"empty": b"", "text": b"hello\n" * 100, "zeros": bytes(10_000), "noise": rng.bytes(10_000), **zips(whole, folder)}.items():
        hand(label, content, want="" if label.startswith("another") else "refused")
    for i, (label, content) in enumerate(damaged(raw, canary).items()):
        for zipped in (True, False):
            try:
                torch.save(content, path, _use_new_zipfile_serialization=zipped)
            except (RuntimeError, TypeError, NotImplementedError, AttributeError, RecursionError, OverflowError, ValueError, pickle.PicklingError):
                continue  # torch does not write such a thing
            hand(label + " (legacy)" * (not zipped), pathlib.Path(path).read_bytes(), turn(i, 2) if zipped else turn(2 * i + 3))
    evil = {"model": Run(os.system, f"touch {canary}")}
    for protocol in range(6):
        for name in ("evil.bin", "evil.pt", "pytorch_model.bin"):
            hand(f"a bare pickle, protocol {protocol}", pickle.dumps(evil, protocol), name=name, want="refused")
    declared = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03." + pickle.dumps({"little_endian": True}, 2)
    bomb = declared + b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" \
        b"FloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x06" + (10**12).to_bytes(6, "little") \
        + b"NtQK\x00\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRss." + pickle.dumps(["0"], 2) \
        + struct.pack("<q", 10**12)
    hand("legacy, a storage of 1e12 numbers", bomb, want="refused")
    for script, args in (("analyze.py", []), ("train_lm.py", ["--eval_only"]), ("sample.py", []), ("saturate.py", [])):  # and as typed
        for name, content in (("cut.pt", data[:len(data) // 2]), ("evil.pt", pickle.dumps(evil))):
            target = os.path.join(folder, name)
            pathlib.Path(target).write_bytes(content)
            more = [f"--init_from={target}", f"--out_dir={folder}/out", "--dataset=text", "--block_size=32", f"--data_dir={settings['data_dir']}"] \
                if script.startswith("train") else [target]
            tally(f"the command line: {script} {name}", [script, *more, *args], name, canary, "refused")

# --------------------------------------------------------------------------------------------------------------- safetensors

def llama_like():
    """Tensors of two attention layers under Llama's names, {name: tensor}; 4 heads."""
    generator = torch.Generator().manual_seed(0)
    return {f"model.layers.{i}.self_attn.{name}_proj.weight": torch.randn(24, 24, generator=generator) for i in (0, 1) for name in "qkvo"}


def with_header(data, change):
    """The bytes of a .safetensors file whose header (a dict, in place) was changed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size:]


def headers(data):
    """{name: bytes} of .safetensors files whose headers lie, from a whole one."""
    first = min(json.loads(data[8:8 + int.from_bytes(data[:8], "little")]))

    def entry(**changes):
        return with_header(data, lambda header: header[first].update(changes))

    own = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])[first]
    begin, end = own["data_offsets"]
    out = {f"header length {size}": size.to_bytes(8, "little") + data[8:] for size in (0, 1, 7, 10**6, 2**31, 2**60, 2**64 - 1)}
    for label, offsets in (("overlap", [begin, end + 8]), ("beyond", [begin, 10**12]), ("backwards", [end, begin]), ("negative", [-8, end]),
                           ("one", [begin]), ("text", "ab"), ("fractions", [0.5, 1.5]), ("2**64", [begin, 2**64]), ("none", None)):
        out[f"offsets: {label}"] = entry(data_offsets=offsets)
    for shape in ([24], [24, 25], [-24, -24], [2**32, 2**32], [0, 24], [1, 24, 24], [24.0, 24], "24", None, [10**30], [576, 1], []):
        out[f"shape {shape}"] = entry(shape=shape)
    for kind in ("F8", "F128", "", None, 3, "f32", "I32", "U8", "BOOL", "F64", "BF16", "F8_E4M3"):
        out[f"dtype {kind}"] = entry(dtype=kind)
    text = json.dumps(own)
    return out | {
        "extra key": entry(more=1), "entry a list": with_header(data, lambda header: header.update({first: []})),
        "metadata of numbers": with_header(data, lambda header: header.update({"__metadata__": {"a": 1}})),
        "metadata a list": with_header(data, lambda header: header.update({"__metadata__": [1]})),
        "deep": with_header(data, lambda header: b"[" * 10**6), "deep dicts": with_header(data, lambda header: b'{"a":' * 10**5),
        "a list": with_header(data, lambda header: b"[1, 2]"), "no JSON": with_header(data, lambda header: b"\xff" * 99),
        "not UTF-8": with_header(data, lambda header: json.dumps(header).encode().replace(b"model", b"mod\xffl")),
        "a gap": with_header(data, lambda header: header.pop(first) and None),
        "key twice": with_header(data, lambda header: json.dumps(header)[:-1].encode() + f', "{first}": {text}}}'.encode()),
        "key thrice, other offsets": with_header(data, lambda header: json.dumps(header)[:-1].encode()
                                                 + f', "{first}": {text.replace(str(end), str(end + 4))}}}'.encode()),
        "bytes behind": data + b"\0" * 8,
        "a line break in a name": with_header(data, lambda header: header.update({"a\n\x1b[2Jb": header.pop(first)}))}


def safetensors(tally, folder):
    rng = np.random.default_rng(seed)
    path = os.path.join(folder, "model.safetensors")
    save_file(llama_like(), path)
    data = pathlib.Path(path).read_bytes()

    def hand(label, content, want="", **settings):
        pathlib.Path(path).write_bytes(content)
        return tally(label, main_of(analyze, [path], out_dir=os.path.join(folder, "out"), figure=False, device="cpu", n_head=4, **settings),
                     "model.safetensors", want=want)

    hand("whole", data, "valid")
    for tenth in range(10):
        hand(f"cut at {tenth} tenths", data[:len(data) * tenth // 10], "refused")
    for label, content in headers(data).items():
        hand(label, content)
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(cases):
        hand(f"header flip {i}", flipped(data[:header], rng) + data[header:])
        hand(f"data flip {i}", data[:header] + flipped(data[header:], rng))
    for label, value in (("nan", math.nan), ("inf", math.inf)):
        x = llama_like()
        x["model.layers.1.self_attn.k_proj.weight"][7, 3] = value
        save_file(x, path)
        outcome, _ = hand(label, pathlib.Path(path).read_bytes(), "refused")
        if "layer 1, qk" not in outcome.err or "head [1]" not in outcome.err:
            tally.rows[-1] = (f"the head is not named: {outcome.err}", *tally.rows[-1][1:])
    os.unlink(path)
    index = os.path.join(folder, "model.safetensors.index.json")
    save_file(llama_like(), os.path.join(folder, "part.safetensors"))
    shard = dict.fromkeys(llama_like(), "part.safetensors")
    names = {"up": "../../etc/passwd", "absolute": "/etc/passwd", "itself": "model.safetensors.index.json", "absent": "b.safetensors", "number": 1,
             "a folder": ".", "empty name": "", "NUL": "a\0b"}
    for label, value in {"whole": {"weight_map": shard}, **{label: {"weight_map": {"a": name}} for label, name in names.items()},
                         "list": {"weight_map": ["a"]}, "none": {}, "a list": [], "null": None, "empty": {"weight_map": {}}}.items():
        pathlib.Path(index).write_text(json.dumps(value))
        for given in (index, folder):
            tally(f"index: {label}", main_of(analyze, [str(given)], out_dir=os.path.join(folder, "out"), figure=False, device="cpu", n_head=4),
                  os.path.basename(folder), want="valid" if label == "whole" else "refused")
    for label, text in (("no JSON", "{"), ("deep", "[" * 10**6), ("huge int", '{"weight_map": ' + "9" * 10**5 + "}"), ("not UTF-8", "\udcff")):
        pathlib.Path(index).write_text(text, errors="surrogateescape")
        tally(f"index: {label}", main_of(analyze, [str(folder)], out_dir=os.path.join(folder, "out"), figure=False, device="cpu", n_head=4),
              os.path.basename(folder), want="refused")

# ------------------------------------------------------------------------------------------------------------ data and images

LIES = (None, True, -1, 0, 1.5, 2**40, 2**70, math.nan, math.inf, "", "x", "../x", "/etc/passwd", "a\0b", "x" * 10**5, [], [1], {}, {"a": []}, [[[]]])


def places(value, path=()):
    """Paths of all places in nested JSON."""
    yield path
    for key, x in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(x, (*path, key))


def put(value, path, x):
    """The same nested JSON with x at a place; x is KeyError: without it."""
    if not path:
        return x
    value = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and x is KeyError:
        del value[path[0]]
    else:
        value[path[0]] = put(value[path[0]], path[1:], x)
    return value


def lies(meta, rng):
    """(label, changed meta) for as many places and lies as there are cases."""
    every = [(path, x) for x in (*LIES, KeyError) for path in places(meta) if path or x is not KeyError]
    for i in rng.permutation(len(every))[:cases]:
        path, x = every[i]
        yield f"{'/'.join(map(str, path))} = {str(x)[:20]}", put(meta, path, x)


def data(tally, folder):
    rng, folder = np.random.default_rng(seed), pathlib.Path(folder)
    splits = {split: [rng.integers(0, 256, n) for n in sizes] for split, sizes in (("train", (3000, 1000)), ("val", [500]), ("test", [400]))}
    tiny = {**TINY, "data_dir": str(folder), "out_dir": str(folder / "out"), "overwrite": True}
    work = main_of(train_lm, **{**tiny, "max_iters": 3, "eval_interval": 2, "warmup_iters": 1})
    good = write_data(folder / "text", splits)
    meta, path = json.loads((good / "meta.json").read_text()), good / "meta.json"
    tally("whole", work, "text", want="valid")
    for label, changed in lies(meta, rng):
        path.write_text(json.dumps(changed))
        tally(f"meta.json: {label}", work, "text")
    for label, text in {"empty": b"", "no JSON": b"{", "deep": b"[" * 10**6, "not UTF-8": b"\xff\xfe", "NUL": bytes(100), "BOM": b"\xef\xbb\xbf{}",
                        "huge int": b'{"vocab_size": ' + b"9" * 10**5 + b"}", "a text": b'"splits"'}.items():
        path.write_bytes(text)
        tally(f"meta.json: {label}", work, "text", want="refused")
    write_data(good, splits)
    for name in ("train_00000.bin", "val_00000.bin", "test_00000.bin"):
        whole = (good / name).read_bytes()
        for label, content in {"odd length": whole[:-1], "empty": b"", "one more": whole + b"\0\0", "half": whole[:len(whole) // 2],
                               "flipped": flipped(whole, rng), "zeros": bytes(len(whole))}.items():
            (good / name).write_bytes(content)
            tally(f"{name}: {label}", work, name, want="refused")
        (good / name).unlink()
        tally(f"{name}: absent", work, name, want="refused")
        (good / name).mkdir()
        tally(f"{name}: a folder", work, name, want="refused")
        (good / name).rmdir()
        (good / name).write_bytes(whole)
    for split in splits:  # ids beyond the vocabulary, under true checksums: everywhere, and one in the middle or at the end
        for label, where in (("all", slice(None)), ("one", 150), ("the last", -1)):
            changed = {name: [x.copy() for x in files] for name, files in splits.items()}
            changed[split][-1][where] = 300
            write_data(good, changed)
            tally(f"ids beyond the vocabulary: {split}, {label}", main_of(train_lm, **{**tiny, "max_iters": 64}), "text",
                  want="" if (split, label) == ("train", "the last") else "refused")  # which no window of train reaches
    tally(*late_id(folder))
    if not (folder / "late" / "ckpt.pt").exists():
        tally.rows[-1] = ("the checkpoint before the damage is gone", *tally.rows[-1][1:])
    same = splits["train"][1]
    for label, files in (("the same bytes", {**splits, "val": [same]}), ("test the same bytes", {**splits, "test": [same]})):
        write_data(good, files)
        tally(f"overlap: {label}", work, "text", want="refused")
    write_data(good, splits)
    for how in (os.link, os.symlink):
        (good / "val_00000.bin").unlink()
        how(good / "train_00001.bin", good / "val_00000.bin")
        changed = put(meta, ("splits", "val"), {"tokens": 1000, "files": [{"name": "val_00000.bin", "tokens": 1000}]})
        path.write_text(json.dumps(changed))
        tally(f"overlap: {how.__name__}", work, "val_00000.bin", want="refused")
    path.write_text(json.dumps(put(meta, ("splits", "val"), meta["splits"]["train"])))
    tally("overlap: one list", work, "text", want="refused")
    path.write_bytes(b"{")
    tally("the command line", ["train_lm.py", f"--data_dir={folder}", "--dataset=text", f"--out_dir={folder}/new"], "text", want="refused")


def late_id(folder):
    """(label, work, name): one id beyond the vocabulary that training meets first at step 12; there are checkpoints of steps 0 and 10."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, 32 * 100 + 1)
    window = int(shuffled(100, 1337, 12 * 4, 1)[0])
    tokens[window * 32 + 5] = 999
    write_data(folder / "late_data", {"train": [tokens], "val": [tokens[:0], rng.integers(0, 256, 500)], "test": [rng.integers(0, 256, 400)]})
    return "an id beyond the vocabulary, met at step 12", main_of(train_lm, **{**TINY, "dataset": "late_data", "data_dir": str(folder)},
                                                                 out_dir=str(folder / "late")), "late_data"


def write_images(folder, rng):
    """A folder of some small pictures, as prepare_imagenet.py writes it; its meta."""
    import zlib
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"kind": "images", "classes": ["a", "b"], "short_side": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "source": "test", "splits": {}}
    for split, n in (("train", 12), ("val", 6), ("test", 6)):
        index = np.zeros(n, RECORD)
        for i in range(n):
            index[i] = i * 16 * 20 * 3, 16, 20, i % 2
        files = {f"{split}.bin": rng.bytes(n * 16 * 20 * 3), f"{split}.idx": index.tobytes()}
        for name, content in files.items():
            (folder / name).write_bytes(content)
        meta["splits"][split] = {"images": n, "files": [{"name": name, "bytes": len(x), "crc32": f"{zlib.crc32(x):08x}"}
                                                        for name, x in files.items()]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


def images(tally, folder):
    rng, folder = np.random.default_rng(seed), pathlib.Path(folder)
    meta, path = write_images(folder / "pics", rng), folder / "pics" / "meta.json"
    work = main_of(train_vit, dataset="pics", data_dir=str(folder), image_size=16, eval_resize=16, patch_size=8, n_layer=1, n_head=2, n_embd=16,
                   batch_size=4, total_batch_size=4, max_iters=2, warmup_iters=1, eval_interval=1, rank_interval=1, device="cpu", overwrite=True,
                   out_dir=str(folder / "out"))
    tally("whole", work, "pics", want="valid")
    for label, changed in lies(meta, rng):
        path.write_text(json.dumps(changed))
        tally(f"meta.json: {label}", work, "pics")
    path.write_text(json.dumps(meta))
    for name in ("train.bin", "train.idx", "val.idx", "test.bin"):
        whole = (folder / "pics" / name).read_bytes()
        for label, content in {"one less": whole[:-1], "empty": b"", "one more": whole + b"\0", "flipped": flipped(whole, rng),
                               "zeros": bytes(len(whole)), "ones": b"\xff" * len(whole)}.items():
            (folder / "pics" / name).write_bytes(content)
            tally(f"{name}: {label}", work, name if label != "empty" else "pics", want="refused")
        (folder / "pics" / name).write_bytes(whole)
    index = np.frombuffer((folder / "pics" / "train.idx").read_bytes(), RECORD).copy()
    for field, values in {"offset": (2**63, 2**64 - 1, 10**6), "height": (0, 65535), "width": (0, 65535), "label": (-1, 2, 2**31 - 1)}.items():
        for value in values:  # under a meta.json that gives no checksums
            changed = index.copy()
            changed[field][3] = value
            (folder / "pics" / "train.idx").write_bytes(changed.tobytes())
            files = [{"name": f["name"], "bytes": f["bytes"]} for f in meta["splits"]["train"]["files"]]
            path.write_text(json.dumps(put(meta, ("splits", "train", "files"), files)))
            tally(f"train.idx: {field} = {value}", work, "train.idx", want="refused")
    write_images(folder / "pics", rng)
    for kind in ("bin", "idx"):
        shutil.copy(folder / "pics" / f"train.{kind}", folder / "pics" / f"val.{kind}")
    both = json.loads(path.read_text())["splits"]["train"]
    path.write_text(json.dumps(put(meta, ("splits",), {"train": both, "test": meta["splits"]["test"], "val": {
        **both, "files": [{**f, "name": f["name"].replace("train", "val")} for f in both["files"]]}})))
    tally("overlap: the same bytes", work, "pics", want="refused")

# -------------------------------------------------------------------------------------------------------------------- configs

CONFIGS = {
    "syntax": "a = = 1", "unknown": "bach_size = 3", "type": 'batch_size = "x"', "nan": "learning_rate = float('nan')", "call": "import os",
    "code": "seed = __import__('os').system('true')", "deep": "seed = " + "(" * 10_000, "deep list": "seed = " + "[" * 500 + "]" * 500,
    "NUL": "seed = 1\0", "two": "seed, batch_size = 1, 2", "power": "seed = 9 ** 9 ** 9", "shift": "seed = 1 << 10**9", "division": "seed = 1 / 0",
    "minus": "-" * 5000 + "1", "huge int": "seed = " + "9" * 10_000, "huge float": "learning_rate = 1e999", "long": "x" * 10**6,
    "text times": "out_dir = 'a' * 10**9", "if": "if 1: seed = 2", "set": "seed = {1, 2}", "none": "seed = None", "bytes": "out_dir = b'x'",
    "sum": "seed = 1" + " + 1" * 5000, "line break": 'out_dir = "a\nb"'}


def configs(tally, folder):
    path = os.path.join(folder, "config.py")

    def hand(label, content, want="refused"):
        pathlib.Path(path).write_bytes(content)
        tally(label, lambda: configure(vars(train_lm), argv=[path]), "config.py", want=want)

    hand("whole", b'"""doc"""\nseed = 600 * 4  # x\n', "valid")
    for label, text in CONFIGS.items():
        hand(label, text.encode(), "" if label == "huge float" else "refused")  # an infinity is a float; trainers refuse it
    for label, content in {"not UTF-8": b"seed = 1 # \xff", "unknown encoding": b"# -*- coding: latin-99 -*-\nseed = 1", "zeros": bytes(1000),
                           "UTF-16": "seed = 1".encode("utf-16"), "utf-7": b"# -*- coding: utf-7 -*-\nseed = +AAA-",
                           "rot13": b"# -*- coding: rot13 -*-\nfrrq = 1"}.items():
        hand(label, content)
    tally("a folder", lambda: configure(vars(train_lm), argv=[folder + "/x.py"]), "x.py", want="refused")
    for script in ("train_lm.py", "analyze.py", "prepare_pile.py"):
        pathlib.Path(path).write_text("import os")
        tally(f"the command line: {script}", [script, path], "config.py", want="refused")

# ---------------------------------------------------------------------------------------------------------------------- jsonl

def bad_lines():
    """{reason in the report or "": lines (bytes) that are no document}; "" are documents all the same."""
    return {"broken JSON": [b"{", b"\xef\xbb\xbf{\"text\": \"bom\"}", b"nul\0", b"\0", b"[" * 100_000, b'{"text": "a"', b"NaN2", b"{'text': 'a'}"],
            "not a JSON object": [b"null", b"3", b'"text"', b"[1]", b"true"],
            "no key 'text'": [b"{}", b'{"Text": "a"}'],
            "'text' is not a string": [b'{"text": null}', b'{"text": 3}', b'{"text": ["a"]}', b'{"text": {}}'],
            "": [b'{"text": ' + b"9" * 10**4 + b"}",  # a number beyond json's limit, where there is one
                 b'{"text": "lone \\ud800 surrogate"}', b'{"text": "nul \\u0000"}', b'{"text": "a", "text": "twice"}', b'{"text": "a", "n": 1e999}']}


def jsonl(tally, folder):
    good = [json.dumps({"text": f"document {i} " * 5}).encode() for i in range(50)]
    folder = pathlib.Path(folder)

    def hand(label, lines, want, name="a.jsonl", **flags):
        (folder / "in").mkdir(exist_ok=True)
        for old in (folder / "in").iterdir():
            old.unlink()
        with open(folder / "in" / name, "wb") as file:
            for line in lines:
                file.write(line + b"\n")
        shutil.rmtree(folder / "data", ignore_errors=True)
        more = [f"--{key}={value}" for key, value in flags.items()]
        outcome, _ = tally(label, ["prepare_pile.py", f"--source={folder / 'in'}", "--dataset=x", f"--data_dir={folder / 'data'}", "--tokenizer=byte",
                                   "--workers=1", *more], "in", want=want)
        return outcome

    def counted(outcome, reason, n):
        if not re.search(rf"{n} {re.escape(reason)} \(", outcome.out):
            tally.rows[-1] = (f"{n} {reason} are not counted: {outcome.out[-300:]}", *tally.rows[-1][1:])
            print(f"WRONG jsonl: {tally.rows[-1][0]}", flush=True)

    for reason, lines in bad_lines().items():
        outcome = hand(reason or "documents", [*good[:25], *lines, *good[25:]], "valid")
        if reason:
            counted(outcome, reason, len(lines))
    counted(hand("invalid UTF-8", [*good, b'{"text": "\xff\xfe"}', b"\xc0\x80"], "valid"), "invalid UTF-8" if json_says_utf8() else "broken JSON", 2)
    counted(hand("a line of 100 MB", [*good[:25], b'{"text": "' + b"x" * 10**8 + b'"}', *good[25:]], "valid"), "longer than --max_document_mb", 1)
    counted(hand("100 MB of brackets", [*good[:25], b"[" * 10**8, *good[25:]], "valid", max_document_mb=128), "broken JSON", 1)
    hand("nothing but bad records", [line for reason, lines in bad_lines().items() if reason for line in lines], "refused")
    hand("empty", [], "refused")
    hand("noise", [np.random.default_rng(seed).bytes(10**6)], "refused")
    hand("a .zst that is none", good, "refused", name="a.jsonl.zst")
    hand("a .gz that is none", good, "refused", name="a.jsonl.gz")
    hand("a .parquet that is none", good, "refused", name="a.parquet")
    import gzip
    bomb = gzip.compress(bytes(2 * 10**8))  # 200 MB of NULs in one line
    (folder / "bomb").mkdir()
    (folder / "bomb" / "a.jsonl.gz").write_bytes(bomb)
    tally("a gzip bomb", ["prepare_pile.py", f"--source={folder / 'bomb'}", "--dataset=y", f"--data_dir={folder / 'data'}", "--tokenizer=byte",
                          "--workers=1"], "bomb", want="refused")


def json_says_utf8():
    """orjson's refusal of bad UTF-8 is a ValueError, then json's decode says what it is."""
    import prepare_pile
    try:
        prepare_pile.text_of(b"\xff", "jsonl", "text", 100)
    except ValueError as error:
        return "UTF-8" in str(error)

# ----------------------------------------------------------------------------------------------------------------------- fuzz

def strategies():
    from hypothesis import strategies as st
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    tree = st.recursive(scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
    return st, tree


def budget(n):
    from hypothesis import HealthCheck, Phase, settings
    return settings(max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate, Phase.shrink])


def fuzz_configurator(n, folder):
    """Any command line and config file: settings of their defaults' types, or one line and exit 2 (0 after --help)."""
    import contextlib
    import io
    from unittest import mock

    from hypothesis import given
    st, _ = strategies()
    defaults, path, seen = current(vars(train_lm)), os.path.join(folder, "c.py"), {"refused": 0, "valid": 0}
    names = st.sampled_from(sorted(defaults)) | st.text(max_size=12)
    odd = ["true", "1e5", "1e999", "-1", "nan", "[1]", "(" * 300, "1_0", "0x10"]
    values = st.text(max_size=12) | st.integers().map(str) | st.floats().map(str) | st.sampled_from(odd)
    flag = st.builds(lambda name, value, how: [f"--{name}={value}"] if how else [f"--{name}", value], names, values, st.booleans())
    line = st.builds(lambda name, value: f"{name} = {value}\n", names, values) | st.text(max_size=20)
    text = st.lists(line, max_size=4).map("".join).map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=60)

    @budget(n)
    @given(st.lists(flag, max_size=4), text, st.booleans())
    def run(argv, content, with_file):
        pathlib.Path(path).write_bytes(content)
        scope, err = {**vars(train_lm)}, io.StringIO()
        try:
            with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                configure(scope, "CKPT", [path] * with_file + [arg for args in argv for arg in args])
        except SystemExit as stop:
            seen["refused"] += 1
            assert stop.code == 0 and not err.getvalue() or stop.code == 2 and len(err.getvalue().splitlines()) == 1, (stop.code, err.getvalue())
            return
        seen["valid"] += 1
        for name, default in defaults.items():
            assert type(scope[name]) is type(default), (name, scope[name])
            assert scope[name] == scope[name], name
    with mock.patch("configurator.script_settings", lambda settings: dict(defaults)):  # for speed: the script is parsed once
        run()
    return seen


def fuzz_data(n, folder):
    """Any meta.json and any bytes: a ValueError of one line that names the folder, or ids in the vocabulary, or images in bounds."""
    from hypothesis import given
    st, tree = strategies()
    folder, seen, rng = pathlib.Path(folder), {"refused": 0, "valid": 0}, np.random.default_rng(0)
    write_data(folder / "t", {"train": [rng.integers(0, 256, 300)], "val": [rng.integers(0, 256, 60)], "test": [rng.integers(0, 256, 50)]})
    text, pixels = json.loads((folder / "t" / "meta.json").read_text()), write_images(folder / "p", rng)
    both = [("t", text, [*places(text)]), ("p", pixels, [*places(pixels)])]
    change = st.tuples(st.sampled_from(both), st.integers(0), st.one_of(st.just(KeyError), st.sampled_from(LIES[:18]), tree))

    def read(kind):
        for split in ("train", "val"):
            if kind == "t":
                x = TokenSplit(str(folder / kind), split, 8)
                ids, y = x.rows(np.arange(min(x.n_rows, 9)))
                assert ids.min() >= 0 and max(ids.max(), y.max()) < x.meta["vocab_size"] and str(x.fingerprint())
            else:
                x = ImageSplit(str(folder / kind), split)
                n = min(x.n_images, 3)
                x.read(np.arange(n), np.stack([np.zeros(n), np.zeros(n), x.heights[:n], x.widths[:n]], 1).astype(np.int64))
                assert x.labels.max() < len(x.meta["classes"]) and str(x.fingerprint())

    def checked(kind):
        try:
            read(kind)
            seen["valid"] += 1
        except ValueError as error:
            seen["refused"] += 1
            assert str(folder / kind) in str(error), error

    @budget(n)
    @given(st.lists(change, min_size=1, max_size=2), st.binary(max_size=80), st.integers(0, 3))
    def run(changes, noise, how):
        (kind, meta, paths), *_ = changes[0]
        for (other, *_), i, x in changes:
            if other == kind and (paths[i % len(paths)] or x is not KeyError):
                try:
                    meta = put(meta, paths[i % len(paths)], x)
                except (KeyError, IndexError, TypeError, ValueError):  # the first change took the second's place away
                    pass
        (folder / kind / "meta.json").write_bytes(noise if how == 0 else json.dumps(meta).encode())
        name = "train_00000.bin" if kind == "t" else "train.idx"
        whole = (folder / kind / name).read_bytes()
        if how == 1:
            (folder / kind / name).write_bytes((noise + whole)[:len(whole)] if len(noise) % 2 else noise)
        try:
            checked(kind)
        finally:
            (folder / kind / name).write_bytes(whole)
    run()
    return seen


def fuzz_loader(n, folder):
    """Mutated .safetensors and torch files: a ValueError that names the file, or heads that can be measured."""
    from hypothesis import given

    from nanorank.spectra import metrics, ov_factors, qk_factors
    st, tree = strategies()
    folder, seen = pathlib.Path(folder), {"refused": 0, "valid": 0}
    save_file(llama_like(), folder / "a.safetensors")
    torch.save({"model": llama_like(), "model_args": {"n_head": 4}, "iter_num": 3}, folder / "a.pt")
    torch.save({"model": llama_like(), "model_args": {"n_head": 4}, "iter_num": 3}, folder / "b.pt", _use_new_zipfile_serialization=False)
    wholes = {name: (folder / name).read_bytes() for name in ("a.safetensors", "a.pt", "b.pt")}
    header = json.loads(wholes["a.safetensors"][8:8 + int.from_bytes(wholes["a.safetensors"][:8], "little")])
    paths = [path for path in places(header) if path]
    starts = {"a.safetensors": len(json.dumps(header)) + 8, "a.pt": 1500, "b.pt": 2000}
    edit = st.tuples(st.booleans(), st.integers(0), st.binary(min_size=1, max_size=6))  # where in the file, most of them at its beginning
    lie = st.tuples(st.sampled_from(paths), st.one_of(st.just(KeyError), tree, st.integers(-10, 5000), st.lists(st.integers(-10, 5000), max_size=3)))

    @budget(n)
    @given(st.sampled_from(sorted(wholes)), st.lists(edit, min_size=1, max_size=3), st.lists(lie, max_size=2), st.booleans())
    def run(name, edits, liars, structured):
        data = wholes[name]
        if name == "a.safetensors" and structured and liars:
            def change(value):
                for path, x in liars:
                    try:
                        value = put(value, path, x)
                    except (KeyError, IndexError, TypeError, ValueError):
                        pass
                return json.dumps(value).encode()
            data = with_header(data, change)
        else:
            data = bytearray(data)
            for early, at, noise in edits:
                at %= starts[name] if early else len(data)
                data[at:at + len(noise)] = noise
        path = folder / f"x{name[1:]}"
        path.write_bytes(data)
        try:
            for layer in Checkpoint(str(path), n_head=4).attention_layers():
                for factors in (qk_factors(layer.W_Q, layer.W_K), ov_factors(layer.W_V, layer.P)):
                    try:
                        table = metrics(*factors)
                    except ValueError as error:
                        raise ValueError(f"{path}: {error}") from None
                    assert all(math.isfinite(x) for values in table.values() for x in values)
            seen["valid"] += 1
        except ValueError as error:
            seen["refused"] += 1
            assert str(path) in str(error), error
    run()
    return seen


FUZZERS = {"configurator": fuzz_configurator, "data": fuzz_data, "loader": fuzz_loader}

# ----------------------------------------------------------------------------------------------------------------------- main

def fuzz_rows(folder, n):
    """A row for each fuzzer; what fails is printed, shrunk by hypothesis."""
    for name, fuzzer in FUZZERS.items():
        began = time.monotonic()
        place = os.path.join(folder, name)
        os.makedirs(place)
        try:
            seen, wrong = fuzzer(n, place), 0
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc()
            print(f"WRONG fuzz {name}: {str(error)[:500]}", flush=True)
            seen, wrong = {"refused": 0, "valid": 0}, 1
        yield {"kind": f"fuzz {name}", "cases": sum(seen.values()) + wrong, **seen, "wrong": wrong, "worst_seconds": "", "worst_mb": "",
               "seconds": round(time.monotonic() - began, 1)}


def main(kinds):
    """Runs the kinds; returns the number of cases that are wrong."""
    unknown = [kind for kind in kinds if kind not in (*KINDS, "all")]
    if unknown:
        print(f"hostile.py: unknown kind {unknown[0]!r}: expects {', '.join(KINDS)} or all", file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, of the odd tensors that are made here
    rows = []
    for kind in KINDS if not kinds or "all" in kinds else kinds:
        with tempfile.TemporaryDirectory() as folder:
            if kind == "fuzz":
                found = fuzz_rows(folder, cases)
            else:
                tally = Tally(kind, folder)
                globals()[kind](tally, folder)
                found = [tally.row()]
            for row in found:
                rows.append(row)
                print(", ".join(f"{name} {x}" for name, x in row.items()), flush=True)
    if out:
        old = {row["kind"]: row for row in csv.DictReader(open(REPO / out))} if (REPO / out).exists() else {}
        table = {**old, **{row["kind"]: row for row in rows}}
        os.makedirs((REPO / out).parent, exist_ok=True)
        lines = [",".join(rows[0]), *(",".join(str(x) for x in row.values()) for row in table.values())]
        write_atomic(str(REPO / out), lambda file: file.write(("\n".join(lines) + "\n").encode()))
    total = {name: sum(row[name] for row in rows) for name in ("cases", "refused", "valid", "wrong")}
    print("all: " + ", ".join(f"{name} {x:,}" for name, x in total.items()))
    return total["wrong"]


if __name__ == "__main__":
    raise SystemExit(1 if main(configure(globals(), positional="[KIND ...]")) else 0)

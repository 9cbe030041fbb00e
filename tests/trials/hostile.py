"""
Hands rotten, lying and malicious files to the scripts that read them: each case must end in one line and
exit 2, or in finite numbers.

    python tests/trials/hostile.py                          # all kinds, some minutes
    python tests/trials/hostile.py checkpoints safetensors  # also data, images, configs, jsonl, fuzz
    python tests/trials/hostile.py fuzz --cases=20000       # configurator, data readers, loader; hypothesis

A case is a file and a script that reads it, run in a forked child of this process; some go through the
command line itself. Refused: exit 2 and one line that names the file. Valid: exit 0 and no number that is not
finite. A damaged file is valid where nothing can tell, such as a flipped bit of a .safetensors weight: that
format has no checksums. Anything else is wrong: it is printed, and the trial ends with status 1. Code hidden
in a pickle must not run either. Writes results/trust/hostile.csv.
"""
import csv
import gzip
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings

REPO = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import numpy as np
import torch
from conftest import TINY, write_data
from safetensors.torch import save_file
from trials import harness
from trials.fuzz import FUZZERS
from trials.harness import Tally, attempt, main_of
from trials.spoilt import (
    BAD_JSON,
    BAD_LINES,
    CONFIGS,
    CONFIGS_EITHER_WAY,
    ODD_LINES,
    Run,
    damaged,
    flipped,
    headers,
    legacy_bomb,
    lies,
    llama_like,
    put,
    write_images,
    zips,
)

import analyze
import train_lm
import train_vit
from configurator import configure
from nanorank.errors import UserError, user_errors
from nanorank.files import write_atomic
from nanorank.images import RECORD
from nanorank.rng import shuffled
from scripts import sample, saturate

cases = 200                         # random cases (bit flips, mutations); of fuzz: examples a target
seed = 0                            # of the random cases
most_seconds = 30.0                 # a case may take, wall clock
most_mb = 1000.0                    # of memory a case may add to what the imports take, MB
out = "results/trust/hostile.csv"   # a row a kind; empty: none

KINDS = ("checkpoints", "safetensors", "data", "images", "configs", "jsonl", "fuzz")

# ------------------------------------------------------------ torch's checkpoints

def real_run(folder):
    """A run folder of two steps that train_lm.py made, its data beside it; (path of ckpt.pt, settings)."""
    folder = pathlib.Path(folder)
    rng = np.random.default_rng(1)
    sizes = {"train": 4000, "val": 500, "test": 400}
    write_data(folder / "data" / "text", {split: [rng.integers(0, 256, n)] for split, n in sizes.items()})
    settings = {**TINY, "data_dir": str(folder / "data"), "max_iters": 2, "eval_interval": 1}
    settings["warmup_iters"] = 1
    done = attempt(main_of(train_lm, **settings, out_dir=str(folder / "run")), folder)
    assert done.code == 0, done.err
    return folder / "run" / "ckpt.pt", settings


def readers(path, folder, settings):
    """{name: work} of every script that reads a checkpoint; train_lm.py does so in two ways."""
    path = str(path)
    scratch = os.path.join(folder, "out")

    def resume():
        run = os.path.join(folder, "resumed")
        shutil.rmtree(run, ignore_errors=True)
        os.makedirs(run)
        shutil.copy(path, os.path.join(run, "ckpt.pt"))
        main_of(train_lm, **{**settings, "max_iters": 3, "out_dir": run, "init_from": "resume"})()

    drawing = {"out_dir": scratch, "figure": False, "device": "cpu"}
    start = {**settings, "init_from": path, "out_dir": scratch, "eval_only": True}
    return {
        "analyze": main_of(analyze, [path], **drawing),
        "init_from": main_of(train_lm, **start),
        "resume": resume,
        "sample": main_of(sample, path, device="cpu", max_new_tokens=3),
        "saturate": main_of(saturate, [path], **drawing, samples=2, curves=False, reinit=False,
                            data_dir=settings["data_dir"]),
    }


SCRIPTS = ("analyze", "init_from", "resume", "sample", "saturate")


def checkpoints(tally, folder):
    rng = np.random.default_rng(seed)
    canary = os.path.join(folder, "canary")
    whole, settings = real_run(folder)
    raw = torch.load(whole, weights_only=True)
    data = whole.read_bytes()

    def in_turn(i, n=1):  # n of the scripts
        return [SCRIPTS[(n * i + j + seed) % len(SCRIPTS)] for j in range(n)]

    def hand(label, content, scripts=SCRIPTS, name="hostile.pt", want=""):
        target = os.path.join(folder, name)
        pathlib.Path(target).write_bytes(content)
        for script, work in readers(target, folder, settings).items():
            if script not in scripts:
                continue
            word = "ckpt.pt" if script == "resume" else name
            if label.startswith("config.data"):  # it names a folder, which the line may name instead
                word += "|/data/"
            tally(f"{script}: {label}", work, word, canary, want)

    def written(content, zipped=True):
        """The bytes that torch.save makes of it, None where it makes none."""
        path = os.path.join(folder, "written.pt")
        try:
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
        except (RuntimeError, TypeError, AttributeError, OverflowError, ValueError, pickle.PicklingError):
            return None
        return pathlib.Path(path).read_bytes()

    # whole, cut, flipped
    legacy = written(raw, zipped=False)
    for kind, content in (("", data), ("legacy, ", legacy)):
        hand(f"{kind}whole", content, want="valid")
        for tenth in range(10):
            hand(f"{kind}cut at {tenth} tenths", content[:len(content) * tenth // 10], want="refused")
    for i in range(cases):
        hand(f"flip {i}", flipped(data, rng), in_turn(i))
        hand(f"legacy, flip {i}", flipped(legacy, rng), in_turn(i))

    # no checkpoint, or a zip that lies
    noise = {"empty": b"", "text": b"hello\n" * 100, "zeros": bytes(10_000), "noise": rng.bytes(10_000)}
    for label, content in {**noise, **zips(whole, folder)}.items():
        hand(label, content, want="" if label == "another byte order" else "refused")
    hand("legacy, a storage of 1e12 numbers", legacy_bomb(), want="refused")

    # other contents
    for i, (label, content) in enumerate(damaged(raw, canary).items()):
        zipped = written(content)
        if zipped:
            hand(label, zipped, in_turn(i, 2))
        unzipped = written(content, zipped=False)
        if unzipped:
            hand(f"{label} (legacy)", unzipped, in_turn(2 * i + 3))
    evil = {"model": Run(os.system, f"touch {canary}")}
    for protocol in range(6):
        for name in ("evil.bin", "evil.pt", "pytorch_model.bin"):
            content = pickle.dumps(evil, protocol)
            hand(f"a bare pickle, protocol {protocol}", content, name=name, want="refused")

    # the command line itself
    data_flags = ["--dataset=text", f"--data_dir={settings['data_dir']}", "--block_size=32"]
    for name, content in (("cut.pt", data[:len(data) // 2]), ("evil.pt", pickle.dumps(evil))):
        target = os.path.join(folder, name)
        pathlib.Path(target).write_bytes(content)
        commands = (
            ["analyze.py", target],
            ["train_lm.py", f"--init_from={target}", f"--out_dir={folder}/out", *data_flags, "--eval_only"],
            ["-m", "scripts.sample", target],
            ["-m", "scripts.saturate", target],
        )
        for command in commands:
            tally(f"the command line: {' '.join(command[:2])}", command, name, canary, "refused")

# ------------------------------------------------------------ safetensors

def safetensors(tally, folder):
    rng = np.random.default_rng(seed)
    path = os.path.join(folder, "model.safetensors")
    save_file(llama_like(), path)
    data = pathlib.Path(path).read_bytes()
    settings = {"out_dir": os.path.join(folder, "out"), "figure": False, "device": "cpu", "n_head": 4}

    def hand(label, content, want=""):
        pathlib.Path(path).write_bytes(content)
        return tally(label, main_of(analyze, [path], **settings), "model.safetensors", want=want)

    hand("whole", data, "valid")
    for tenth in range(10):
        hand(f"cut at {tenth} tenths", data[:len(data) * tenth // 10], "refused")
    for label, content in headers(data).items():
        hand(label, content)
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(cases):
        hand(f"header flip {i}", flipped(data[:header], rng) + data[header:])
        hand(f"data flip {i}", data[:header] + flipped(data[header:], rng))

    for value in (math.nan, math.inf):  # in the second head of layer 1
        tensors = llama_like()
        tensors["model.layers.1.self_attn.k_proj.weight"][7, 3] = value
        save_file(tensors, path)
        outcome = hand(str(value), pathlib.Path(path).read_bytes(), "refused")
        if "layer 1, qk" not in outcome.err or "head [1]" not in outcome.err:
            tally.wrong(f"the head is not named: {outcome.err}")
    os.unlink(path)
    indices(tally, folder, settings)


def indices(tally, folder, settings):
    """Indices of shards that name what is no shard of theirs."""
    index = os.path.join(folder, "model.safetensors.index.json")
    save_file(llama_like(), os.path.join(folder, "part.safetensors"))
    whole = {"weight_map": dict.fromkeys(llama_like(), "part.safetensors")}

    def hand(text, want="refused"):
        pathlib.Path(index).write_text(text, errors="surrogateescape")
        for given in (index, folder):
            work = main_of(analyze, [str(given)], **settings)
            tally(f"index: {text[:80]}", work, os.path.basename(folder), want=want)

    hand(json.dumps(whole), "valid")
    for shard in ("../../etc/passwd", "/etc/passwd", "model.safetensors.index.json", "b.safetensors", ".", "",
                  "a\0b", 1):
        hand(json.dumps({"weight_map": {"a": shard}}))
    for value in ({"weight_map": ["a"]}, {}, [], None, {"weight_map": {}}):
        hand(json.dumps(value))
    for text in ("{", "[" * 10**6, '{"weight_map": ' + "9" * 10**5 + "}", "\udcff"):
        hand(text)

# ------------------------------------------------------------ token files

def data(tally, folder):
    rng = np.random.default_rng(seed)
    folder = pathlib.Path(folder)
    sizes = {"train": (3000, 1000), "val": [500], "test": [400]}
    splits = {split: [rng.integers(0, 256, n) for n in every] for split, every in sizes.items()}
    good = write_data(folder / "text", splits)
    path = good / "meta.json"
    meta = json.loads(path.read_text())
    tiny = {**TINY, "data_dir": str(folder), "out_dir": str(folder / "out"), "overwrite": True}
    work = main_of(train_lm, **{**tiny, "max_iters": 3, "eval_interval": 2, "warmup_iters": 1})
    tally("whole", work, "text", want="valid")

    for label, changed in lies(meta, rng, cases):
        path.write_text(json.dumps(changed))
        tally(f"meta.json: {label}", work, "text")
    for label, text in BAD_JSON.items():
        path.write_bytes(text)
        tally(f"meta.json: {label}", work, "text", want="refused")
    write_data(good, splits)

    for name in ("train_00000.bin", "val_00000.bin", "test_00000.bin"):
        file = good / name
        whole = file.read_bytes()
        half = whole[:len(whole) // 2]
        contents = {"odd length": whole[:-1], "empty": b"", "one more": whole + b"\0\0", "half": half,
                    "flipped": flipped(whole, rng), "zeros": bytes(len(whole))}
        for label, content in contents.items():
            file.write_bytes(content)
            tally(f"{name}: {label}", work, name, want="refused")
        file.unlink()
        tally(f"{name}: absent", work, name, want="refused")
        file.mkdir()
        tally(f"{name}: a folder", work, name, want="refused")
        file.rmdir()
        file.write_bytes(whole)

    # ids beyond the vocabulary, under true checksums: everywhere, and one in the middle or at the end
    for split in splits:
        for label, where in (("all", slice(None)), ("one", 150), ("the last", -1)):
            changed = {name: [x.copy() for x in files] for name, files in splits.items()}
            changed[split][-1][where] = 300
            write_data(good, changed)
            unread = (split, label) == ("train", "the last")  # no window of train reaches it
            longer = main_of(train_lm, **{**tiny, "max_iters": 64})
            want = "" if unread else "refused"
            tally(f"ids beyond the vocabulary: {split}, {label}", longer, "text", want=want)
    tally("an id beyond the vocabulary, met at step 12", late_id(folder), "late_data")
    if not (folder / "late" / "ckpt.pt").exists():
        tally.wrong("the checkpoint before the damage is gone")

    # splits that overlap
    for split in ("val", "test"):
        write_data(good, {**splits, split: [splits["train"][1]]})
        tally(f"overlap: {split}, the same bytes", work, "text", want="refused")
    write_data(good, splits)
    for link in (os.link, os.symlink):
        (good / "val_00000.bin").unlink()
        link(good / "train_00001.bin", good / "val_00000.bin")
        linked = {"tokens": 1000, "files": [{"name": "val_00000.bin", "tokens": 1000}]}
        path.write_text(json.dumps(put(meta, ("splits", "val"), linked)))
        tally(f"overlap: {link.__name__}", work, "val_00000.bin", want="refused")
    path.write_text(json.dumps(put(meta, ("splits", "val"), meta["splits"]["train"])))
    tally("overlap: one list", work, "text", want="refused")

    path.write_bytes(b"{")
    command = ["train_lm.py", f"--data_dir={folder}", "--dataset=text", f"--out_dir={folder}/new"]
    tally("the command line", command, "text", want="refused")


def late_id(folder):
    """A run on data, in late_data, with one id beyond the vocabulary, which training meets first at step 12.

    There are checkpoints of steps 0 and 10 by then."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, 32 * 100 + 1)
    window = int(shuffled(100, 1337, 12 * 4, 1)[0])  # the first that step 12 reads, 4 windows a step
    tokens[window * 32 + 5] = 999
    val = [tokens[:0], rng.integers(0, 256, 500)]
    write_data(folder / "late_data", {"train": [tokens], "val": val, "test": [rng.integers(0, 256, 400)]})
    settings = {**TINY, "dataset": "late_data", "data_dir": str(folder), "out_dir": str(folder / "late")}
    return main_of(train_lm, **settings)

# ------------------------------------------------------------ image files

def images(tally, folder):
    rng = np.random.default_rng(seed)
    folder = pathlib.Path(folder)
    pics = folder / "pics"
    path = pics / "meta.json"
    meta = write_images(pics, rng)
    work = main_of(
        train_vit, dataset="pics", data_dir=str(folder), out_dir=str(folder / "out"), overwrite=True,
        image_size=16, eval_resize=16, patch_size=8, n_layer=1, n_head=2, n_embd=16, device="cpu",
        batch_size=4, total_batch_size=4, max_iters=2, warmup_iters=1, eval_interval=1, rank_interval=1)
    tally("whole", work, "pics", want="valid")

    for label, changed in lies(meta, rng, cases):
        path.write_text(json.dumps(changed))
        tally(f"meta.json: {label}", work, "pics")
    path.write_text(json.dumps(meta))

    for name in ("train.bin", "train.idx", "val.idx", "test.bin"):
        whole = (pics / name).read_bytes()
        contents = {"one less": whole[:-1], "one more": whole + b"\0", "flipped": flipped(whole, rng),
                    "zeros": bytes(len(whole)), "ones": b"\xff" * len(whole), "empty": b""}
        for label, content in contents.items():
            (pics / name).write_bytes(content)
            tally(f"{name}: {label}", work, "pics" if label == "empty" else name, want="refused")
        (pics / name).write_bytes(whole)

    # an index that lies, under a meta.json without checksums
    index = np.frombuffer((pics / "train.idx").read_bytes(), RECORD)
    files = [{"name": file["name"], "bytes": file["bytes"]} for file in meta["splits"]["train"]["files"]]
    path.write_text(json.dumps(put(meta, ("splits", "train", "files"), files)))
    for field, values in {"offset": (2**63, 2**64 - 1, 10**6), "height": (0, 65535), "width": (0, 65535),
                          "label": (-1, 2, 2**31 - 1)}.items():
        for value in values:
            changed = index.copy()
            changed[field][3] = value
            (pics / "train.idx").write_bytes(changed.tobytes())
            tally(f"train.idx: {field} = {value}", work, "train.idx", want="refused")

    # val is a copy of train
    meta = write_images(pics, rng)
    copies = []
    for file in meta["splits"]["train"]["files"]:
        name = file["name"].replace("train", "val")
        shutil.copy(pics / file["name"], pics / name)
        copies.append({**file, "name": name})
    val = {**meta["splits"]["train"], "files": copies}
    path.write_text(json.dumps(put(meta, ("splits", "val"), val)))
    tally("overlap: the same bytes", work, "pics", want="refused")

# ------------------------------------------------------------ config files

def configs(tally, folder):
    path = os.path.join(folder, "config.py")

    def hand(label, content, want):
        pathlib.Path(path).write_bytes(content)
        tally(label, lambda: configure(vars(train_lm), argv=[path]), "config.py", want=want)

    hand("whole", b'"""doc"""\nseed = 600 * 4  # x\n', "valid")
    for label, text in CONFIGS.items():
        hand(label, text.encode(), "refused")
    for label, content in CONFIGS_EITHER_WAY.items():
        hand(label, content, "")
    tally("a folder", lambda: configure(vars(train_lm), argv=[f"{folder}/x.py"]), "x.py", want="refused")
    for script in ("train_lm.py", "analyze.py", "prepare_pile.py"):
        pathlib.Path(path).write_text("import os")
        tally(f"the command line: {script}", [script, path], "config.py", want="refused")

# ------------------------------------------------------------ JSON lines

def jsonl(tally, folder):
    folder = pathlib.Path(folder)
    source = folder / "in"
    good = [json.dumps({"text": f"document {i} " * 5}).encode() for i in range(50)]
    bad = [line for lines in BAD_LINES.values() for line in lines]

    def prepare(label, want, *more):
        shutil.rmtree(folder / "data", ignore_errors=True)
        command = ["prepare_pile.py", f"--source={source}", "--dataset=x", f"--data_dir={folder / 'data'}",
                   "--tokenizer=byte", "--workers=1", *more]
        return tally(label, command, "in", want=want)

    def write(name, content):
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        (source / name).write_bytes(content)

    def hand(label, lines, want, name="a.jsonl"):
        write(name, b"".join(line + b"\n" for line in lines))
        return prepare(label, want)

    def counted(outcome, reason, n):
        if not re.search(rf"{n} {re.escape(reason)} \(", outcome.out):
            tally.wrong(f"{n} {reason} are not counted: {outcome.out[-300:]}")

    for reason, lines in BAD_LINES.items():
        counted(hand(reason, [*good[:25], *lines, *good[25:]], "valid"), reason, len(lines))
    hand("odd documents", [*good[:25], *ODD_LINES, *good[25:]], "valid")
    outcome = hand("invalid UTF-8", [*good, b'{"text": "\xff\xfe"}', b"\xc0\x80"], "valid")
    counted(outcome, "invalid UTF-8" if json_says_utf8() else "broken JSON", 2)
    outcome = hand("100 MB of text", [*good[:25], b'{"text": "' + b"x" * 10**8 + b'"}', *good[25:]], "valid")
    counted(outcome, "longer than --max_document_mb", 1)
    write("a.jsonl", b"\n".join([*good[:25], b"[" * 10**8, *good[25:]]))
    counted(prepare("100 MB of brackets", "valid", "--max_document_mb=128"), "broken JSON", 1)

    hand("nothing but bad records", bad, "refused")
    hand("empty", [], "refused")
    hand("noise", [np.random.default_rng(seed).bytes(10**6)], "refused")
    for name in ("a.jsonl.zst", "a.jsonl.gz", "a.parquet"):
        hand(f"no {name}", good, "refused", name)
    write("a.jsonl.gz", gzip.compress(bytes(2 * 10**8)))  # 200 MB of NULs in one line
    prepare("a gzip bomb", "refused")


def json_says_utf8():
    """Whether the JSON reader here (orjson or json) tells bad UTF-8 from other bad JSON."""
    import prepare_pile
    try:
        prepare_pile.text_of(b"\xff", "jsonl", "text", 100)
    except ValueError as error:
        return "UTF-8" in str(error)

# ------------------------------------------------------------ main

def fuzz(folder):
    """Yields a row for each fuzzer; prints what fails, as hypothesis has shrunk it."""
    for name, fuzzer in FUZZERS.items():
        began = time.monotonic()
        place = os.path.join(folder, name)
        os.makedirs(place)
        wrong = 0
        seen = {"refused": 0, "valid": 0}
        try:
            seen = fuzzer(cases, place)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            traceback.print_exc()
            print(f"WRONG fuzz {name}: {str(error)[:500]}", flush=True)
            wrong = 1
        yield {"kind": f"fuzz {name}", "cases": sum(seen.values()) + wrong, **seen, "wrong": wrong,
               "worst_seconds": "", "worst_mb": "", "seconds": round(time.monotonic() - began, 1)}


def write_table(path, rows):
    """Writes the rows to a CSV file, in place of those of the same kinds."""
    table = {}
    if path.exists():
        with open(path, newline="") as file:
            table = {row["kind"]: row for row in csv.DictReader(file)}
    table.update({row["kind"]: row for row in rows})
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in table.values())]
    os.makedirs(path.parent, exist_ok=True)
    write_atomic(str(path), lambda file: file.write(("\n".join(lines) + "\n").encode()))


def main(kinds):
    """Runs the kinds; returns the number of cases that are wrong."""
    for kind in kinds:
        if kind not in (*KINDS, "all"):
            raise UserError(f"unknown kind {kind!r}: expects {', '.join(KINDS)} or all")
    if not kinds or "all" in kinds:
        kinds = KINDS
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, about the odd tensors that are made here
    harness.most_seconds = most_seconds
    harness.most_mb = most_mb

    rows = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            if kind == "fuzz":
                found = list(fuzz(folder))
            else:
                tally = Tally(kind, folder)
                globals()[kind](tally, folder)
                found = [tally.row()]
        for row in found:
            print(", ".join(f"{name} {x}" for name, x in row.items()), flush=True)
        rows += found
    if out:
        write_table(REPO / out, rows)
    total = {name: sum(row[name] for row in rows) for name in ("cases", "refused", "valid", "wrong")}
    print("all: " + ", ".join(f"{name} {x:,}" for name, x in total.items()))
    return total["wrong"]


if __name__ == "__main__":
    with user_errors("hostile.py"):
        wrong = main(configure(globals(), positional="[KIND ...]"))
    raise SystemExit(1 if wrong else 0)

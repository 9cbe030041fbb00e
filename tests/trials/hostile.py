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
import gzip
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import numpy as np
import torch
from conftest import TINY, write_data
from safetensors.torch import save_file
from trials import spoilt
from trials.fuzz import FUZZERS
from trials.harness import Tally, attempt, main_of
from trials.programs import write_table
from trials.spoilt import flipped, lies, llama_like, put, write_images

import analyze
import train_lm
import train_vit
from configurator import configure
from nanorank.errors import UserError, user_errors
from nanorank.images import RECORD
from nanorank.rng import shuffled
from scripts import sample, saturate

cases = 200                         # random cases (bit flips, mutations); of fuzz: examples a target
seed = 0                            # of the random cases
out = "results/trust/hostile.csv"   # a row a kind; empty: none

KINDS = ("checkpoints", "safetensors", "data", "images", "configs", "jsonl", "fuzz")
SCRIPTS = ("analyze", "init_from", "resume", "sample", "saturate")  # train_lm.py: two of them


def tenths(content):
    """(label, a beginning of the bytes) at each tenth."""
    return [(f"cut at {i} tenths", content[:len(content) * i // 10]) for i in range(10)]


def tiny_lm(data_dir, out_dir, **settings):
    """A run of train_lm.py on a folder made by write_data(data_dir / "text")."""
    return main_of(train_lm, **{**TINY, "data_dir": str(data_dir), "out_dir": str(out_dir), **settings})

# ------------------------------------------------------------ torch's checkpoints

def checkpoints(tally, folder):
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    canary = str(folder / "canary")
    data_dir = folder / "data"
    sizes = {"train": 4000, "val": 500, "test": 400}
    tokens = np.random.default_rng(1)
    write_data(data_dir / "text", {split: [tokens.integers(0, 256, n)] for split, n in sizes.items()})
    short = {"max_iters": 2, "eval_interval": 1, "warmup_iters": 1}
    done = attempt(tiny_lm(data_dir, folder / "run", **short), folder)
    assert done.code == 0, done.err
    whole = folder / "run" / "ckpt.pt"
    raw = torch.load(whole, weights_only=True)
    data = whole.read_bytes()

    def readers(path):
        """{name: work} of every script that reads the checkpoint."""
        scratch = str(folder / "out")
        resumed = folder / "resumed"

        def resume():
            shutil.rmtree(resumed, ignore_errors=True)
            resumed.mkdir()
            shutil.copy(path, resumed / "ckpt.pt")
            tiny_lm(data_dir, resumed, **{**short, "max_iters": 3}, init_from="resume")()

        drawing = {"out_dir": scratch, "figure": False, "device": "cpu"}
        return {
            "analyze": main_of(analyze, [path], **drawing),
            "init_from": tiny_lm(data_dir, scratch, **short, init_from=path, eval_only=True),
            "resume": resume,
            "sample": main_of(sample, path, device="cpu", max_new_tokens=3),
            "saturate": main_of(saturate, [path], **drawing, samples=2, curves=False, reinit=False,
                                data_dir=str(data_dir)),
        }

    def in_turn(i, n=1):  # n of the scripts
        return [SCRIPTS[(n * i + j + seed) % len(SCRIPTS)] for j in range(n)]

    def hand(label, content, scripts=SCRIPTS, name="hostile.pt", want=""):
        (folder / name).write_bytes(content)
        works = readers(str(folder / name))
        for script in scripts:
            word = "ckpt.pt" if script == "resume" else name
            if label.startswith("config.data"):  # it names a folder, which the line may name instead
                word += "|/data/"
            tally(f"{script}: {label}", works[script], word, canary, want)

    def written(content, zipped=True):
        """The bytes that torch.save makes of it, None where it makes none."""
        path = folder / "written.pt"
        try:
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
        except (RuntimeError, TypeError, AttributeError, OverflowError, ValueError, pickle.PicklingError):
            return None
        return path.read_bytes()

    # whole, cut, flipped
    for kind, content in (("", data), ("legacy, ", written(raw, zipped=False))):
        hand(f"{kind}whole", content, want="valid")
        for label, part in tenths(content):
            hand(kind + label, part, want="refused")
        for i in range(cases):
            hand(f"{kind}flip {i}", flipped(content, rng), in_turn(i))

    # no checkpoint, or a zip that lies
    noise = {"empty": b"", "text": b"hello\n" * 100, "zeros": bytes(10_000), "noise": rng.bytes(10_000)}
    for label, content in {**noise, **spoilt.zips(whole, folder)}.items():
        hand(label, content, want="" if label == "another byte order" else "refused")
    hand("legacy, a storage of 1e12 numbers", spoilt.legacy_bomb(), want="refused")

    # other contents
    for i, (label, content) in enumerate(spoilt.damaged(raw, canary).items()):
        for kind, scripts in (("", in_turn(i, 2)), (" (legacy)", in_turn(2 * i + 3))):
            made = written(content, zipped=not kind)
            if made:
                hand(label + kind, made, scripts)
    evil = {"model": spoilt.Run(os.system, f"touch {canary}")}
    for protocol in range(6):
        for name in ("evil.bin", "evil.pt", "pytorch_model.bin"):
            content = pickle.dumps(evil, protocol)
            hand(f"a bare pickle, protocol {protocol}", content, name=name, want="refused")

    # the command line itself
    lm = [f"--out_dir={folder}/out", "--dataset=text", f"--data_dir={data_dir}", "--block_size=32"]
    for name, content in (("cut.pt", data[:len(data) // 2]), ("evil.pt", pickle.dumps(evil))):
        target = str(folder / name)
        Path(target).write_bytes(content)
        for command in (["analyze.py", target], ["train_lm.py", f"--init_from={target}", *lm, "--eval_only"],
                        ["-m", "scripts.sample", target], ["-m", "scripts.saturate", target]):
            tally(f"the command line: {' '.join(command[:2])}", command, name, canary, "refused")

# ------------------------------------------------------------ safetensors

def safetensors(tally, folder):
    rng = np.random.default_rng(seed)
    path = Path(folder, "model.safetensors")
    save_file(llama_like(), path)
    data = path.read_bytes()
    settings = {"out_dir": os.path.join(folder, "out"), "figure": False, "device": "cpu", "n_head": 4}

    def hand(label, content, want=""):
        path.write_bytes(content)
        return tally(label, main_of(analyze, [str(path)], **settings), "model.safetensors", want=want)

    hand("whole", data, "valid")
    for label, content in tenths(data):
        hand(label, content, "refused")
    for label, content in spoilt.headers(data).items():
        hand(label, content)
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(cases):
        hand(f"header flip {i}", flipped(data[:header], rng) + data[header:])
        hand(f"data flip {i}", data[:header] + flipped(data[header:], rng))

    for value in (math.nan, math.inf):  # in the second head of layer 1
        tensors = llama_like()
        tensors["model.layers.1.self_attn.k_proj.weight"][7, 3] = value
        save_file(tensors, path)
        outcome = hand(str(value), path.read_bytes(), "refused")
        if "layer 1, qk" not in outcome.err or "head [1]" not in outcome.err:
            tally.wrong(f"the head is not named: {outcome.err}")
    path.unlink()

    # indices of shards that name what is no shard of theirs
    index = Path(folder, "model.safetensors.index.json")
    save_file(llama_like(), os.path.join(folder, "part.safetensors"))

    def hand_index(text, want="refused"):
        index.write_text(text, errors="surrogateescape")
        for given in (str(index), str(folder)):
            work = main_of(analyze, [given], **settings)
            tally(f"index: {text[:80]}", work, os.path.basename(folder), want=want)

    hand_index(json.dumps({"weight_map": dict.fromkeys(llama_like(), "part.safetensors")}), "valid")
    for shard in ("../../etc/passwd", "/etc/passwd", index.name, "b.safetensors", ".", "", "a\0b", 1):
        hand_index(json.dumps({"weight_map": {"a": shard}}))
    for value in ({"weight_map": ["a"]}, {}, [], None, {"weight_map": {}}):
        hand_index(json.dumps(value))
    for text in ("{", "[" * 10**6, '{"weight_map": ' + "9" * 10**5 + "}", "\udcff"):
        hand_index(text)

# ------------------------------------------------------------ token files

def rot(tally, folder, names, work, rng):
    """A whole data folder, then lies in its meta.json and damage to the files `names`. Returns its meta."""
    path = folder / "meta.json"
    text = path.read_bytes()
    tally("whole", work, folder.name, want="valid")
    for label, changed in lies(json.loads(text), rng, cases):
        path.write_text(json.dumps(changed))
        tally(f"meta.json: {label}", work, folder.name)
    for label, content in spoilt.BAD_JSON.items():
        path.write_bytes(content)
        tally(f"meta.json: {label}", work, folder.name, want="refused")
    path.write_bytes(text)

    for name in names:
        file = folder / name
        whole = file.read_bytes()
        contents = {"one less": whole[:-1], "one more": whole + b"\0", "two more": whole + b"\0\0",
                    "half": whole[:len(whole) // 2], "flipped": flipped(whole, rng), "empty": b"",
                    "zeros": bytes(len(whole)), "ones": b"\xff" * len(whole)}
        for label, content in contents.items():
            file.write_bytes(content)
            tally(f"{name}: {label}", work, folder.name if label == "empty" else name, want="refused")
        file.unlink()
        tally(f"{name}: absent", work, name, want="refused")
        file.mkdir()
        tally(f"{name}: a folder", work, name, want="refused")
        file.rmdir()
        file.write_bytes(whole)
    return json.loads(text)


def data(tally, folder):
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    sizes = {"train": (3000, 1000), "val": [500], "test": [400]}
    splits = {split: [rng.integers(0, 256, n) for n in every] for split, every in sizes.items()}
    good = write_data(folder / "text", splits)
    path = good / "meta.json"
    short = {"overwrite": True, "max_iters": 3, "eval_interval": 2, "warmup_iters": 1}
    work = tiny_lm(folder, folder / "out", **short)
    meta = rot(tally, good, ("train_00000.bin", "val_00000.bin", "test_00000.bin"), work, rng)

    # ids beyond the vocabulary, under true checksums: everywhere, and one in the middle or at the end
    longer = tiny_lm(folder, folder / "out", **{**short, "max_iters": 64})
    for split in splits:
        for label, where in (("all", slice(None)), ("one", 150), ("the last", -1)):
            changed = {name: [x.copy() for x in files] for name, files in splits.items()}
            changed[split][-1][where] = 300
            write_data(good, changed)
            unread = (split, label) == ("train", "the last")  # no window of train reaches it
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
    return tiny_lm(folder, folder / "late", dataset="late_data")

# ------------------------------------------------------------ image files

def images(tally, folder):
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    pics = folder / "pics"
    path = pics / "meta.json"
    write_images(pics, rng)
    work = main_of(
        train_vit, dataset="pics", data_dir=str(folder), out_dir=str(folder / "out"), overwrite=True,
        image_size=16, eval_resize=16, patch_size=8, n_layer=1, n_head=2, n_embd=16, device="cpu",
        batch_size=4, total_batch_size=4, max_iters=2, warmup_iters=1, eval_interval=1, rank_interval=1)
    meta = rot(tally, pics, ("train.bin", "train.idx", "val.idx", "test.bin"), work, rng)

    # an index that lies, under a meta.json without checksums
    index = np.frombuffer((pics / "train.idx").read_bytes(), RECORD)
    train = meta["splits"]["train"]["files"]
    files = [{"name": file["name"], "bytes": file["bytes"]} for file in train]
    path.write_text(json.dumps(put(meta, ("splits", "train", "files"), files)))
    wrong = {"offset": (2**63, 2**64 - 1, 10**6), "height": (0, 65535), "width": (0, 65535),
             "label": (-1, 2, 2**31 - 1)}
    for field, values in wrong.items():
        for value in values:
            changed = index.copy()
            changed[field][3] = value
            (pics / "train.idx").write_bytes(changed.tobytes())
            tally(f"train.idx: {field} = {value}", work, "train.idx", want="refused")

    # val is a copy of train
    meta = write_images(pics, rng)
    val = json.loads(json.dumps(meta["splits"]["train"]))
    for file in val["files"]:
        copy = file["name"].replace("train", "val")
        shutil.copy(pics / file["name"], pics / copy)
        file["name"] = copy
    path.write_text(json.dumps(put(meta, ("splits", "val"), val)))
    tally("overlap: the same bytes", work, "pics", want="refused")

# ------------------------------------------------------------ config files

def configs(tally, folder):
    path = Path(folder, "config.py")

    def hand(label, content, want, file=path):
        path.write_bytes(content)
        tally(label, lambda: configure(vars(train_lm), argv=[str(file)]), file.name, want=want)

    hand("whole", b'"""doc"""\nseed = 600 * 4  # x\n', "valid")
    for label, text in spoilt.CONFIGS.items():
        hand(label, text.encode(), "refused")
    for label, content in spoilt.CONFIGS_EITHER_WAY.items():
        hand(label, content, "")
    hand("absent", b"", "refused", path.with_name("x.py"))
    for script in ("train_lm.py", "analyze.py", "prepare_pile.py"):
        path.write_text("import os")
        tally(f"the command line: {script}", [script, str(path)], "config.py", want="refused")

# ------------------------------------------------------------ JSON lines

def jsonl(tally, folder):
    source = Path(folder, "in")
    data_dir = Path(folder, "data")
    good = [json.dumps({"text": f"document {i} " * 5}).encode() for i in range(50)]
    bad = [line for lines in spoilt.BAD_LINES.values() for line in lines]

    def hand(label, lines, want, *more, name="a.jsonl"):
        content = lines if isinstance(lines, bytes) else b"".join(line + b"\n" for line in lines)
        for old in (source, data_dir):
            shutil.rmtree(old, ignore_errors=True)
        source.mkdir()
        (source / name).write_bytes(content)
        command = ["prepare_pile.py", f"--source={source}", "--dataset=x", f"--data_dir={data_dir}",
                   "--tokenizer=byte", "--workers=1", *more]
        return tally(label, command, "in", want=want)

    def among(label, lines, reason, *more):
        """Hands these among good ones. reason: the one under which the report must count them."""
        outcome = hand(label, [*good[:25], *lines, *good[25:]], "valid", *more)
        if reason and not re.search(rf"{len(lines)} {re.escape(reason)} \(", outcome.out):
            tally.wrong(f"{len(lines)} {reason} are not counted: {outcome.out[-300:]}")

    for reason, lines in spoilt.BAD_LINES.items():
        among(reason, lines, reason)
    among("odd documents", spoilt.ODD_LINES, "")
    utf8 = "invalid UTF-8" if json_says_utf8() else "broken JSON"
    among("invalid UTF-8", [b'{"text": "\xff\xfe"}', b"\xc0\x80"], utf8)
    among("100 MB of text", [b'{"text": "' + b"x" * 10**8 + b'"}'], "longer than --max_document_mb")
    among("100 MB of brackets", [b"[" * 10**8], "broken JSON", "--max_document_mb=128")

    hand("nothing but bad records", bad, "refused")
    hand("empty", [], "refused")
    hand("noise", [np.random.default_rng(seed).bytes(10**6)], "refused")
    for name in ("a.jsonl.zst", "a.jsonl.gz", "a.parquet"):
        hand(f"no {name}", good, "refused", name=name)
    # 200 MB of NULs in one line
    hand("a gzip bomb", gzip.compress(bytes(2 * 10**8)), "refused", name="a.jsonl.gz")


def json_says_utf8():
    """Whether the JSON reader here (orjson or json) tells bad UTF-8 from other bad JSON."""
    import prepare_pile
    try:
        prepare_pile.text_of(b"\xff", "json", "text", 100)
    except ValueError as error:
        return "UTF-8" in str(error)

# ------------------------------------------------------------ main

def fuzz(name, folder):
    """The row of a fuzzer; prints what fails, as hypothesis has shrunk it."""
    began = time.monotonic()
    seen = {"refused": 0, "valid": 0}
    wrong = 0
    try:
        seen = FUZZERS[name](cases, folder)
    except Exception as error:
        traceback.print_exc()
        print(f"WRONG fuzz {name}: {str(error)[:500]}", flush=True)
        wrong = 1
    return {"kind": f"fuzz {name}", "cases": sum(seen.values()) + wrong, **seen, "wrong": wrong,
            "worst_seconds": "", "worst_mb": "", "seconds": round(time.monotonic() - began, 1)}


def main(kinds):
    """Runs the kinds; returns the number of cases that are wrong."""
    for kind in kinds:
        if kind not in (*KINDS, "all"):
            raise UserError(f"unknown kind {kind!r}: expects {', '.join(KINDS)} or all")
    if not kinds or "all" in kinds:
        kinds = KINDS
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, about the odd tensors that are made here

    rows = []
    for kind in kinds:
        for name in FUZZERS if kind == "fuzz" else [kind]:
            with tempfile.TemporaryDirectory() as folder:
                if kind == "fuzz":
                    row = fuzz(name, folder)
                else:
                    tally = Tally(kind, folder)
                    globals()[kind](tally, folder)
                    row = tally.row()
            print(", ".join(f"{name} {x}" for name, x in row.items()), flush=True)
            rows.append(row)
    if out:
        write_table(REPO / out, rows, ["kind"])
    total = {name: sum(row[name] for row in rows) for name in ("cases", "refused", "valid", "wrong")}
    print("all: " + ", ".join(f"{name} {x:,}" for name, x in total.items()))
    return total["wrong"]


if __name__ == "__main__":
    with user_errors("hostile.py"):
        wrong = main(configure(globals(), positional="[KIND ...]"))
    raise SystemExit(1 if wrong else 0)

"""
The paths that bench.py times beside the training step, and data for them.
"""
import contextlib
import glob
import importlib.metadata
import importlib.util
import io
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import torch

import prepare_pile
from nanorank.files import save_json, save_pt, write_atomic
from nanorank.images import RECORD
from nanorank.spectra import metrics, qk_factors, singular_values
from nanorank.tokens import TokenSplit
from scripts.timing import interleaved, medians, rounds, row, seconds_of


def write_tokens(folder, tokenizer, vocab_size, n):
    """A data folder of 0, 1, 2 ... again and again, n tokens (uint16); val and test are 2,000 of them."""
    os.makedirs(folder, exist_ok=True)
    tokens = np.resize(np.arange(vocab_size - 1, dtype="<u2"), n)
    splits = {}
    for split, part in (("train", tokens[4000:]), ("val", tokens[:2000]), ("test", tokens[2000:4000])):
        part.tofile(os.path.join(folder, f"{split}.bin"))
        files = [{"name": f"{split}.bin", "tokens": len(part)}]
        splits[split] = {"tokens": len(part), "documents": 1, "files": files}
    meta = {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16", "splits": splits}
    save_json(os.path.join(folder, "meta.json"), meta)


def write_images(folder, n, height, width):
    """A data folder of n images of noise, all in train."""
    size = 3 * height * width
    noise = np.random.default_rng(0).integers(0, 256, size + n, dtype=np.uint8)
    with open(os.path.join(folder, "train.bin"), "wb") as file:
        for i in range(n):
            file.write(noise[i:i + size])
    index = np.zeros(n, dtype=RECORD)
    index["offset"], index["height"], index["width"] = np.arange(n) * size, height, width
    index.tofile(os.path.join(folder, "train.idx"))
    files = [{"name": "train.bin", "bytes": n * size}, {"name": "train.idx", "bytes": n * RECORD.itemsize}]
    save_json(os.path.join(folder, "meta.json"), {
        "kind": "images", "classes": [str(i) for i in range(1000)], "short_side": min(height, width),
        "mean": [0.5] * 3, "std": [0.3] * 3, "splits": {"train": {"images": n, "files": files}},
    })


def start(setup):
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(os.path.join(folder, "text"), "byte", 257, 1_000_000)
        command = [sys.executable, "train_lm.py", "config/demo.py", "--dataset=text", f"--data_dir={folder}",
                   f"--out_dir={folder}/run", "--overwrite", "--log_interval=1", "--eval_iters=1",
                   "--compile=false", f"--device={setup.device}"]

        def first_step():
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                found = any(line.startswith("step 0: loss") for line in process.stdout)
                process.kill()
            if not found:
                raise RuntimeError(f"{' '.join(command)} took no step")

        times = interleaved({
            "start": first_step,
            "torch": lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True),
        }, setup)
    what = "train_lm.py config/demo.py to its first step"
    yield row("start", what, times["start"], "import torch", times["torch"])


def batches(setup):
    T, B = 756, 128
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder, "gpt2", 50257, 200_000_000)
        split = TokenSplit(folder, "train", T)
        firsts = iter(range(0, 10**9, B))
        block = np.zeros((B, T + 1), dtype=np.int64)  # the bytes that a batch has in the end
        copy = np.zeros_like(block)

        def get_batch():  # of nanoGPT's train.py
            data = np.memmap(os.path.join(folder, "train.bin"), dtype=np.uint16, mode="r")
            ix = torch.randint(len(data) - T, (B,))
            x = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64)) for i in ix])
            y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + T].astype(np.int64)) for i in ix])
            return x, y

        times = interleaved({
            "sample": lambda: [split.sample(0, next(firsts), B) for _ in range(50)],
            "memcpy": lambda: [np.copyto(copy, block) for _ in range(50)],
            "nanoGPT": lambda: [get_batch() for _ in range(50)],
        }, setup)
    what = "128 x 757 of 200 M tokens, shuffled, checked, int64"
    seconds = times["sample"] / 50
    yield row("batches", what, seconds, "memcpy of the batch", times["memcpy"] / 50)
    yield row("batches", what, seconds, "nanoGPT's get_batch", times["nanoGPT"] / 50,
              times_faster=times["nanoGPT"] / times["sample"])


def spectra(setup):
    """One layer and product of Llama 2 7B, 32 heads of 4096 x 128, in memory or read from the page cache."""
    torch.manual_seed(0)
    weights = torch.randn(2, 32, 128, 4096)  # W_Q and W_K
    A, B = qk_factors(*weights.to(setup.device))
    with tempfile.NamedTemporaryFile() as file:
        weights.numpy().tofile(file.name)

        def read():
            data = torch.from_numpy(np.fromfile(file.name, np.float32))
            return data.view(2, 32, 128, 4096).to(setup.device)

        def read_and_grams():
            W_Q, W_K = read()
            return W_Q @ W_Q.mT, W_K @ W_K.mT

        peer_name, peer = factored_matrix()
        by_round = rounds({
            "ours": lambda: metrics(*qk_factors(*read())),
            "floor": read_and_grams,
            "metrics": lambda: metrics(A, B),
            "grams": lambda: (A.mT @ A, B.mT @ B),
            "exact": lambda: metrics(A, B, exact=True),
            "peer": lambda: peer(A, B.mT),
        }, setup)

    times = medians(by_round)
    faster = sorted(np.divide(by_round["peer"], by_round["metrics"]).tolist())

    # minutes: once
    whole = 32 * seconds_of(lambda: torch.linalg.svdvals(A[0] @ B[0].mT), setup)
    rank_5 = A * (torch.arange(128, device=A.device) < 5)

    what = "32 heads of 4096 x 128, all metrics"
    in_memory = f"{what}, from memory"
    seconds = times["metrics"]
    yield row("spectra", f"{what}, from a file", times["ours"], "reading it, float32 Grams", times["floor"],
              error=error_of(A, B), error_at_rank_5=error_of(rank_5, B))
    yield row("spectra", in_memory, seconds, "float32 Grams", times["grams"])
    yield row("spectra", f"{what}, --exact (QR)", times["exact"], "float32 Grams", times["grams"])
    yield row("spectra", in_memory, seconds, peer_name, times["peer"], times_faster=times["peer"] / seconds,
              times_faster_by_round=faster)
    yield row("spectra", in_memory, seconds, "32 x the SVD of one whole product", whole,
              times_faster=whole / seconds)


def error_of(A, B):
    """Largest error of the fast way's singular values, relative to the largest of each head."""
    exact = singular_values(A, B, exact=True)
    return float(((singular_values(A, B) - exact).abs() / exact[:, :1]).max())


def factored_matrix():
    """Its name, and TransformerLens's FactoredMatrix.svd; where that is not installed, the same formula."""
    if not importlib.util.find_spec("transformer_lens"):
        return "TransformerLens's formula of FactoredMatrix.svd", factored_matrix_svd
    from transformer_lens import FactoredMatrix
    version = importlib.metadata.version("transformer_lens")
    return f"FactoredMatrix.svd of TransformerLens {version}", lambda A, B: FactoredMatrix(A, B).svd()


def factored_matrix_svd(A, B):
    """Of A (H, d, r) B (H, r, d): three SVDs, of A, of B, and of what is between."""
    U_A, s_A, V_A = torch.linalg.svd(A, full_matrices=False)
    U_B, s_B, V_B = torch.linalg.svd(B, full_matrices=False)
    middle = s_A[..., None] * V_A @ U_B * s_B[..., None, :]
    U, s, V = torch.linalg.svd(middle, full_matrices=False)
    return U_A @ U, s, V @ V_B


def checkpoint(setup, out_dir):
    state = {"model": {f"w{i}": torch.randn(25, 1024, 256) for i in range(4)}}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    raw = buffer.getvalue()
    os.makedirs(out_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir) as folder:
        times = interleaved({
            "save": lambda: save_pt(os.path.join(folder, "a.pt"), state),
            "write": lambda: write_atomic(os.path.join(folder, "b.pt"), lambda file: file.write(raw)),
        }, setup)
    yield row("checkpoint", f"{len(raw) / 1e6:.0f} MB saved, fsynced, renamed", times["save"],
              "write and fsync of the bytes", times["write"])


def prepare(setup):
    import tiktoken
    try:
        enc = tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network
        print(f"prepare left out, no vocabulary ({type(error).__name__}): set TIKTOKEN_CACHE_DIR")
        return
    n_cores = os.cpu_count()
    texts = python_sources()
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "documents.jsonl")
        pd.DataFrame({"text": texts}).to_json(source, orient="records", lines=True)
        mapped = pathlib.Path(folder, "map.bin")
        contestants = {
            "alone": lambda: tiktoken_alone(enc, texts, n_cores),
            "ours": lambda: run_prepare_pile(source, folder),
        }
        if importlib.util.find_spec("datasets"):
            contestants["map"] = lambda: datasets_map(enc, source, mapped, n_cores)
        times = interleaved(contestants, setup)
        megabytes = os.path.getsize(source) / 1e6
        ids = pathlib.Path(folder, "bench", "train_00000.bin").read_bytes()
        same = "map" in times and ids == mapped.read_bytes()

    what = f"{megabytes:.0f} MB of .jsonl, GPT-2's BPE, {n_cores} cores"
    seconds = times["ours"]
    yield row("prepare", what, seconds, "tiktoken alone", times["alone"],
              share_of_tiktokens_speed=times["alone"] / seconds)
    if "map" in times:
        yield row("prepare", what, seconds, "datasets.map and a memmap", times["map"],
                  times_faster=times["map"] / seconds, identical_ids=same)


def python_sources():
    """Texts of this Python's library and packages, some 80 MB at most."""
    texts, size = [], 0
    library = os.path.join(sysconfig.get_path("stdlib"), "**", "*.py")
    for path in sorted(glob.glob(library, recursive=True)):
        texts.append(pathlib.Path(path).read_text("utf-8", "replace"))
        size += len(texts[-1])
        if size > 80e6:
            break
    return texts


def tiktoken_alone(enc, texts, n_cores):
    """The number of tokens, by threads; encode_to_numpy is faster than encode_ordinary_batch."""
    def count(block):
        return sum(len(enc.encode_to_numpy(text, disallowed_special=())) for text in block)

    with ThreadPoolExecutor(n_cores) as pool:
        return sum(pool.map(count, [texts[i::128] for i in range(128)]))


def run_prepare_pile(source, data_dir):
    shutil.rmtree(os.path.join(data_dir, "bench"), ignore_errors=True)
    vars(prepare_pile).update(source=source, dataset="bench", data_dir=data_dir, tokenizer="gpt2",
                              val_fraction=0.0, test_fraction=0.0)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare_pile.main()


def datasets_map(enc, source, out, n_cores):
    """As nanoGPT's data/openwebtext/prepare.py: ids and len by map, then 1024 shards into a memmap."""
    import datasets
    datasets.disable_progress_bars()

    def process(example):
        ids = [*enc.encode_ordinary(example["text"]), enc.eot_token]
        return {"ids": ids, "len": len(ids)}

    cache_dir = os.path.join(os.path.dirname(source), "cache")
    data = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache_dir)
    data = data.map(process, batched=False, remove_columns=["text"], num_proc=n_cores,
                    load_from_cache_file=False)
    arr = np.memmap(out, dtype=np.uint16, mode="w+", shape=(int(np.sum(data["len"])),))
    at = 0
    n_shards = min(1024, len(data))
    for i in range(n_shards):
        shard = data.shard(num_shards=n_shards, index=i, contiguous=True).with_format("numpy")
        ids = np.concatenate(list(shard["ids"]))
        arr[at:at + len(ids)] = ids
        at += len(ids)
    arr.flush()

"""
The paths beside the training step, each against its floor: batches, spectra, checkpoints, preparing text. bench.py runs them.
"""
import contextlib
import glob
import io
import json
import os
import shutil
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import prepare_pile
from nanorank.device import synchronize
from nanorank.files import save_json, save_pt, write_atomic
from nanorank.spectra import metrics, qk_factors, singular_values
from nanorank.tokens import TokenSplit
from scripts.timing import interleaved, row


def write_tokens(folder, tokens, tokenizer, vocab_size):
    """A data folder of these tokens, uint16: the last 2,000 are val, those before them test."""
    os.makedirs(folder, exist_ok=True)
    splits = {}
    for split, part in {"train": tokens[:-4000], "test": tokens[-4000:-2000], "val": tokens[-2000:]}.items():
        part.tofile(os.path.join(folder, f"{split}.bin"))
        splits[split] = {"tokens": len(part), "documents": 1, "files": [{"name": f"{split}.bin", "tokens": len(part)}]}
    save_json(os.path.join(folder, "meta.json"), {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16", "splits": splits})


def batches(world, repeats):
    """P1's batch, 128 windows of 757 tokens out of 200 M, against a memcpy of the same bytes and against nanoGPT's way."""
    with tempfile.TemporaryDirectory() as folder:
        n, T, B = 200_000_000, 756, 128
        write_tokens(folder, np.resize(np.arange(50257, dtype="<u2"), n), "gpt2", 50257)
        split, start = TokenSplit(folder, "train", T), iter(range(0, 10**9, B))
        block = np.zeros((B, T + 1), dtype=np.int64)  # the bytes a batch ends as
        copy = np.zeros_like(block)

        def nanogpt():  # get_batch of its train.py
            data = np.memmap(os.path.join(folder, "train.bin"), dtype=np.uint16, mode="r")
            ix = torch.randint(len(data) - T, (B,))
            return (torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64)) for i in ix]),
                    torch.stack([torch.from_numpy(data[i + 1:i + 1 + T].astype(np.int64)) for i in ix]))

        times = interleaved({"sample": lambda: [split.sample(0, next(start), B) for _ in range(50)],
                             "memcpy": lambda: [np.copyto(copy, block) for _ in range(50)],
                             "nanoGPT": lambda: [nanogpt() for _ in range(50)]}, world, repeats)
    what = "128 x 757 of 200 M tokens, shuffled, checked, int64"
    yield row("batches", what, times["sample"] / 50, "memcpy of the batch", times["memcpy"] / 50)
    yield row("batches", what, times["sample"] / 50, "nanoGPT's get_batch", times["nanoGPT"] / 50, times_faster=times["nanoGPT"] / times["sample"])


def spectra(world, repeats):
    """32 heads of 4096 x 128, one layer and product of Llama 2 7B, read from a file that the page cache holds: against reading it and one pass of
    float32 Gram GEMMs over the factors; TransformerLens's way (three SVDs a head); the SVD of the whole product (one head, times 32)."""
    torch.manual_seed(0)
    W_Q, W_K = torch.randn(2, 32, 128, 4096)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "layer")
        torch.stack([W_Q, W_K]).numpy().tofile(path)

        def read():
            return torch.from_numpy(np.fromfile(path, np.float32)).view(2, 32, 128, 4096).to(world.device)

        def floor():
            W_Q, W_K = read()
            return W_Q @ W_Q.mT, W_K @ W_K.mT

        W_Q, W_K = W_Q.to(world.device), W_K.to(world.device)
        A, B = qk_factors(W_Q, W_K)
        times = interleaved({"ours": lambda: metrics(*qk_factors(*read())), "floor": floor, "metrics": lambda: metrics(A, B),
                             "grams": lambda: (A.mT @ A, B.mT @ B), "exact": lambda: metrics(A, B, exact=True)}, world, repeats)
    rare = {}
    for name, way, heads in (("factored", lambda: factored_matrix_svd(A, B.mT), 32), ("full", lambda: torch.linalg.svdvals(A[0] @ B[0].mT), 1)):
        synchronize(world.device)
        start = time.perf_counter()
        way()  # seconds to minutes: once
        synchronize(world.device)
        rare[name] = (time.perf_counter() - start) * 32 / heads
    exact = singular_values(A, B, exact=True)
    deficient = A * (torch.arange(128, device=A.device) < 5)  # rank 5
    error = [float(((singular_values(X, B) - want).abs() / want[:, :1]).max())
             for X, want in ((A, exact), (deficient, singular_values(deficient, B, exact=True)))]
    what = "32 heads of 4096 x 128, all metrics"
    yield row("spectra", f"{what}, from a file", times["ours"], "reading it, float32 Grams", times["floor"], error=error[0], error_at_rank_5=error[1])
    yield row("spectra", f"{what}, from memory", times["metrics"], "float32 Grams", times["grams"])
    yield row("spectra", f"{what}, --exact (QR)", times["exact"], "float32 Grams", times["grams"])
    yield row("spectra", f"{what}, from memory", times["metrics"], "TransformerLens's FactoredMatrix.svd", rare["factored"],
              times_faster=rare["factored"] / times["metrics"])
    yield row("spectra", f"{what}, from memory", times["metrics"], "32 x the SVD of one whole product", rare["full"],
              times_faster=rare["full"] / times["metrics"])


def factored_matrix_svd(A, B):
    """As TransformerLens's FactoredMatrix does it: for A (H, d, r), B (H, r, d) the SVDs of A, of B, and of what stands between."""
    U_A, s_A, V_A = torch.linalg.svd(A, full_matrices=False)
    U_B, s_B, V_B = torch.linalg.svd(B, full_matrices=False)
    U, s, V = torch.linalg.svd(s_A[..., None] * V_A @ U_B * s_B[..., None, :], full_matrices=False)
    return U_A @ U, s, V @ V_B


def checkpoint(world, repeats, out_dir):
    """Saving 100 MB of state against writing and fsyncing the same bytes."""
    state = {"model": {f"w{i}": torch.randn(25, 1024, 256) for i in range(4)}}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    raw = buffer.getvalue()
    os.makedirs(out_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir) as folder:
        times = interleaved({"save": lambda: save_pt(os.path.join(folder, "a.pt"), state),
                             "write": lambda: write_atomic(os.path.join(folder, "b.pt"), lambda file: file.write(raw))}, world, repeats)
    yield row("checkpoint", f"{len(raw) / 1e6:.0f} MB saved, fsynced, renamed", times["save"], "write and fsync of the bytes", times["write"])


def prepare(world, repeats, text):
    """prepare_pile.py, file to files, against tiktoken's encode of the same texts in memory on all cores, and against
    datasets.map with as many processes and a memmap; the ids of both are compared byte by byte."""
    import tiktoken
    try:
        enc = tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network
        return print(f"prepare    left out, tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}): set TIKTOKEN_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        documents = os.path.join(folder, "documents.jsonl")
        texts = documents_of(text)
        with open(documents, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        blocks = [texts[i::128] for i in range(128)]

        def alone():  # as fast as threads over encode_to_tiktoken_buffer, faster than encode_ordinary_batch
            return sum(pool.map(lambda block: sum(len(enc.encode_to_numpy(text, disallowed_special=())) for text in block), blocks))

        def ours():
            shutil.rmtree(os.path.join(folder, "bench"), ignore_errors=True)
            vars(prepare_pile).update(source=documents, dataset="bench", data_dir=folder, tokenizer="gpt2", val_fraction=0.0, test_fraction=0.0)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                prepare_pile.main()

        def datasets_map():  # as nanoGPT's data/openwebtext does it: ids and len by map, then 1024 contiguous shards into a memmap
            def ids_of(example):
                ids = [*enc.encode_ordinary(example["text"]), enc.eot_token]
                return {"ids": ids, "len": len(ids)}

            data = datasets.load_dataset("json", data_files=documents, split="train", cache_dir=os.path.join(folder, "cache"))
            data = data.map(ids_of, remove_columns=["text"], num_proc=os.cpu_count(), load_from_cache_file=False)
            out = np.memmap(os.path.join(folder, "map.bin"), dtype=np.uint16, mode="w+", shape=(int(np.sum(data["len"])),))
            at = 0
            for i in range(1024):
                shard = data.shard(num_shards=1024, index=i, contiguous=True).with_format("numpy")
                ids = np.concatenate(list(shard["ids"])) if len(shard) else []
                out[at:at + len(ids)] = ids
                at += len(ids)
            out.flush()

        contestants = {"alone": alone, "ours": ours}
        try:
            import datasets
            datasets.disable_progress_bars()
            contestants["map"] = datasets_map
        except ImportError:
            print("prepare    without datasets (pip install -r requirements-dev.txt) there is no peer to compare with")
        times = interleaved(contestants, world, repeats)
        MB, cores = os.path.getsize(documents) / 1e6, os.cpu_count()
        what = f"{MB:.0f} MB of .jsonl, GPT-2's BPE, {cores} cores"
        yield row("prepare", what, times["ours"], "tiktoken alone", times["alone"], share_of_tiktokens_speed=times["alone"] / times["ours"])
        if "map" in times:
            with open(os.path.join(folder, "map.bin"), "rb") as a, open(os.path.join(folder, "bench", "train_00000.bin"), "rb") as b:
                same = a.read() == b.read()
            yield row("prepare", what, times["ours"], "datasets.map and a memmap", times["map"], times_faster=times["map"] / times["ours"],
                      identical_ids=same)


def documents_of(text):
    """The documents that prepare is timed on: those of the file `text`, else this Python's library and packages, 80 MB at most."""
    if text:
        import pyarrow
        with pyarrow.input_stream(text, compression="detect") as file:
            return [json.loads(line)["text"] for line in file.read().splitlines()]
    texts, size = [], 0
    for path in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "**", "*.py"), recursive=True)):
        with open(path, encoding="utf-8", errors="replace") as file:
            texts.append(file.read())
        size += len(texts[-1])
        if size > 80e6:
            break
    return texts

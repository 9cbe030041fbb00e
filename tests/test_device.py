"""
What a GPU needs, as far as a CPU can tell: chips by name, batches ahead, checkpoints in a thread, graphs,
the first step's time, ranks in two calls.
"""
import json
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    assert_same_weights,
    load,
    log_lines,
    logged,
    refused,
    run_main,
    signalled_in_step,
)

import nanorank.run
import train_lm
import train_vit
from model import GPT, ViT, init_weights, vit_size
from nanorank import device, run_setup, save_thread, watch
from nanorank.errors import UserError
from nanorank.families import attention_layers
from nanorank.image_ops import equalize, luma
from nanorank.images import ImageSplit, mean_and_std
from nanorank.prefetch import prefetch
from nanorank.run import Run
from nanorank.run_setup import RunSetup
from nanorank.save_thread import SaveThread
from nanorank.watch import attention_ranks, summary

CPU = torch.device("cpu")

# ----------------------------------------------------------------------- chips

@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA H20", 148),
    ("NVIDIA H800 PCIe", 756), ("NVIDIA H800", 989), ("NVIDIA GB200", 2500), ("NVIDIA B200", 2250),
    ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA GB300", 2500),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A800-SXM4-80GB", 312),
    ("NVIDIA A40", 150), ("NVIDIA A30", 165), ("NVIDIA A10", 125), ("NVIDIA A10G", 0),
    ("NVIDIA RTX A6000", 155), ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA RTX A1000", 0),
    ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362),
    ("NVIDIA GeForce RTX 5090", 209), ("NVIDIA GeForce RTX 5090 D", 0), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 4090 D", 0), ("NVIDIA GeForce RTX 4090 Laptop GPU", 0),
    ("NVIDIA GeForce RTX 3090", 71), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112),
    ("Tesla V100S-PCIE-32GB", 130), ("Tesla T4", 65), ("NVIDIA T400 4GB", 0), ("AMD Instinct MI300X", 1307),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 0), ("GRID A100-10C", 0), ("NVIDIA GeForce GTX 1080", 0),
])
def test_a_chip_is_known_by_whole_words_or_measured(name, tflops):
    assert device.data_sheet_peak(name) == tflops * 1e12


def test_an_unknown_chip_is_measured(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(device, "gemm_seconds", lambda *_: 0.1)
    for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 2 * 128**3 / 0.1)):
        monkeypatch.setattr(device, "device_name", lambda _, name=name: name)
        assert device.peak_flops(gpu, torch.bfloat16)[0] == peak

# --------------------------------------------------------------------- batches

def test_prefetch_prepares_in_order():
    def prepare(key, x):
        return key, 10 * x

    out = list(prefetch(lambda i: (np.array([i]),), range(5), CPU, prepare))
    assert [(key, int(x)) for key, x in out] == [(i, 10 * i) for i in range(5)]


class Stream:
    """A CUDA stream that notes what happens."""
    def __init__(self, notes):
        self.notes = notes

    def record_event(self):
        self.notes.append(("done", threading.get_ident()))
        return "event"

    def wait_event(self, event):
        self.notes.append(("wait", threading.get_ident()))


def test_a_gpus_batches_are_made_ahead_in_a_thread_of_one_stream(monkeypatch):
    """The calls alone: tensors stay on the CPU. The main stream waits for the event of each batch, and no
    memory goes back to the side stream before the main one is through with it."""
    notes, kept = [], []
    side, main = Stream(notes), Stream(notes)
    inside = []

    class On:
        def __init__(self, stream):
            assert stream is side

        def __enter__(self):
            inside.append(threading.get_ident())

        def __exit__(self, *_):
            inside.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: kept.append((int(x[0]), stream)))
    here = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_, **__: here(x, "cpu"))

    def prepare(key, x):
        assert inside == [threading.get_ident()] and threading.get_ident() != threading.main_thread().ident
        return (10 * x,)

    out = list(prefetch(lambda i: (np.array([i]),), range(3), torch.device("cuda", 0), prepare))
    assert [int(x) for (x,) in out] == [0, 10, 20]
    assert kept == [(0, main), (10, main), (20, main)]
    assert sum(what == "wait" and thread == threading.get_ident() for what, thread in notes) == 3


def test_crops_are_read_into_pinned_memory_where_that_is_asked_for(image_dir, monkeypatch):
    split = ImageSplit(str(image_dir / "pictures"), "train")
    index, boxes = np.arange(4), np.tile([0, 0, 18, 18], (4, 1))
    want, _ = split.read(index, boxes)
    empty, asked = torch.empty, []

    def noted(*shape, pin_memory=False, **options):
        asked.append(pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", noted)
    pixels, _ = split.read(index, boxes, pin=True)
    assert asked == [True] and np.array_equal(pixels, want)


def test_channel_means_are_copied_to_the_device_once():
    """Each copy from an ordinary tensor makes the host wait for a GPU."""
    moments = (0.5, 0.4, 0.6), (0.2, 0.25, 0.3)
    assert mean_and_std(*moments, CPU) is mean_and_std(*moments, CPU)


def test_results_say_what_ran(train, tmp_path):
    result = train(tmp_path, max_iters=1)
    assert result["autocast"] == "float32" and result["device_name"] == result["trained_on"] == "cpu"
    assert result["torch"] == torch.__version__ and "gpu_gib" not in result


def test_operations_that_apple_gpus_were_in_doubt_of_are_exact():
    """Against numpy: shifts of negative numbers, and counts of equal pixels."""
    x = torch.randint(0, 256, (2, 3, 9, 11), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    red, green, blue = x.numpy().astype(np.int64).transpose(1, 0, 2, 3)
    assert np.array_equal(luma(x)[:, 0], (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)
    flat = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    assert torch.equal(equalize(flat), flat)

# ----------------------------------------------------------------- checkpoints

@pytest.mark.slow
def test_saving_in_a_thread_changes_nothing(train, tmp_path):
    """Checkpoints, snapshots and log are those of a run that waits, those of one that is stopped, too."""
    settings = {"snapshot_steps": "every:5", "eval_interval": 5, "dropout": 0.1}
    train(tmp_path / "a", **settings)
    train(tmp_path / "b", **settings, save_in_thread=True)
    with signalled_in_step(12), pytest.raises(SystemExit):
        train(tmp_path / "c", **settings, save_in_thread=True)
    assert load(tmp_path / "c" / "ckpt.pt")["iter_num"] == 12
    train(tmp_path / "c", **settings, init_from="resume", save_in_thread=True)
    for other in "bc":
        assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / other))
        for path in (tmp_path / "a").glob("*.pt"):
            assert_same_weights(path, tmp_path / other / path.name)
        a, b = [load(tmp_path / name / "ckpt.pt") for name in ("a", other)]
        assert str(a["optimizer"]) == str(b["optimizer"]) and a["decay"] == b["decay"]
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")
    sizes = [(tmp_path / name / "step_0000005.pt").stat().st_size for name in "ab"]
    assert abs(sizes[0] - sizes[1]) < 1000  # tied weights are written once


def test_a_checkpoint_in_a_thread_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    go, save_pt = threading.Event(), save_thread.save_pt

    def slow(path, ckpt):
        go.wait(20)
        save_pt(path, ckpt)

    monkeypatch.setattr(save_thread, "save_pt", slow)
    w = torch.arange(6.0).view(2, 3)
    ckpt = {"model": {"w": w, "tied": w.detach(), "turned": w.T}, "optimizer": [{"step": torch.tensor(3.0)}],
            "decay": {"attn": 1.0}}
    saver = SaveThread()
    saver.save(tmp_path / "a.pt", ckpt)
    w += 100
    ckpt["decay"]["attn"] = 2.0
    ckpt["optimizer"][0]["step"] += 1
    assert not (tmp_path / "a.pt").exists()
    go.set()
    saver.wait()
    found = load(tmp_path / "a.pt")
    assert torch.equal(found["model"]["w"], torch.arange(6.0).view(2, 3)) and found["decay"] == {"attn": 1.0}
    assert found["optimizer"][0]["step"] == 3
    assert found["model"]["w"].data_ptr() == found["model"]["tied"].data_ptr()
    assert torch.equal(found["model"]["turned"], found["model"]["w"].T)


def test_what_goes_wrong_in_the_thread_is_raised_by_the_next_save(tmp_path):
    saver = SaveThread()
    saver.save(tmp_path / "no folder" / "a.pt", {})
    with pytest.raises(OSError, match="no folder"):
        saver.save(tmp_path / "b.pt", {})
    saver.save(tmp_path / "b.pt", {})
    saver.wait()
    assert load(tmp_path / "b.pt") == {}

# ------------------------------------------------------------- several processes

def test_constant_buffers_are_not_sent_around(tmp_path, image_dir, monkeypatch):
    """A ViT's fixed positions: DDP would send them from the first process at every synchronised forward.

    A GPT has no buffers. Here in a process group of one."""
    nets = []

    class Noted(train_vit.DDP):
        def __init__(self, net, **options):
            super().__init__(net, **options)
            nets.append(self)

    join = RunSetup.join_processes
    monkeypatch.setattr(RunSetup, "join_processes", lambda run: [join(run), setattr(run, "ddp", True)])
    monkeypatch.setattr(train_vit, "DDP", Noted)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    run_main(train_vit, {
        "out_dir": str(tmp_path), "device": "cpu", "dataset": "pictures", "data_dir": str(image_dir),
        "image_size": 16, "patch_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 16, "max_iters": 1,
        "batch_size": 4, "total_batch_size": 4, "rank_interval": 0, "eval_iters": 1,
    })
    assert list(nets[0].module.buffers()) and not nets[0].will_sync_module_buffers()
    assert not list(GPT(vocab_size=8, block_size=8, n_layer=1, n_head=1, n_embd=8).buffers())


def test_a_signal_is_asked_for_without_waiting(monkeypatch):
    """The answer is read at the next call; at the end none is left under way."""
    waited = []

    class Work:
        def wait(self):
            waited.append(1)

    def all_reduce(signum, op, async_op):
        assert async_op
        signum.fill_(max(int(signum), other.pop(0)))
        return Work()

    other = [0, 15, 0]  # another process gets a signal
    monkeypatch.setattr(nanorank.run.dist, "all_reduce", all_reduce)
    run = object.__new__(Run)
    vars(run).update(ddp=True, asked=None, signal=SimpleNamespace(signal=0))
    assert [run.signalled() for _ in range(3)] == [0, 0, 15] and len(waited) == 2
    assert run.read_asked() == 0 and len(waited) == 3 and run.asked is None

# ---------------------------------------------------------------- the first step

def test_speed_leaves_out_the_first_step_which_compiles(train, tmp_path, monkeypatch):
    """By a clock on which that step takes 100 s and each other one 1 s; a step has 4 x 32 tokens."""
    clock, forward = {"now": 0.0, "steps": 0}, GPT.forward

    def timed(self, *args):
        if self.training:
            clock["now"] += 1 if clock["steps"] else 100
            clock["steps"] += 1
        return forward(self, *args)

    monkeypatch.setattr(train_lm.GPT, "forward", timed)
    monkeypatch.setattr(nanorank.run, "time", SimpleNamespace(perf_counter=lambda: clock["now"],
                                                              monotonic=lambda: clock["now"]))
    result = train(tmp_path / "a")
    assert logged(tmp_path / "a", "tokens_per_s") == [128] * 4 and result["seconds"] == 20
    clock["steps"] = 0
    train(tmp_path / "b", log_interval=1, max_iters=2)  # a report of that step alone
    assert logged(tmp_path / "b", "tokens_per_s") == [1.28, 128]
    clock["steps"] = 0
    train(tmp_path / "c", eval_interval=1, max_iters=2)  # the same
    assert logged(tmp_path / "c", "tokens_per_s") == [1.28, 128]

# ---------------------------------------------------------------------- graphs

def count_graphs(monkeypatch):
    """torch.compile becomes the real one without code generation; returns the list that graphs are added to.
    A graph break is an error."""
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile_whole(model, dynamic):
        assert dynamic is False  # else a second shape makes all of them symbolic, and slower
        return compile_(model, dynamic=dynamic, backend=backend, fullgraph=True)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_whole)
    monkeypatch.setattr(run_setup, "compile_error", lambda _: "")
    return graphs


@pytest.mark.slow
def test_a_run_compiles_two_graphs_with_and_without_gradients(train, tmp_path, monkeypatch):
    """No graph break, no recompilation: steps, accumulation, evaluation, padded rows, the whole splits."""
    graphs = count_graphs(monkeypatch)
    settings = {"batch_size": 2, "max_iters": 6, "eval_interval": 3, "dropout": 0.1}
    train(tmp_path / "a", compile=True, **settings)
    assert sorted(graphs) == [False, True]
    train(tmp_path / "b", **settings)
    assert_same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt", tolerance=1e-6)

# ----------------------------------------------------------- rank in two calls

def models():
    yield GPT(vocab_size=64, block_size=16, n_layer=3, n_head=2, n_embd=16)
    yield ViT(5, 32, **{**vit_size("Ti/8"), "n_layer": 2, "n_head": 2, "n_embd": 32})


def test_ranks_of_all_layers_at_once_are_those_layer_by_layer(monkeypatch):
    calls, metrics = [], watch.metrics
    monkeypatch.setattr(watch, "metrics", lambda *args: [calls.append(1), metrics(*args)][1])
    for model in models():
        init_weights(model, 0)
        layers = attention_layers(model.state_dict(), model.args["n_head"])
        assert json.dumps(attention_ranks(model)) == json.dumps(summary(layers))
    assert len(calls) == 4  # two a model


def test_the_layer_that_is_not_finite_is_named():
    model = next(models())
    model.transformer.h[1].attn.c_attn.weight.data[20, 0] = torch.nan  # row 20 is row 4 of W_K: head 0
    with pytest.raises(UserError, match=r"layer 1, qk: NaN or inf in the factors of head \[0\]"):
        attention_ranks(model)

# ------------------------------------------------------------- bf16 between blocks

def test_bf16_residual_passes_bfloat16_between_blocks(train, tmp_path, monkeypatch):
    dtypes, results = [], []
    forward = train_lm.GPT.forward

    def noted(self, *args):
        self.transformer.h[1].register_forward_pre_hook(lambda block, x: dtypes.append(x[0].dtype))
        return forward(self, *args)

    monkeypatch.setattr(train_lm.GPT, "forward", noted)
    for how, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        dtypes.clear()
        results.append(train(tmp_path / str(how), dtype="bfloat16", bf16_residual=how, max_iters=5))
        assert set(dtypes) == {dtype}
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=0.02)
    with refused("--bf16_residual needs bfloat16"):
        train(tmp_path / "c", bf16_residual=True)

"""prepare_pile.py: sources, splits, kills, parts, bad input. The reference is tiktoken's encode_ordinary."""
import contextlib
import gzip
import json
import multiprocessing
import os
import pathlib
import random
import select
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
from conftest import one_line_exit_2
from hub_server import hub

import prepare_pile
from nanorank import text_sources
from nanorank.data_folder import SPLITS, split_by_hash
from nanorank.errors import UserError, user_errors
from nanorank.shards import only_process
from nanorank.tokens import TokenSplit, crc32, open_splits, read_meta

REPO = pathlib.Path(__file__).resolve().parent.parent
WORDS = ("the of and in there then here other heat rate in\n the  \n\n\tthen é 中文 😀 he's "
         "123 1,000 <|other|> a_b \u00a0 x=y;").split(" ")
X = "data/x"  # the folder that `prepare` writes, in tmp_path
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def tiny_encoding():
    """A tiktoken encoding of 256 bytes and ten merges, with GPT-2's pattern and two special tokens."""
    ranks = {bytes([i]): i for i in range(256)}
    for merge in (b"th", b"he", b"the", b" t", b" the", b"in", b"er", b"  ", b"\n\n", b"\xe4\xb8"):
        ranks[merge] = len(ranks)
    tiktoken.list_encoding_names()  # fills the registry
    tiktoken.registry.ENCODING_CONSTRUCTORS["tiny"] = lambda: {
        "name": "tiny", "mergeable_ranks": ranks,
        "special_tokens": {"<|endoftext|>": len(ranks), "<|other|>": len(ranks) + 1},
        "pat_str": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
    yield
    del tiktoken.registry.ENCODING_CONSTRUCTORS["tiny"]
    tiktoken.registry.ENCODINGS.pop("tiny", None)


@pytest.fixture
def prepare(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(prepare_pile, "CHUNK", 4096)  # so that there are many
    defaults = {"data_dir": tmp_path / "data", "dataset": "x", "tokenizer": "tiny", "workers": 2}
    yield from runner(prepare_pile, defaults, monkeypatch, capfd)


def runner(script, defaults, monkeypatch, capfd):
    """Yields a function that runs script.main() with given settings and returns (exit status, output)."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]

    def run(**settings):
        for name, value in (defaults | settings).items():
            assert hasattr(script, name)
            monkeypatch.setattr(script, name, str(value) if isinstance(value, pathlib.Path) else value)
        capfd.readouterr()
        try:
            with user_errors(os.path.basename(script.__file__)):  # as the script does
                status = script.main() or 0
        except SystemExit as stop:
            status = stop.code
        output = "".join(capfd.readouterr())
        assert "Traceback" not in output
        return status, output

    yield run
    for number, handler in handlers:
        signal.signal(number, handler)


def one_line(result, *words):
    status, output = result
    assert status == 2 and output.count("\n") == 1, output
    for word in words:
        assert word in output, output


def texts_like_the_pile(n, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice((0, 1, 3, 30, 300)))) for _ in range(n)]


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"text": text, "meta": {"n": i}} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def reference(texts, name="tiny"):
    enc = tiktoken.get_encoding(name)
    return [i for text in texts for i in (*enc.encode_ordinary(text), enc.eot_token)]


def ids(folder, split):
    meta = json.loads((folder / "meta.json").read_text())
    files = [np.fromfile(folder / file["name"], dtype="<u2") for file in meta["splits"][split]["files"]]
    return np.concatenate(files or [[]]).tolist()


def documents(folder, split):
    """The ids of each document of a split, sorted."""
    found, eot = [[]], read_meta(str(folder))["eot"]
    for i in ids(folder, split):
        found[-1].append(i)
        if i == eot:
            found.append([])
    assert found.pop() == []
    return sorted(found)


def contents(folder):
    """{name: bytes} of the files that a trainer reads."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())
            if path.suffix in (".bin", ".idx") or path.name == "meta.json"}


NO_SPLIT = {"val_fraction": 0.0, "test_fraction": 0.0}

# ---------------------------------------------------------------------- sources

@pytest.mark.parametrize("suffix", [
    ".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet", ".arrow", ".csv"])
def test_format(prepare, tmp_path, suffix):
    texts = texts_like_the_pile(200)
    path = tmp_path / f"a{suffix}"
    plain = write_jsonl(tmp_path / "plain.jsonl", texts).read_bytes()
    if suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"other": list(range(200)), "text": texts}), path, row_group_size=70)
    elif suffix in (".arrow", ".csv"):  # the datasets library reads these
        datasets = pytest.importorskip("datasets")
        texts = [text for text in texts if text] if suffix == ".csv" else texts  # an empty field is no text
        rows = datasets.Dataset.from_dict({"other": list(range(len(texts))), "text": texts})
        if suffix == ".csv":
            rows.to_csv(path)
        else:
            rows.save_to_disk(tmp_path / "saved")
            path = tmp_path / "saved"
    elif suffix == ".jsonl.zst":  # two frames, as parallel compressors and cat write them
        pa = pytest.importorskip("pyarrow")
        frames = [pa.compress(part, codec="zstd", asbytes=True) for part in (plain[:5000], plain[5000:])]
        path.write_bytes(b"".join(frames))
    elif suffix in (".jsonl.gz", ".json.gz"):
        path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]) + bytes(512))  # padded
    else:
        path = tmp_path / "plain.jsonl"
    assert prepare(source=path, **NO_SPLIT)[0] == 0
    folder = tmp_path / X
    assert ids(folder, "train") == reference(texts)
    meta = read_meta(str(folder))
    about = {"vocab_size": 268, "eot": 266, "dtype": "uint16", "tokenizer": "tiny", "source": str(path)}
    assert about.items() <= meta.items()
    assert meta["splits"]["train"]["documents"] == len(texts) and not meta["bad_records"]
    assert all(file["crc32"] == crc32(folder / file["name"]) for file in meta["splits"]["train"]["files"])
    split = TokenSplit(str(folder), "train", 64)
    assert split.n_tokens == meta["splits"]["train"]["tokens"] == len(reference(texts))
    assert split.windows(np.array([0]))[0].tolist() == reference(texts)[:65]


def test_text_files_and_folders(prepare, tmp_path):
    """A folder is read in order; a .txt is one document, cut beyond a chunk, behind lines or characters."""
    lines, solid = "the line é\n" * 700, "中" * 3000  # 9,100 and 9,000 bytes, chunks are 4,096
    for name, text in (("b/2.txt", "two"), ("b/1.txt", "é\r\n"), ("a.txt", lines), ("c.txt", solid),
                       ("empty.txt", ""), ("no.md", "no")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(text.encode())
    assert prepare(source=tmp_path / "in", **NO_SPLIT)[0] == 0
    enc = tiktoken.get_encoding("tiny")
    found = [enc.decode(document[:-1], errors="strict") for document in documents(tmp_path / X, "train")]
    pieces_of_lines = [text for text in found if text.startswith("the line")]
    pieces_of_solid = [text for text in found if text.startswith("中")]
    assert "".join(pieces_of_lines) == lines and all(text.endswith("\n") for text in pieces_of_lines)
    assert "".join(pieces_of_solid) == solid and len(pieces_of_lines) == len(pieces_of_solid) == 3
    assert sorted(set(found) - set(pieces_of_lines) - set(pieces_of_solid)) == ["two", "é\r\n"]


def test_python_and_packages(prepare, tmp_path, monkeypatch):
    (tmp_path / "lib" / "site-packages").mkdir(parents=True)
    for name, text in (("b.py", "b = 'é'\n"), ("a.py", "a = 1\n"), ("d.txt", "no"),
                       ("site-packages/c.py", "c"), ("site-packages/c.rst", "d"),
                       ("site-packages/c.so", "no")):
        (tmp_path / "lib" / name).write_text(text, encoding="utf-8")
    places = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "lib" / "site-packages"}
    monkeypatch.setattr(text_sources.sysconfig, "get_path", lambda name: str(places[name]))
    assert prepare(source="python", dataset="auto", tokenizer="auto", **NO_SPLIT)[0] == 0
    folder = tmp_path / "data" / "python"
    library = [*b"a = 1\n", 256, *"b = 'é'\n".encode(), 256]
    assert ids(folder, "train") == library
    assert read_meta(str(folder))["vocab_size"] == 257
    assert prepare(source="packages", dataset="packages", tokenizer="byte", **NO_SPLIT)[0] == 0
    assert ids(tmp_path / "data" / "packages", "train") == [*library, *b"c", 256, *b"d", 256]


def test_hub(tmp_path):
    """The Pile's layout, with its own val and test, read by huggingface_hub itself; a hub out of reach."""
    pytest.importorskip("huggingface_hub")
    names = ("train/00", "train/01", "val", "test")
    parts = {name: texts_like_the_pile(50, seed) for seed, name in enumerate(names)}
    (tmp_path / "org" / "pile").mkdir(parents=True)
    (tmp_path / "org" / "pile" / "README.md").write_text("no text to train on")
    for name, texts in parts.items():
        write_jsonl(tmp_path / "org" / "pile" / f"{name}.jsonl", texts)
    command = ("prepare_pile.py", "--tokenizer=byte", f"--data_dir={tmp_path}", "--dataset=x")
    with hub(tmp_path) as server:
        result = server.run(*command, "--source=org/pile")
        assert result.returncode == 0, result.stderr
        other = server.run(*command, "--source=org/other", "--dataset=y")
        one_line_exit_2(other, "hub has no org/other, or not for everyone", "hf auth login")
        away = server.run(*command, "--source=org/pile", "--dataset=y", url="http://127.0.0.1:9")
        one_line_exit_2(away, "hub did not give it: [Errno")
    expected = {"train": parts["train/00"] + parts["train/01"], "val": parts["val"], "test": parts["test"]}
    for split, texts in expected.items():
        assert ids(tmp_path / "x", split) == [i for text in texts for i in (*text.encode(), 256)]

# ----------------------------------------------------------------------- splits

def test_hash_split_depends_on_nothing_else(prepare, tmp_path):
    texts = texts_like_the_pile(1000)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", sorted(texts, reverse=True))
    shares = {"val_fraction": 0.2, "test_fraction": 0.1}
    prepare(source=tmp_path / "a.jsonl", dataset="a", **shares)
    prepare(source=tmp_path / "b.jsonl", dataset="b", workers=1, **shares)
    for shard_index in (2, 0, 1):
        prepare(source=tmp_path / "a.jsonl", dataset="c", num_shards=3, shard_index=shard_index, **shares)
    a, b, c = ({split: documents(tmp_path / "data" / name, split) for split in SPLITS} for name in "abc")
    assert a == b == c
    every = {split: {tuple(document) for document in a[split]} for split in a}
    assert sum(len(a[split]) for split in a) == 1000
    distinct = len(set.union(*every.values()))
    assert distinct == sum(map(len, every.values()))  # none is in two splits
    assert abs(len(every["val"]) / distinct - 0.2) < 0.05 and abs(len(every["test"]) / distinct - 0.1) < 0.05


def decoded(folder, split):
    """The text of a split, without what ends documents."""
    text = tiktoken.get_encoding("tiny").decode(ids(folder, split), errors="strict")
    return text.replace("<|endoftext|>", "")


@pytest.mark.parametrize("n_files", [1, 10])
def test_plain_text_is_cut_into_splits_behind_lines(prepare, tmp_path, n_files):
    """Every split has some of each text, about its share, and all of it is there once, in order."""
    texts = ["".join(f"{k} line {i:04d} é\n" for i in range(2000)) for k in range(n_files)]
    for k, text in enumerate(texts):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{k}.txt").write_bytes(text.encode())
    source = tmp_path / "in" if n_files > 1 else tmp_path / "in" / "0.txt"
    status, output = prepare(source=source, val_fraction=0.1, test_fraction=0.05)
    assert status == 0 and "note:" not in output
    lines = {split: decoded(tmp_path / X, split).splitlines() for split in SPLITS}
    found = []
    for k in range(n_files):
        for split in SPLITS:
            mine = [line for line in lines[split] if line.startswith(f"{k} ")]
            assert len(mine) == pytest.approx({"train": 1700, "val": 200, "test": 100}[split], abs=2)
            found += mine
    assert found == "".join(texts).splitlines()
    for i in (1, 0):  # two machines
        assert prepare(source=source, dataset="y", num_shards=2, shard_index=i)[0] == 0
    for split in SPLITS:
        assert documents(tmp_path / "data" / "y", split) == documents(tmp_path / X, split)


@pytest.mark.parametrize("text, counts", [
    ("a\nb\nc\n", {"train": "a\n", "val": "b\n", "test": "c\n"}),
    ("one line", {"train": "one line", "val": "", "test": ""}),
    ("é" * 1_000_000, {"train": "é" * 960_000, "val": "é" * 20_000, "test": "é" * 20_000})])
def test_short_texts_and_one_long_line(prepare, tmp_path, text, counts):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # the byte-order mark is dropped
    status, output = prepare(source=tmp_path / "a.txt", val_fraction=0.02, test_fraction=0.02)
    assert status == 0
    found = {split: decoded(tmp_path / X, split) for split in SPLITS}
    assert {split: len(text) for split, text in found.items()} == pytest.approx(
        {split: len(text) for split, text in counts.items()}, abs=2)
    assert "".join(found.values()) == text
    assert ("val holds 33.3% of the tokens" in output) == (text == "a\nb\nc\n")
    assert ("no document fell to val; --val_fraction or --val_source" in output) == (text == "one line")


@pytest.mark.parametrize("n_files, lines, counts", [
    (10, 1, (8, 1, 1)), (10, 3, (8, 1, 1)), (100, 5, (96, 2, 2)), (3, 2, (1, 1, 1))])
def test_short_texts_stay_whole(prepare, tmp_path, n_files, lines, counts):
    (tmp_path / "in").mkdir()
    for k in range(n_files):
        (tmp_path / "in" / f"{k:03d}.txt").write_text("".join(f"{k} {i}\n" for i in range(lines)))
    assert prepare(source=tmp_path / "in", val_fraction=0.02, test_fraction=0.02)[0] == 0
    found = read_meta(str(tmp_path / X))["splits"]
    assert tuple(found[split]["documents"] for split in SPLITS) == counts


def test_a_long_text_among_short_ones_is_cut(prepare, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "book.txt").write_text("a line of it\n" * 2000)
    (tmp_path / "in" / "note.txt").write_text("short")
    assert prepare(source=tmp_path / "in", val_fraction=0.02, test_fraction=0.02)[0] == 0
    assert decoded(tmp_path / X, "train") == "a line of it\n" * 1920 + "short"
    assert decoded(tmp_path / X, "val") == decoded(tmp_path / X, "test") == "a line of it\n" * 40


def test_train_and_val_files(prepare, tmp_path):
    for name in ("train", "val"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.txt").write_text(f"{name}\n" * 1000)
    assert prepare(source=tmp_path / "in", test_fraction=0.0)[0] == 0
    assert decoded(tmp_path / X, "train") == "train\n" * 1000
    assert decoded(tmp_path / X, "val") == "val\n" * 1000
    assert sorted(open_splits(lambda split: TokenSplit(str(tmp_path / X), split, 64))) == ["train", "val"]
    with pytest.raises(UserError, match="--test_fraction or --test_source"):
        TokenSplit(str(tmp_path / X), "test", 64)


def test_no_document_for_train_is_an_error_at_once(prepare, tmp_path):
    held_out = "hello"
    while split_by_hash(held_out.encode(), {"val": 0.02, "test": 0.02}) == "train":
        held_out += "o"
    source = write_jsonl(tmp_path / "a.jsonl", [held_out])
    status, output = prepare(source=source, val_fraction=0.02, test_fraction=0.02)
    assert status == 2 and "all 1 fell to val and test; give more, or --val_source" in output
    write_jsonl(source, [held_out, "more"])  # the wrong try is not in the way
    assert prepare(source=source, val_fraction=0.02, test_fraction=0.02)[0] == 0


def test_given_val_and_test_files(prepare, tmp_path):
    parts = {name: texts_like_the_pile(100, seed) for seed, name in enumerate(("train", "other", "held"))}
    for name, texts in parts.items():
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", texts)
    held = tmp_path / "in" / "held.jsonl"  # not in train too
    prepare(source=tmp_path / "in", val_source=held, test_fraction=0.0)
    assert ids(tmp_path / X, "val") == reference(parts["held"])
    assert ids(tmp_path / X, "train") == reference(parts["other"] + parts["train"])
    status, output = prepare(source=held, val_source=tmp_path / "in", dataset="y")
    assert status == 2 and "no files are left for the train split" in output

# -------------------------------------------------------------------------- ids

HARD = ["", " ", "\n", "<|endoftext|>", "a <|endoftext|> b <|other|>", "<|endoftext|", "|endoftext|>", "\0",
        "\ufeff bom", "e\u0301 \u200b", "\ud800", "x \udc00\ud83d y", "\U0001f600" * 50, "a" * 40_000,
        " " * 9_000 + "x", "the " * 20_000, "line\u2028sep\x85nel\x1c"]


@pytest.mark.parametrize("name", ["tiny", "byte", "gpt2"])
def test_hard_texts(prepare, tmp_path, name):
    if name == "gpt2" and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("no vocabulary at hand")
    texts = HARD + texts_like_the_pile(50)
    assert prepare(source=write_jsonl(tmp_path / "a.jsonl", texts), tokenizer=name, **NO_SPLIT)[0] == 0
    replaced = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    assert replaced[10] == "\ufffd"
    if name == "byte":
        expected = [i for text in replaced for i in (*text.encode(), 256)]
    else:
        expected = reference(texts, name)
    assert ids(tmp_path / X, "train") == expected


def test_text_that_overflows_the_regex(prepare, tmp_path):
    texts = ["before", " " * 1_500_000 + "end", "after"]
    with pytest.raises(ValueError):
        tiktoken.get_encoding("tiny").encode(texts[1], disallowed_special=())  # tiktoken alone cannot
    assert prepare(source=write_jsonl(tmp_path / "a.jsonl", texts), **NO_SPLIT)[0] == 0
    found = ids(tmp_path / X, "train")
    before, after = reference(["before"]), reference(["after"])
    assert found[:len(before)] == before and found[-len(after):] == after
    assert tiktoken.get_encoding("tiny").decode(found) == "".join(text + "<|endoftext|>" for text in texts)


def test_wide_ids(prepare, tmp_path):
    tiny = tiktoken.registry.ENCODING_CONSTRUCTORS["tiny"]() | {"special_tokens": {"<|endoftext|>": 70_000}}
    tiktoken.registry.ENCODING_CONSTRUCTORS["tiny"] = lambda: tiny
    assert prepare(source=write_jsonl(tmp_path / "a.jsonl", ["the"]), **NO_SPLIT)[0] == 0
    assert np.fromfile(tmp_path / X / "train_00000.bin", dtype="<u4").tolist() == [258, 70_000]
    assert read_meta(str(tmp_path / X))["dtype"] == "uint32"

# --------------------------------------------------------------- kills, restart

def run_in_child(path, **settings):
    """Starts prepare_pile.main() in a forked process, as main_in_child does."""
    return main_in_child(prepare_pile, source=str(path), data_dir=str(path.parent / "data"), dataset="killed",
                         tokenizer="tiny", workers=2, safe_interval=0.02, **settings)


def main_in_child(script, **settings):
    """Starts main() in a forked process. Its `end` is a pipe that closes when it and all workers are gone."""
    end, held = os.pipe()

    def child():
        os.setpgrp()
        sys.stdout = sys.stderr = open(os.devnull, "w")
        vars(script).update(settings)
        script.main()

    process = fork.Process(target=child)
    process.start()
    os.close(held)
    process.end = end
    return process


def wait_for_end(process, timeout=30):
    process.join(timeout)
    assert process.exitcode is not None, "hangs"
    assert select.select([process.end], [], [], timeout)[0], "workers outlive their parent"
    os.close(process.end)
    return process.exitcode


def workers_of(process):
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc to find the workers in")
    return [int(pid) for pid in children.read_text().split()]


def wait_for_chunks(process, record, n):
    """Waits until n more chunks are recorded (or the process is done)."""
    def chunks():
        return json.loads(record.read_text())["chunk"] if record.exists() else 0

    start = chunks()
    while process.is_alive() and chunks() < start + n:
        time.sleep(0.001)


def test_killed_at_random_moments(prepare, tmp_path):
    """At least 5 times kill -9, then the same bytes as undisturbed; a file under its final name is final."""
    source = write_jsonl(tmp_path / "a.jsonl", texts_like_the_pile(2500))
    shares = {"val_fraction": 0.1, "test_fraction": 0.1, "shard_tokens": 60_000}
    prepare(source=source, dataset="killed", data_dir=tmp_path / "whole", **shares)
    whole, folder = contents(tmp_path / "whole" / "killed"), tmp_path / "data" / "killed"
    assert len(whole) > 8
    rng, killed, ages = random.Random(time.time_ns()), 0, {}
    while not (folder / "meta.json").exists():
        process = run_in_child(source, **shares)
        wait_for_chunks(process, folder / "part_00000.json", rng.randint(1, 25))
        time.sleep(rng.random() * 0.01)
        process.kill()
        status = wait_for_end(process)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        for name, data in contents(folder).items():
            assert data == whole[name], f"{name} is not what it is in the end"
            age = (folder / name).stat().st_mtime_ns
            assert ages.setdefault(name, age) == age, f"{name} was made again"
    assert killed >= 5
    assert contents(folder) == whole and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("to", ["group", "each"])
def test_sigterm_saves_and_says_how_to_go_on(prepare, tmp_path, to):
    """A signal to the process group, as a terminal sends it, and to every process, as schedulers do."""
    source = write_jsonl(tmp_path / "a.jsonl", texts_like_the_pile(1500))
    process = run_in_child(source)
    wait_for_chunks(process, tmp_path / "data" / "killed" / "part_00000.json", 3)
    pids = [] if to == "group" else workers_of(process)
    os.killpg(process.pid, signal.SIGTERM)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert wait_for_end(process) == 128 + signal.SIGTERM
    assert not (tmp_path / "data" / "killed" / "meta.json").exists()
    status, output = prepare(source=source, dataset="killed")
    assert status == 0 and "going on after chunk" in output
    prepare(source=source, dataset="killed", data_dir=tmp_path / "whole")
    assert contents(tmp_path / "data" / "killed") == contents(tmp_path / "whole" / "killed")


def test_a_kill_while_meta_json_is_written_leaves_nothing(prepare, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", texts_like_the_pile(50))
    assert prepare(source=source)[0] == 0
    (tmp_path / X / "meta.json").rename(tmp_path / X / "meta.json.tmp123")
    assert prepare(source=source)[0] == 0
    assert sorted(path.name for path in (tmp_path / X).glob("meta*")) == ["meta.json"]


def test_finished_is_left_alone_and_other_settings_are_refused(prepare, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", texts_like_the_pile(50))
    assert prepare(source=source)[0] == 0
    source.unlink()
    status, output = prepare(source=source)
    assert status == 0 and "is finished, nothing to do" in output
    one_line(prepare(source=source, tokenizer="byte"), "--tokenizer=tiny, not byte")
    os.truncate(tmp_path / X / "train_00000.bin", 10)
    missing = "train_00000.bin holds 10 bytes, not the"
    one_line(prepare(source=source, tokenizer="tiny"), missing)


def test_half_made_folder_refuses_other_settings_and_changed_files(prepare, tmp_path):
    first, second = (write_jsonl(tmp_path / f"{name}.jsonl", texts_like_the_pile(200)) for name in "ab")
    damaged = second.read_bytes()
    second.write_bytes(gzip.compress(damaged)[:-20])
    second = second.rename(tmp_path / "b.jsonl.gz")
    both = f"{first},{second}"
    status, output = prepare(source=both, **NO_SPLIT)
    assert status == 2 and f"{second}: damaged or cut short" in output and "Traceback" not in output
    folder = tmp_path / X
    assert not (folder / "meta.json").exists()
    assert json.loads((folder / "part_00000.json").read_text())["file"] == 1
    settings = {"source": both, "num_shards": 1, "shard_tokens": 100_000_000, **NO_SPLIT}
    for other, names in (({"source": first}, "--source="), ({"shard_tokens": 5}, "--shard_tokens"),
                         ({"val_fraction": 0.5}, "--val_fraction=0.0, not 0.5"),
                         ({"num_shards": 2}, "--num_shards=1, not 2")):
        status, output = prepare(**(settings | other))
        assert status == 2 and names in output.splitlines()[-1], output
    first.write_bytes(first.read_bytes() + b"\n")
    status, output = prepare(**settings)
    assert status == 2 and "have changed" in output
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(gzip.compress(damaged))  # repaired: goes on
    assert prepare(source=both, **NO_SPLIT)[0] == 0
    assert ids(folder, "train") == reference(texts_like_the_pile(200) * 2)


def test_worker_killed(prepare, tmp_path):
    """As by the kernel when memory is out: exit status 1, one line, and the next run goes on."""
    source = write_jsonl(tmp_path / "a.jsonl", texts_like_the_pile(1500))
    process = run_in_child(source)
    wait_for_chunks(process, tmp_path / "data" / "killed" / "part_00000.json", 3)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    assert wait_for_end(process) == 1
    assert prepare(source=source, dataset="killed")[0] == 0
    assert documents(tmp_path / "data" / "killed", "train")


def test_second_process_on_the_same_part_is_refused(prepare, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["text"])
    with held_by_another(tmp_path / X / ".part_00000.lock"):
        status, output = prepare(source=source)
        assert status == 2 and "another process is at work on part 0" in output
    assert prepare(source=source)[0] == 0


@contextlib.contextmanager
def held_by_another(lock):
    """Another process holds the lock, and is killed at the end."""
    lock.parent.mkdir(parents=True)
    here, there = fork.Pipe()

    def hold():
        with only_process(lock):
            there.send("held")
            there.recv()

    process = fork.Process(target=hold)
    process.start()
    here.recv()
    yield
    process.kill()
    process.join()

# ------------------------------------------------------------------------ parts

@pytest.mark.parametrize("n_files", [1, 5])
def test_parts_merge_to_the_same_whoever_is_last(prepare, tmp_path, n_files):
    """3 parts of 1 file (by chunks) and of 5 (by files), in one folder and in folders copied together."""
    texts = texts_like_the_pile(400)
    for i in range(n_files):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", texts[i::n_files])
    common = {"source": tmp_path / "in", "num_shards": 3, "shard_tokens": 20_000}
    for i in (1, 2, 0):
        status, output = prepare(**common, shard_index=i)
        assert status == 0 and (i == 0 or "not yet --shard_index=0" in output)
    one_folder = contents(tmp_path / X)
    for i in (0, 1, 2):
        prepare(**common, shard_index=i, data_dir=tmp_path / f"machine{i}")
        assert not (tmp_path / f"machine{i}" / "x" / "meta.json").exists()
    for i in (0, 2):
        shutil.copytree(tmp_path / f"machine{i}" / "x", tmp_path / "machine1" / "x", dirs_exist_ok=True)
    (tmp_path / "machine1" / "x" / "train_part002_00000.bin").rename(tmp_path / "late.bin")
    status, output = prepare(**common, shard_index=1, data_dir=tmp_path / "machine1")
    assert status == 2 and "train_part002_00000.bin is missing" in output
    (tmp_path / "late.bin").rename(tmp_path / "machine1" / "x" / "train_part002_00000.bin")
    assert prepare(**common, shard_index=1, data_dir=tmp_path / "machine1")[0] == 0
    assert contents(tmp_path / "machine1" / "x") == one_folder
    prepare(source=tmp_path / "in", dataset="one", num_shards=1, shard_index=0, data_dir=tmp_path / "data")
    for split in SPLITS:
        assert documents(tmp_path / "data" / "one", split) == documents(tmp_path / X, split)

# -------------------------------------------------------------------- bad input

def test_bad_records_are_counted_and_named(prepare, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "good"}', b'{"text": ', b"", b"[1]", b"3", b'{"other": 1}', b'{"text": null}',
             b'{"text": "\xff"}', b"[" * 100_000, b'{"text": "' + b"x" * (3 << 20) + b'"}',
             b'{"text": "\\ud800"}', b'{"text": "last"}  \r']
    path.write_bytes(b"\n".join(lines))
    status, output = prepare(source=path, max_document_mb=1, **NO_SPLIT)
    assert status == 0
    assert ids(tmp_path / X, "train") == reference(["good", "\ufffd", "last"])
    bad = read_meta(str(tmp_path / X))["bad_records"]
    at = {"broken JSON": [2, 9], "not a JSON object": [4, 5], "no key 'text'": [6],
          "'text' is not a string": [7], "invalid UTF-8": [8], "longer than --max_document_mb": [10]}
    assert bad == {reason: {"count": len(lines), "first": [f"{path}:{line}" for line in lines]}
                   for reason, lines in at.items()}
    assert f"2 broken JSON ({path}:2, {path}:9); 2 not a JSON object" in output


def test_no_documents(prepare, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    status, output = prepare(source=path, text_key="content")
    assert status == 2 and (f"no documents to train on in --source={path}; bad records, left out: "
                            f"2 no key 'content' ({path}:1, {path}:2)") in output
    assert prepare(source=path, text_key="text")[0] == 0  # the wrong try is not in the way
    (tmp_path / "empty.jsonl").touch()
    status, output = prepare(source=tmp_path / "empty.jsonl", dataset="y")
    assert status == 2 and "no documents to train on in" in output
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    status, output = prepare(source=tmp_path / "latin.txt", dataset="z")
    assert status == 2 and "1 invalid UTF-8" in output


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "not one"])
def test_corrupt_archive_is_one_line(prepare, tmp_path, suffix, damage):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, texts = tmp_path / f"a{suffix}", texts_like_the_pile(300)
    plain = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(plain))
    else:
        path.write_bytes(pa.compress(plain, codec="zstd", asbytes=True))
    data = path.read_bytes()
    middle = len(data) // 2
    garbled = data[:middle] + b"garbage" * 9 + data[middle + 63:]
    path.write_bytes({"truncated": data[:-9], "garbled": garbled, "not one": b"no archive"}[damage])
    status, output = prepare(source=path)
    lines = [line for line in output.splitlines() if line.startswith("prepare_pile.py")]
    assert status == 2 and len(lines) == 1 and f"{path}: damaged or cut short" in lines[0]
    assert not (tmp_path / X / "meta.json").exists()


def test_byte_order_mark_and_wide_zstd_window(prepare, tmp_path):
    """A first JSON line keeps its document; a window that the reader does not take is named as that."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "\\ufeffsecond"}\n')
    assert prepare(source=path, **NO_SPLIT)[0] == 0
    assert ids(tmp_path / X, "train") == reference(["first", "\ufeffsecond"])
    pytest.importorskip("pyarrow")
    # a frame with a window of 2**31 bytes: magic, no size, window, an empty block
    (tmp_path / "b.jsonl.zst").write_bytes(bytes.fromhex("28b52ffd 00 a8 010000"))
    status, output = prepare(source=tmp_path / "b.jsonl.zst", dataset="y")
    assert status == 2 and "zstd window beyond 128 MiB" in output and "damaged" not in output


def test_parquet_without_the_column(prepare, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"content": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    status, output = prepare(source=tmp_path / "a.parquet")
    assert status == 2 and "no column 'text' among content, n; --text_key names it" in output
    status, output = prepare(source=tmp_path / "a.parquet", dataset="y", text_key="n")
    assert status == 2 and "2 'n' is not a string" in output
    status, output = prepare(source=tmp_path / "a.parquet", dataset="y", text_key="content")
    assert status == 0 and f"1 'content' is not a string ({tmp_path / 'a.parquet'}:2)" in output


@pytest.mark.parametrize("settings, line", [
    ({"source": "nowhere.jsonl"}, "no such file or folder"),
    ({"source": "nothing"}, "expects files in .jsonl"),
    ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave some to train"),
    ({"tokenizer": "gpt9"}, "expects byte, "), ({"shard_index": 1}, "expects 0 to 0"),
    ({"workers": -1}, "expects 0 or more"), ({"dataset": "a/b"}, "plain name")])
def test_wrong_settings(prepare, tmp_path, monkeypatch, settings, line):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in" / "a.jsonl", ["a"])
    (tmp_path / "nothing").mkdir()
    one_line(prepare(**({"source": "in"} | settings)), line)
    assert not (tmp_path / "data").exists()


def test_vocabulary_out_of_reach(prepare, tmp_path):
    def unreachable():
        raise ConnectionError("HTTPSConnectionPool(host=...)")

    tiktoken.registry.ENCODING_CONSTRUCTORS["tiny"] = unreachable
    one_line(prepare(source=write_jsonl(tmp_path / "a.jsonl", ["a"])), "TIKTOKEN_CACHE_DIR")


def test_command_line(tmp_path):
    """As a user types it; and without the libraries that only some formats need."""
    (tmp_path / "pyarrow.py").write_text("raise ImportError('not installed')")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl.zst").write_text("text")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    for source, dataset, status, words in (
            ("a.txt", "pile", 0, "data/pile is finished: train 5 tokens of 1 documents"),
            ("a.jsonl.zst", "other", 2, "pip install pyarrow")):
        command = [sys.executable, REPO / "prepare_pile.py", f"--source={source}", f"--dataset={dataset}",
                   "--tokenizer=byte", "--val_fraction=0", "--test_fraction=0"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == status and words in done.stdout + done.stderr, done
        assert "Traceback" not in done.stderr

"""
Finds files of text and says which split each belongs to.

    files = find_texts("folder,more.jsonl.zst")
    files = split_texts(leave_out_twins(files), {"val": 0.02, "test": 0.02})
"""
import filecmp
import math
import os
import sysconfig
from collections import defaultdict

from nanorank.inputs import find_files, open_input, walk
from nanorank.text_files import CHUNK, DATASETS, SUFFIXES, last_start


def find_texts(places):
    """The files of a source of text, with `split` set if names say so. places: the setting --source."""
    if places in ("python", "packages"):
        return installed_files(places)
    return find_files(places, SUFFIXES, tuple(DATASETS))


def installed_files(which):
    """python: the library of this Python; packages: also the installed packages, with their documents."""
    tests_and_packages = ("site-packages", "dist-packages", "test", "tests", "idle_test")
    files = walk(sysconfig.get_path("stdlib"), (".py",), without=tests_and_packages)
    if which == "packages":
        files += walk(sysconfig.get_path("purelib"), (".py", ".pyi", ".md", ".rst", ".txt"))
    return files


def leave_out_twins(files):
    """The files without those of train that hold the same bytes as one of val or test, which come first."""
    held_out = defaultdict(list)  # size: files of val and test
    kept = []
    for file in files:
        is_local = file.size and os.path.exists(file.path)
        if file.split and is_local:
            held_out[file.size].append(file)
        twins = [] if file.split or not is_local else held_out[file.size]
        twins = [twin for twin in twins if filecmp.cmp(file.path, twin.path, shallow=False)]
        if twins:
            print(f"note: {file.path} holds the same bytes as {twins[0].path} of {twins[0].split}: "
                  "left out of train")
        else:
            kept.append(file)
    return kept


def split_texts(files, share):
    """The files with each .txt of no split put into a split, or cut into all.

    share: {"val": 0.02, "test": 0.02}. A long text is cut behind lines: its beginning goes to train, what
    follows to val and test. Short texts stay whole and go to train; if all are short, evenly spaced ones go
    to val and test. One or two short texts are cut all the same. So each split has some.
    """
    texts = [file for file in files if not file.split and file.name.endswith(".txt") and file.size]
    cut = {file: cut_text(file, share) for file in texts}
    if len(texts) > 2:
        cut = {file: pieces for file, pieces in cut.items() if is_near(file, pieces, share)}
    held_out = {} if cut else spaced(texts, share)
    placed = []
    for file in files:
        split = file.split or held_out.get(file, "train")
        placed += cut.get(file, [file._replace(split=split)])
    return placed


def cut_text(file, share):
    """The Inputs of train, test and val that a text is cut into; a text of one line is train alone."""
    end = file.size
    held_out = []
    with open_input(file.path, CHUNK) as raw:
        for split in ("test", "val"):
            start = line_start(raw, max(0, end - math.ceil(file.size * share[split])))
            if share[split] and 0 < start < end:
                held_out.append(file._replace(split=split, size=end - start, start=start, stop=end))
                end = start
    return [file._replace(split="train", size=end, stop=end), *held_out]


def is_near(file, pieces, share):
    """True if each piece of a cut text is between its share and twice that."""
    sizes = {piece.split: piece.size for piece in pieces}
    return all(0 < sizes.get(split, 0) <= 2 * x * file.size for split, x in share.items() if x)


def spaced(texts, share):
    """{file: split} of whole texts for val and test: their share, at least one, evenly spaced."""
    n = len(texts)
    chosen = {}
    for split, x in share.items():
        k = max(1, round(x * n)) if x else 0
        for i in range(k):
            at = int((i + 0.5) * n / k)
            while texts[at % n] in chosen and len(chosen) < n:
                at += 1
            chosen.setdefault(texts[at % n], split)
    return chosen


def line_start(raw, position):
    """The last place up to `position` where a line of a file begins; in a line beyond 1 MiB, a character."""
    low = max(0, position - CHUNK)
    raw.seek(low)
    before = raw.read(position - low)
    newline = before.rfind(b"\n")
    if newline >= 0 or low == 0:
        return low + newline + 1
    return low + last_start(before + raw.read(1))

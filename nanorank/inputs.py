"""
Finds the files of a source, here or on the Hugging Face hub, and opens them: for text and for images.

    for file in find_files("folder,more.jsonl,org/name", (".jsonl", ".parquet")):
        with open_input(file.path, block_size=1 << 20) as raw:
            raw.read()
"""
import contextlib
import importlib
import os
import re
from typing import NamedTuple

from nanorank.errors import UserError

HUB_ID = r"\w[\w.-]*/\w[\w./-]*"  # org/name or org/name/folder


class Input(NamedTuple):
    split: str  # split of its documents; empty: by hash
    path: str   # to open; hf:// on the hub
    name: str   # below its source, the same on all machines
    size: int   # bytes
    start: int = 0     # the first byte, and the one to stop at: a .txt file may be cut into splits
    stop: int = 2**62


def need(module, what):
    """The module. Raises UserError that names the package to install if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{what} needs {package}: pip install {package}") from None


def first_line(error):
    """The first line of an exception's message, shortened."""
    message = str(getattr(error, "strerror", None) or error).strip()
    return (message or type(error).__name__).splitlines()[0][:150]

# -----------------------------------------------------------------------------
# finding

def find_files(places, suffixes, fallback=(), what="files in"):
    """The files of a source, sorted, with `split` set to val or test if names say so.

    places: the setting --source. fallback: suffixes to look for where a place has none of the first. Raises
    UserError if there are no files; what: words before the suffixes.
    """
    found = []
    for place in places.split(","):
        if os.path.isdir(place):
            files = walk(place, (*suffixes, *fallback))
        elif os.path.exists(place):
            files = [Input("", place, os.path.basename(place), os.path.getsize(place))]
        elif re.fullmatch(HUB_ID, place) and not place.endswith((*suffixes, *fallback)):
            files = hub_files(place)
        else:
            raise UserError(f"--source={place}: no such file or folder, "
                            "and no Hugging Face id (org/name) either")
        chosen = [file for file in files if file.name.endswith(suffixes)]
        if not chosen:
            chosen = [file for file in files if file.name.endswith(fallback)]
        if not chosen:
            raise UserError(f"{place}: expects {what} {', '.join((*suffixes, *fallback))}")

        # val and test in a name mean splits only if other names hold train
        splits = [split_in_name(file.name) for file in chosen]
        for file, split in zip(chosen, splits):
            if split == "train" or "train" not in splits:
                split = ""
            found.append(file._replace(split=split))
    return found


def split_in_name(name):
    """train, val, test, or empty if a file's name says nothing."""
    for split, words in (("train", "train"), ("val", "val|valid|validation|dev"), ("test", "test")):
        if re.search(rf"(^|[/._-])({words})([/._-]|\d|$)", name):
            return split
    return ""


def walk(root, suffixes, without=()):
    """The files below a folder, sorted by name; hidden ones and the folders `without` are left out."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        for name in names:
            if name.endswith(suffixes) and not name.startswith("."):
                path = os.path.join(folder, name)
                files.append(Input("", path, os.path.relpath(path, root), os.path.getsize(path)))
    return sorted(files, key=lambda file: file.name)


def hub_files(place):
    """The files of a Hugging Face dataset, org/name or org/name/folder, at its newest revision.

    Their paths hold that revision, so that all machines and restarts read the same bytes.
    """
    hub = need("huggingface_hub", f"--source={place}")
    org, name, *folders = place.rstrip("/").split("/")
    repo = f"{org}/{name}"
    below = "".join(f"{folder}/" for folder in folders)
    try:
        info = hub.HfApi().dataset_info(repo, files_metadata=True, timeout=10)
    except Exception as error:  # of httpx, requests or huggingface_hub, as versions differ
        why = what_hub_refuses(repo, error) or f"the Hugging Face hub did not give it: {first_line(error)}"
        raise UserError(f"{place} is no file or folder here, and {why}") from None
    files = []
    for file in sorted(info.siblings, key=lambda file: file.rfilename):
        if file.rfilename.startswith(below):
            path = f"hf://datasets/{repo}@{info.sha}/{file.rfilename}"
            files.append(Input("", path, file.rfilename, file.size or 1))
    return files

# -----------------------------------------------------------------------------
# opening

@contextlib.contextmanager
def open_input(path, block_size):
    """A file here or on the hub, opened to read bytes; block_size: bytes fetched from the hub at once.

    Errors of reading it inside are a UserError that names it.
    """
    try:
        if path.startswith("hf://"):
            file = need("huggingface_hub", path).HfFileSystem().open(path, block_size=block_size)
        else:
            file = open(path, "rb")
        with file:
            yield file
    except UserError:
        raise
    except Exception as error:  # pyarrow, zlib and the hub's clients raise a dozen kinds
        raise UserError(what_hub_refuses(path, error) or what_is_damaged(path, error)) from None


def what_hub_refuses(place, error):
    """How to get at a data set that the hub does not give to everyone; empty for any other error."""
    cause = error
    while cause:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403) or type(cause).__name__ in ("GatedRepoError", "RepositoryNotFoundError"):
            repo = "/".join(place.removeprefix("hf://datasets/").partition("@")[0].split("/")[:2])
            return (f"the Hugging Face hub has no {repo}, or not for everyone: accept the terms at "
                    f"https://huggingface.co/datasets/{repo}, then `hf auth login` or HF_TOKEN=...; "
                    "or give --source=FOLDER")
        cause = cause.__cause__ or cause.__context__
    return ""


def what_is_damaged(path, error):
    if "too much memory" in str(error):  # pyarrow's zstd takes a window of 128 MiB at most
        return (f"{path}: was compressed with a zstd window beyond 128 MiB; write it anew: "
                f"zstd -dc --long=31 {path} | zstd -o NEW")
    return (f"{path}: damaged or cut short ({first_line(error)}); what is done is kept, "
            "and the same command goes on once the file is whole")


def open_parquet(raw, path, buffer_size):
    """The reader of a .parquet file that holds one buffer, not row groups."""
    parquet = need("pyarrow.parquet", path)
    return parquet.ParquetFile(raw, pre_buffer=False, buffer_size=buffer_size)

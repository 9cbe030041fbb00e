"""
Text to token ids: bytes, or any encoding of tiktoken.

    vocab_size, eot = vocabulary("gpt2")
    ids = encode(["one document", "another"], "gpt2")    # each followed by eot
"""
import contextlib
import importlib

import numpy as np

from nanorank.errors import UserError
from nanorank.inputs import need

EOT = "<|endoftext|>"


def vocabulary(name):
    """(vocabulary size, end-of-text id). Raises UserError that says how to supply a missing vocabulary."""
    if name == "byte":
        return 257, 256
    tiktoken = need("tiktoken", f"--tokenizer={name}")
    names = sorted(tiktoken.list_encoding_names())
    if name not in names:
        raise UserError(f"--tokenizer={name}: expects byte, {', '.join(names)}")
    try:
        enc = tiktoken.get_encoding(name)
    except Exception as error:  # of requests, or a ValueError for a damaged file
        raise UserError(f"tiktoken cannot fetch {name}'s vocabulary ({type(error).__name__}); offline, set "
                        "TIKTOKEN_CACHE_DIR to a folder that a machine with network has filled so, "
                        "or take --tokenizer=byte") from None
    if EOT not in enc.special_tokens_set:
        raise UserError(f"--tokenizer={name} has no {EOT}, which ends documents here")
    return enc.n_vocab, enc.eot_token


def encode(texts, tokenizer):
    """Ids of all texts (an integer array), each as encode_ordinary gives them and followed by end-of-text."""
    if tokenizer == "byte":
        eot = np.array([256], dtype=np.uint16)
        pieces = []
        for text in texts:
            pieces += [np.frombuffer(text.encode(), dtype=np.uint8), eot]
        return np.concatenate(pieces)

    # one call for all texts needs no lists of ints; not if one holds EOT itself or overflows the regex
    enc = importlib.import_module("tiktoken").get_encoding(tokenizer)
    joined = EOT.join([*texts, ""])
    if joined.count(EOT) == len(texts):
        with contextlib.suppress(ValueError):
            return enc.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
    ids = []
    for text in texts:
        ids += encode_alone(enc, text)
        ids.append(enc.eot_token)
    return np.array(ids, dtype=np.uint32)


def encode_alone(enc, text, piece=50_000):
    """Ids of one text. One that overflows tiktoken's regex is encoded in pieces of so many characters."""
    try:
        return enc.encode(text, disallowed_special=())  # encode_ordinary would panic if the regex overflows
    except ValueError:
        ids = []
        for start in range(0, len(text), piece):
            ids += enc.encode(text[start:start + piece], disallowed_special=())
        return ids

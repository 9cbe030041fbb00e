"""
Text from a GPT checkpoint, ours or nanoGPT's.

    python -m scripts.sample out/demo-0 --prompt="def main(" --max_new_tokens=300
    python -m scripts.sample gpt2-finetuned/ckpt.pt --tokenizer=gpt2 --temperature=0.8 --top_k=200
"""
import os

import torch

from configurator import configure
from model import load_gpt
from nanorank.device import init_dist
from nanorank.errors import UserError, user_errors
from nanorank.files import load_pt
from nanorank.tokens import read_meta

prompt = "\n"           # text to continue
tokenizer = "auto"      # byte or a tiktoken encoding (gpt2); auto: that of the data set the checkpoint was trained on
max_new_tokens = 300    # tokens to sample
num_samples = 1         # continuations
temperature = 0.8       # 0 takes the likeliest token
top_k = 200             # sample among this many, 0: among all
seed = 1337             # of the sampling
device = "auto"         # auto, cpu, cuda, mps


def codec(name):
    """(encode, decode, vocabulary size without padding) of a tokenizer by name."""
    if name == "byte":
        return lambda text: list(text.encode()), lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace"), 257
    import tiktoken
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # an unknown name, or no network
        raise UserError(f"tokenizer {name}: {error}; offline, set TIKTOKEN_CACHE_DIR to a folder that holds its files") from None
    return encoding.encode_ordinary, encoding.decode, encoding.n_vocab


def main(path):
    with user_errors("sample.py"):
        world = init_dist(device)
        file = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
        checkpoint = load_pt(file)
        try:
            model = load_gpt(checkpoint).to(world.device).eval()
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
        name = tokenizer
        if name == "auto":
            config = checkpoint.get("config")
            config = config if isinstance(config, dict) else {}
            folder = os.path.join(str(config.get("data_dir", "data")), str(config.get("dataset", "")))
            if not os.path.exists(os.path.join(folder, "meta.json")):
                raise UserError(f"{path} does not tell its tokenizer ({folder} is not there): give --tokenizer=gpt2 or byte")
            name = read_meta(folder)["tokenizer"]
        encode, decode, n_tokens = codec(name)
        if not prompt or num_samples < 1 or max_new_tokens < 1 or temperature < 0 or top_k < 0:
            raise UserError("--prompt must not be empty, --num_samples and --max_new_tokens at least 1, --temperature and --top_k not negative")
        idx = torch.tensor([encode(prompt)] * num_samples, device=world.device)
        if int(idx.max()) >= model.args["vocab_size"]:
            raise UserError(f"tokenizer {name} does not fit the model's vocabulary of {model.args['vocab_size']}")
        try:
            texts = model.generate(idx, max_new_tokens, temperature, top_k, n_tokens, torch.Generator(world.device).manual_seed(seed))
        except ValueError as error:
            raise UserError(f"{file}: {error}") from None
    for ids in texts:
        print(decode(ids.tolist()), end="\n---------------\n")


if __name__ == "__main__":
    paths = configure(globals(), positional="CKPT")
    with user_errors("sample.py"):
        if len(paths) != 1:
            raise UserError(f"expects one checkpoint, got {len(paths)}: python -m scripts.sample out/demo-0; --help lists the settings")
    main(paths[0])

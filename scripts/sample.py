"""
Text from a GPT checkpoint, ours or nanoGPT's.

    python -m scripts.sample out/demo-0 --prompt="def main(" --max_new_tokens=300
    python -m scripts.sample gpt2-finetuned/ckpt.pt --tokenizer=gpt2 --temperature=0.8 --top_k=200
"""
import os

import torch

from configurator import configure
from model import load_gpt
from nanorank.device import pick_device
from nanorank.errors import UserError, user_errors
from nanorank.files import load_pt
from nanorank.generate import generate
from nanorank.tokenizer import encode, vocabulary
from nanorank.tokens import read_meta

prompt = "\n"           # text to continue
tokenizer = "auto"      # byte or a tiktoken encoding (gpt2); auto: that of the checkpoint's data set
max_new_tokens = 300    # tokens to sample
num_samples = 1         # continuations
temperature = 0.8       # 0 takes the likeliest token
top_k = 200             # sample among this many, 0: among all
seed = 1337             # of the sampling
device = "auto"         # auto, cpu, cuda, mps


def tokenizer_of(path, checkpoint):
    """The tokenizer of the data that a checkpoint was trained on."""
    config = checkpoint.get("config")
    if not isinstance(config, dict):
        config = {}
    folder = os.path.join(str(config.get("data_dir", "data")), str(config.get("dataset", "")))
    if not os.path.exists(os.path.join(folder, "meta.json")):
        raise UserError(f"{path} does not tell its tokenizer ({folder} is not there): "
                        "give --tokenizer=gpt2 or byte")
    return read_meta(folder)["tokenizer"]


def decode(ids, name):
    if name == "byte":
        return bytes(i for i in ids if i < 256).decode(errors="replace")
    import tiktoken
    return tiktoken.get_encoding(name).decode(ids)


def main(path):
    if not prompt:
        raise UserError("--prompt must not be empty")
    if num_samples < 1 or max_new_tokens < 1:
        raise UserError("--num_samples and --max_new_tokens must be at least 1")
    if temperature < 0 or top_k < 0:
        raise UserError("--temperature and --top_k must not be negative")

    torch_device = pick_device(device)
    ckpt_path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    checkpoint = load_pt(ckpt_path)
    model = load_gpt(checkpoint, path=ckpt_path).to(torch_device).eval()
    name = tokenizer_of(path, checkpoint) if tokenizer == "auto" else tokenizer
    n_tokens, _ = vocabulary(name)

    ids = encode([prompt], name)[:-1]  # without the end of the text
    if ids.max() >= model.args["vocab_size"]:
        raise UserError(f"tokenizer {name} does not fit the model's vocabulary of {model.args['vocab_size']}")
    idx = torch.tensor(ids.astype(int), device=torch_device).expand(num_samples, -1)
    generator = torch.Generator(torch_device).manual_seed(seed)
    try:
        texts = generate(model, idx, max_new_tokens, temperature, top_k, n_tokens, generator)
    except UserError as error:
        raise UserError(f"{ckpt_path}: {error}") from None
    for ids in texts.tolist():
        print(decode(ids, name), end="\n---------------\n")


if __name__ == "__main__":
    paths = configure(globals(), positional="CKPT")
    with user_errors("sample.py"):
        if len(paths) != 1:
            raise UserError(f"expects one checkpoint, got {len(paths)}: "
                            "python -m scripts.sample out/demo-0; --help lists the settings")
        main(paths[0])

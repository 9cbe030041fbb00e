"""The code in docs/your-own-loop.md and docs/tour.ipynb, run as it stands."""
import json
import re

import pytest
import torch
from conftest import REPO

LR = 1e-2
DECAY = {"attn": 0.0, "mlp": 0.1, "embed": 0.1, "none": 0.0}


def blocks(section):
    """The code blocks of a section of docs/your-own-loop.md."""
    text = (REPO / "docs" / "your-own-loop.md").read_text(encoding="utf-8")
    text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.S), text


def test_the_plain_loop_prints_what_the_page_says(capsys):
    (code,), text = blocks("PyTorch")
    names = {}
    exec(code, names)
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == [line.strip() for line in text.splitlines() if re.match(r"    \w+ +\d+ tensors", line)]
    assert [int(line.split()[0]) for line in out[4:]] == [0, 10, 20]
    (code,), _ = blocks("Names that are not known")
    exec(code, names)
    assert [group["name"] for group in names["groups"]] == ["attn", "none"]


def llama(transformers):
    config = transformers.LlamaConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=40, pad_token_id=0)
    ids = torch.randint(1, 40, (8,))
    return transformers.LlamaForCausalLM(config), [{"input_ids": ids, "labels": ids}] * 4


def vit(transformers):
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=8)
    data = {"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(1)}
    return transformers.ViTForImageClassification(config), [data] * 4


@pytest.mark.parametrize("build", [llama, vit])
def test_trainer_decays_each_group_exactly_and_logs_ranks(build, tmp_path):
    """Two steps of Trainer. In the first, AdamW moves a weight p to p (1 - lr wd) - lr g / (|g| + eps)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    (code,), _ = blocks("transformers.Trainer")
    names = {}
    exec(code, names)
    net, data = build(transformers)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=LR,
        lr_scheduler_type="constant", max_grad_norm=0, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no")
    trainer = names["trainer_for"](net, args, data, every=1)

    seen = []  # of each step: {parameter: (before, gradient, after)}

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            self.before = [(p.detach().clone(), p.grad.detach().clone()) for p in net.parameters()]

        def on_optimizer_step(self, *args, **kwargs):
            after = [p.detach().clone() for p in net.parameters()]
            seen.append([(p, g, q) for (p, g), q in zip(self.before, after)])

    trainer.add_callback(Watch())
    trainer.train()

    groups = trainer.optimizer.param_groups
    assert {group["name"]: group["weight_decay"] for group in groups} == DECAY
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(seen) == 2
    moments = {}
    for t, step in enumerate(seen, 1):
        for (name, parameter), (p, g, q) in zip(net.named_parameters(), step, strict=True):
            p, g, q = p.double(), g.double(), q.double()
            m, v = moments.get(name, (0, 0))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            moments[name] = m, v
            update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            want = p * (1 - LR * decay[id(parameter)]) - LR * update
            assert torch.allclose(q, want, rtol=0, atol=1e-6), name
            if decay[id(parameter)]:  # the decay itself is far above the tolerance
                assert (LR * decay[id(parameter)] * p).abs().max() > 1e-5, name
    ranks = [line for line in trainer.state.log_history if "attn_rank95_qk" in line]
    assert [line["step"] for line in ranks] == [1, 2]
    assert all(1 <= line["attn_rank95_qk"] <= 12 for line in ranks)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells in order, as a fresh clone runs them: without data, in an empty folder."""
    notebook = json.loads((REPO / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]), names)
    assert (tmp_path / "tour.png").stat().st_size > 1000
    assert names["results"][1.0][-1] < names["results"][0.0][-1]  # decay on attention lowers its rank

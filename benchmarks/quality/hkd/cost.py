"""What one stage of the pyramid costs with fused coupled losses and with eager ones, at a real vocabulary.

    python benchmarks/quality/run.py cost

Two small Llamas over the vocabulary of Qwen2.5 run the same steps on the same tokens: the larger learns by cross
entropy, the smaller by cross entropy and from the larger. Each way has a process of its own, whose peak memory is the
kernel's VmHWM. Written to results/hkd_cost.json.
"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from hkdfast import Head, pyramid
from hkdfast.batch import answer_rows

FILE = Path(__file__).parents[1] / "results" / "hkd_cost.json"
VOCABULARY = 151936
WIDTHS = (512, 256)  # of teacher and student
BATCH, LENGTH = 8, 64
STEPS = 4  # the first is not timed
TEACH = {"divergence_weight": 1.0, "temperature": 2.0, "t_squared": True}


def models():
    torch.manual_seed(0)
    for width in WIDTHS:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=VOCABULARY,
        )
        yield LlamaForCausalLM(config)


def rows(model):
    def head(batch):
        hidden = model.model(batch["input_ids"], use_cache=False).last_hidden_state
        return Head(hidden[answer_rows(batch)[0]], model.lm_head.weight)

    return head


def eager(sources, batch):
    """The loss of `pyramid.loss` in mode "concurrent" on logits that exist."""
    labels = answer_rows(batch)[1]
    teacher, student = (F.linear(head.hidden, head.weight) for head in (source(batch) for source in sources))
    temperature = TEACH["temperature"]
    p, q = ((logits / temperature).log_softmax(-1) for logits in (teacher.detach(), student))
    divergence = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean() * temperature**2
    hard = F.cross_entropy(teacher, labels) + F.cross_entropy(student, labels)
    return hard + TEACH["divergence_weight"] * divergence


def fused(sources, batch):
    return pyramid.loss(sources, batch, "concurrent", **TEACH)[0]


WAYS = {"eager": eager, "fused": fused}


def stage(way):
    """Run the steps one way: their losses, the seconds of a step, and the peak memory before and after, in MiB."""
    pair = list(models())
    sources = [rows(model) for model in pair]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in pair]  # no state: memory is the losses' own
    generator = torch.Generator().manual_seed(1)
    before, losses, seconds = peak(), [], []
    for _ in range(STEPS):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
        start = time.perf_counter()
        loss = WAYS[way](sources, {"input_ids": ids, "labels": ids})
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    norms = [sum(p.double().square().sum().item() for p in model.parameters()) ** 0.5 for model in pair]
    return {
        "losses": losses,
        "norms": norms,
        "seconds": sorted(seconds[1:])[(STEPS - 1) // 2],
        "before": before,
        "peak": peak(),
    }


def peak():
    """VmHWM of this process in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def add_arguments(parser):
    parser.add_argument("--threads", type=int, default=1)


def run(options):
    found = {}
    for way in WAYS:
        # not through run.py, whose imports would count as memory of the stage
        command = [sys.executable, "-m", "hkd.cost", way, str(options.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        found[way] = json.loads(done.stdout)
        print(way, json.dumps(found[way]))
    for one, other in zip(found["eager"]["losses"], found["fused"]["losses"], strict=True):
        if abs(one - other) > 1e-4 * abs(one):
            sys.exit(f"the losses differ: {one} and {other}")
    facts = {"processor": platform.machine(), "torch": torch.__version__, "threads": options.threads}
    facts |= {"vocabulary": VOCABULARY, "widths": WIDTHS, "rows": BATCH * (LENGTH - 1)}
    FILE.write_text(json.dumps(facts | found, indent=1) + "\n")


if __name__ == "__main__":
    way, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(stage(way)))

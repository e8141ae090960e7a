"""What a model does behind its head is measured: exactly, in every dtype, wherever its weights are."""

import itertools
import warnings

import peft
import pytest
import torch
import transformers as hf
import zoo
from zoo import one_thread, two_processes  # noqa: F401

from hkdfast.hf import LanguageHead
from hkdfast.hf.probe import measure, numbers, points

CPU = torch.device("cpu")
SCALES = (1.0, 0.125, 0.0625, 0.1, 1 / 3, 8.0, 0.196, 1 / 12.8)
CAPS = (None, 3.0, 15.0, 30.0, 50.0)
OTHERS = {1e-6, 1e-5, 0.02, 2.0, 4.0, 61.0, 64.0, 10000.0}  # what else is in a configuration


def behind(x, scale, softcap, divide):
    x = x / (1 / scale) if divide else x * scale
    return x if softcap is None else torch.tanh(x / softcap) * softcap


@pytest.mark.parametrize("words", [61, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True])
def test_scale_and_softcap_are_the_numbers_of_the_configuration(words, dtype, cast):
    """cast: the model rounds its logits to its own dtype first."""
    for scale, softcap, divide in itertools.product(SCALES, CAPS, (False, True)):
        x = points(words, CPU)
        y = behind(x.to(dtype) if cast else x, scale, softcap, divide)
        known = OTHERS | {1 / scale if divide else scale} | {softcap or 1.0}
        assert measure(x, y.float() if cast else y, dtype, known) == (scale, softcap)


@pytest.mark.parametrize("words", [61, 5000])
def test_without_a_configuration_they_are_known_to_the_rounding_of_the_model(words):
    for scale, softcap in itertools.product(SCALES, CAPS):
        x = points(words, CPU)
        # softcap * tanh(scale * x / softcap) has five roundings
        for dtype, slack in ((torch.float64, 2e-15), (torch.float32, 8e-7), (torch.bfloat16, 0.03)):
            y = behind(x.to(dtype), scale, softcap, False)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = measure(x, y, dtype, set())
            assert abs(found[0] - scale) <= (slack if softcap else slack / 2) * scale
            assert (found[1] is None) == (softcap is None)
            assert softcap is None or abs(found[1] - softcap) <= slack * softcap
            if said:
                assert dtype == torch.bfloat16 and "is measured to" in str(said[0].message)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.clamp(-50, 50),
        lambda x: x + 1,
        lambda x: -x,
        lambda x: x**3,
        lambda x: 0 * x,
        lambda x: 20 * torch.erf(x / 20),
        lambda x: x.log_softmax(-1),
        lambda x: torch.cat([x[:-1], x[-1:] - torch.inf]),  # a token that is masked
        lambda x: torch.cat([x[:-1], torch.full_like(x[-1:], -1e4)]),
        lambda x: torch.cat([x[:-1], 1.001 * x[-1:]]),
        lambda x: torch.where(x > 0, x, 0.5 * x),
        lambda x: x * torch.nan,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_anything_else_is_refused(change, dtype):
    x = points(61, CPU)
    with pytest.raises(ValueError, match="becomes|not finite"):
        measure(x, change(x), dtype, {1.0, 50.0, 20.0})


def test_numbers_are_found_at_every_depth():
    config = hf.LlavaConfig(text_config=hf.GraniteConfig(logits_scaling=7.5))
    assert {7.5, 1e-5} <= numbers(config) and all(type(x) is float and x > 0 for x in numbers(config))


SIZES = dict(vocab_size=67, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
FAMILIES = {
    "granite": (lambda: hf.GraniteConfig(**zoo.GROUPED, **SIZES, logits_scaling=6.0), 1 / 6, None),
    "hyperclovax": (lambda: hf.HyperCLOVAXConfig(**zoo.GROUPED, **SIZES, logits_scaling=0.3), 0.3, None),
    "cohere2": (lambda: hf.Cohere2Config(**zoo.GROUPED, **SIZES, logit_scale=0.3), 0.3, None),
    "gemma2": (lambda: hf.Gemma2Config(**zoo.GROUPED, **SIZES, head_dim=8, final_logit_softcapping=7.0), 1.0, 7.0),
    "llama": (lambda: hf.LlamaConfig(**zoo.GROUPED, **SIZES), 1.0, None),
}


def family(name):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(FAMILIES[name][0]()).eval()


def ids(rows=2, length=7):
    return {"input_ids": torch.randint(3, 67, (rows, length), generator=torch.Generator().manual_seed(0))}


def adapted(model, where):
    extra = dict(target_modules=["q_proj", "lm_head"]) if where == "lora" else dict(modules_to_save=["lm_head"])
    model = peft.get_peft_model(
        model, peft.LoraConfig(**({"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"]} | extra))
    )
    if where == "saved":
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["plain", "lora", "saved"])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_way_to_hold_a_head(name, dtype, where, autocast):
    model = family(name).to(dtype)
    model = model if where == "plain" else adapted(model, where)
    head = LanguageHead(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        head.verify(model, ids())
    assert (head.scale, head.softcap) == FAMILIES[name][1:]


def test_a_scale_that_no_configuration_names_is_measured():
    model = family("llama")
    forward = model.forward

    def scaled(**inputs):
        output = forward(**inputs)
        output.logits = 20 * torch.tanh(output.logits * 0.7 / 20)
        return output

    model.forward = scaled
    head = LanguageHead(model)
    head.verify(model, ids())
    assert abs(head.scale - 0.7) <= 1e-15 and head.softcap == 20


def test_a_refusal_names_the_family_and_what_was_measured():
    model = family("granite")
    forward = model.forward

    def clamped(**inputs):
        output = forward(**inputs)
        output.logits = output.logits.clamp(-50, 50)
        return output

    model.forward = clamped
    message = r"GraniteForCausalLM \(granite\).*logit 1 becomes 0.166667, the largest 50, the least -50.*Give the loss"
    head = LanguageHead(model)
    with pytest.raises(ValueError, match=message):
        head.verify(model, ids())
    assert not head.verified and (head.scale, head.softcap) == (1.0, None)


@pytest.mark.parametrize("keep", [None, slice(0, 60)])
def test_logits_that_are_not_those_of_the_head_are_refused(keep):
    model = family("llama")
    forward = model.forward

    def cut(**inputs):
        output = forward(**inputs)
        output.logits = None if keep is None else output.logits[..., keep]
        return output

    model.forward = cut
    with pytest.raises(ValueError, match="no logits of the 67" if keep is None else r"logits \(1, 1, 60\) of the 67"):
        LanguageHead(model).verify(model, ids())


def test_a_padded_last_token_hides_nothing():
    """Where the hidden state is 0 every head without a bias gives 0: the probe takes another token."""
    model, batch = family("llama"), ids()
    model.model.norm.register_forward_hook(lambda _, __, x: torch.cat([x[:, :-1], 0 * x[:, -1:]], 1))
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * own(hidden)
    with pytest.raises(ValueError, match="does not compute hidden @ weight.T"):
        LanguageHead(model).verify(model, batch)


def test_an_offloaded_head_is_refused():
    model, batch = family("llama"), ids()
    head = LanguageHead(model)
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(weight.to("meta"))
    head.verified = True
    with pytest.raises(ValueError, match="head of LlamaForCausalLM is offloaded or not loaded"):
        head.source(torch.randn(3, zoo.WIDTH))
    assert batch["input_ids"].shape == (2, 7)


def test_the_only_head_inside_a_model_that_names_none_is_taken():
    class Outer(torch.nn.Module):
        def __init__(self, *models):
            super().__init__()
            self.models, self.config = torch.nn.ModuleList(models), models[0].config

        def get_output_embeddings(self):
            return None

        def forward(self, **inputs):
            return self.models[0](**inputs)

    model = Outer(family("granite"))
    head = LanguageHead(model)
    head.verify(model, ids())
    assert head.module is model.models[0].lm_head and head.scale == 1 / 6
    with pytest.raises(ValueError, match="Outer has no language-model head"):
        LanguageHead(Outer(family("granite"), family("llama")))


@pytest.mark.slow
def test_weights_over_several_processes(tmp_path):
    """Tensor parallelism and FSDP, whose weights are DTensors: the probe, the loss, and every gradient."""
    torch.manual_seed(0)
    for tied in (False, True):
        config = hf.GraniteConfig(**zoo.GROUPED, **SIZES, logits_scaling=6.0, tie_word_embeddings=tied)
        hf.GraniteForCausalLM(config).save_pretrained(tmp_path / f"tied-{tied}")
    two_processes(
        tmp_path,
        """
import transformers as hf
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from hkdfast import distill_loss
from hkdfast.hf import LanguageHead, hidden_states, loss_in_head

torch.distributed.init_process_group("gloo")
batch = {"input_ids": torch.randint(3, 67, (2, 7), generator=torch.Generator().manual_seed(0))}
rows = torch.ones(2, 7, dtype=torch.bool)
target = torch.randn(14, 67, generator=torch.Generator().manual_seed(1))

def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x

def loaded(tied, **how):
    return hf.GraniteForCausalLM.from_pretrained(f"{FOLDER}/tied-{tied}", **how)

def eager(model):
    loss = distill_loss(model(**batch).logits.flatten(0, 1), target)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}

def check(model, tied):
    value, truth = eager(loaded(tied))
    head = LanguageHead(model)
    assert isinstance(model.lm_head.weight, DTensor)
    loss, _ = loss_in_head(model, model, head, batch, rows, lambda h: (distill_loss(head.source(h), target), {}))
    loss.backward()
    assert head.scale == 1 / 6 and abs(loss.item() - value) <= 1e-6 * value, (loss.item(), value)
    for name, p in model.named_parameters():
        assert (whole(p.grad) - truth[name]).abs().max() <= 1e-5 * truth[name].abs().max(), name

for tied in (False, True):
    check(loaded(tied, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")), tied)
    model = loaded(tied)
    check(fully_shard(model), tied)
model = loaded(False)
fully_shard(model.lm_head)
check(fully_shard(model), False)

# a teacher whose head is sharded by itself, read outside its forward
head = LanguageHead(model)
hidden = hidden_states(model, head, batch, rows)
try:
    model.lm_head.reshard()
    head.source(hidden)
    raise AssertionError("a gradient outside the forward")
except ValueError as error:
    assert "sharded here" in str(error), error
with torch.no_grad():
    assert torch.equal(head.source(hidden).weight, loaded(False).lm_head.weight)
""",
    )

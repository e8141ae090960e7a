"""hkdfast.hf.head: the hidden states, the loss in the head's place, and what is refused."""

import copy

import pytest
import torch
import zoo
from zoo import one_thread  # noqa: F401

from hkdfast import distill_loss
from hkdfast.batch import answer_rows
from hkdfast.hf import LanguageHead, hidden_states, loss_in_head


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_a_separate_teacher(model, teacher, batch, known=False):
    """The fused loss and gradients of a loop of one's own. known: the heads are verified before, outside autocast."""
    head, teacher_head = LanguageHead(model), LanguageHead(teacher)
    if known:
        with torch.autocast("cpu", enabled=False):
            head.verify(model, batch)
            teacher_head.verify(teacher, batch)
    rows, labels = answer_rows(batch)
    with torch.no_grad():
        target = teacher_head.source(hidden_states(teacher, teacher_head, batch, rows))

    def loss(hidden):
        return distill_loss(head.source(hidden), target, "forward_kl", labels=labels, return_metrics=True)

    value, metrics = loss_in_head(model, model, head, batch, rows, loss)
    return value.item(), gradients(model, value), metrics


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_loop_with_a_separate_teacher_is_that_of_the_logits(name):
    model, teacher, batch = zoo.build(name), zoo.build(name, seed=1), zoo.batch(name, answers=2)
    value, found, metrics = of_a_separate_teacher(model, teacher, batch)
    rows, labels = answer_rows(batch)
    inputs = {key: x for key, x in batch.items() if key != "labels"}
    with torch.no_grad():
        log_p = teacher(**inputs).logits[rows].log_softmax(-1)
    log_q = model(**inputs).logits[rows].log_softmax(-1)
    truth = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert abs(value - truth.item()) <= 1e-5 * truth.item() and truth > 0.01
    assert metrics["divergence"].shape == labels.shape
    for key, exact in gradients(model, truth).items():
        # a key's bias moves all scores of a row alike: its gradient is zero but for rounding
        assert (found[key] - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-6, key


def test_a_head_that_is_not_verified_makes_no_source():
    model, batch = zoo.build("paligemma_softcap"), zoo.batch("paligemma_softcap")
    head, hidden = LanguageHead(model), torch.randn(3, zoo.WIDTH)
    with pytest.raises(ValueError, match=r"PaliGemma\w+ is not verified: call head.verify"):
        head.source(hidden)
    rows = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    hidden_states(model, head, batch, rows)
    assert head.source(hidden).softcap == 5


@pytest.mark.parametrize("times", [0, 2])
def test_a_head_that_does_not_run_once_is_refused(times):
    model, batch = zoo.build("llava"), zoo.batch()
    own = model.lm_head

    class Several(torch.nn.Module):
        weight = own.weight

        def forward(self, hidden):
            return own.weight.new_zeros(*hidden.shape[:-1], 61) + sum(own(hidden) for _ in range(times))

    model.lm_head = Several()
    model.get_output_embeddings = lambda: own
    head = LanguageHead(model)
    with pytest.raises(ValueError, match=f"LlavaForConditionalGeneration runs its head {times} times"):
        head.verify(model, batch)
    head.verified = True
    rows = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if times == 0:
        with pytest.raises(ValueError, match="runs its head 0 times"):
            hidden_states(model, head, batch, rows)


def test_the_first_call_under_autocast_leaves_every_gradient():
    """Autocast keeps its casts of weights: those of a run without gradient must not serve the one that learns."""
    model, teacher, batch = zoo.build("llava"), zoo.build("llava", seed=1), zoo.batch(answers=2)
    with torch.autocast("cpu", torch.bfloat16):
        _, exact, _ = of_a_separate_teacher(copy.deepcopy(model), teacher, batch, known=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, found, _ = of_a_separate_teacher(model, teacher, batch)
    assert found.keys() == exact.keys() and all(torch.equal(found[key], exact[key]) for key in exact)

"""TRL's trainers on tiny models made offline, and what a run of one leaves: to compare runs of two trainers."""

import copy
import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers as hf
import zoo
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.trainer_callback import PrinterCallback

from hkdfast.batch import answer_rows
from hkdfast.hf.head import model_inputs

RATE, STEPS = 1e-3, 3
CHECKPOINTING = next(  # its name in new and old versions of transformers
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(hf.TrainingArguments, name)
)
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}{% generation %}yes{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
PROMPTS = ("is there a cat", "a dog in the image ?", "is the cow", "yes no one word is there a") * 3


def language_model(seed, width=32, vocab=61, kind=hf.LlamaConfig, **others):
    """A model whose distribution is not flat."""
    torch.manual_seed(seed)
    layers = zoo.GROUPED | dict(hidden_size=width, max_position_embeddings=128) | others
    model = hf.AutoModelForCausalLM.from_config(
        kind(**layers, vocab_size=vocab, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def llava_next_granite(seed):
    """A model whose text configuration names a scale of the logits that the model around it does not apply."""
    torch.manual_seed(seed)
    text = hf.GraniteConfig(**zoo.GROUPED, vocab_size=61, logits_scaling=8.0, pad_token_id=0, bos_token_id=1)
    config = hf.LlavaNextConfig(
        vision_config=zoo.clip(),
        text_config=text,
        image_token_index=zoo.IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[zoo.SIZE, zoo.SIZE]],
    )
    model = hf.LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def llava_next_step(size=2, completion=4):
    """The inputs of a step of DistillationTrainer: prompts with an image, padded on the left, and completions."""
    side = zoo.SIZE // zoo.PATCH
    image = torch.full((size, zoo.PATCHES + side * (side + 1)), zoo.IMAGE)  # the whole, then its tile with line ends
    words = torch.randint(8, 61, (size, 3 + completion), generator=torch.Generator().manual_seed(3))
    prompt = torch.cat([torch.zeros(size, 1, dtype=torch.long), image, words[:, :3]], 1)
    mask = torch.ones(size, completion, dtype=torch.long)
    mask[0, -1] = 0
    return {
        "prompt_ids": prompt,
        "prompt_mask": (prompt != 0).long(),
        "completion_ids": words[:, 3:],
        "completion_mask": mask,
        "num_items_in_batch": mask.sum(),
        "pixel_values": torch.randn(size, 2, 3, zoo.SIZE, zoo.SIZE, generator=torch.Generator().manual_seed(4)),
        "image_sizes": torch.full((size, 2), zoo.SIZE),
    }


def tokenizer():
    made = zoo.tokenizer()
    made.chat_template = CHAT
    return made


def letters():
    """A tokenizer of single bytes, such as GOLD wants."""
    alphabet = "abcdefghijklmnopqrstuvwxyz:?Ġ"
    made = Tokenizer(models.BPE({word: i for i, word in enumerate((*zoo.SPECIAL, *alphabet))}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left")
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT, **special)


def options(folder, **others):
    """Of the config of a trainer: three steps of two batches of two, in float32."""
    return (
        dict(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_epsilon=1e-3,  # at the usual 1e-8 Adam makes whole steps of gradients that are rounding errors
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            **{CHECKPOINTING: False},
            disable_tqdm=True,
        )
        | others
    )


class Eager(hf.Trainer):
    """transformers.Trainer with a teacher: forward KL and cross entropy from the logits of both models."""

    loss_is_scaled_for_ga = True
    hard_weight = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        rows, labels = answer_rows(inputs)
        outputs = model(**model_inputs(inputs))
        with torch.no_grad():
            p = self.teacher(**model_inputs(inputs)).logits[rows].log_softmax(-1)
        q = outputs.logits[rows].log_softmax(-1)
        loss = (p.exp() * (p - q)).sum(-1) - self.hard_weight * q.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        loss = loss.sum() / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def distillation(folder, student=None, teacher=None, kind=None, dataset=None, processor=None, peft=None, **others):
    """trl.DistillationTrainer, or one of its kind."""
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(**options(folder, max_completion_length=5, **others))
    return (kind or DistillationTrainer)(
        student or language_model(0),
        teacher or language_model(1, 48),
        args,
        train_dataset=dataset or Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=processor or tokenizer(),
        peft_config=peft,
    )


def chats():
    return Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes the cat " * (1 + i % 3)}]
                for i, prompt in enumerate(PROMPTS)
            ]
        }
    )


def gkd(folder, student=None, teacher=None, kind=None, **others):
    """trl.experimental's GKDTrainer, on the answers of the data unless lmbda says otherwise."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(**options(folder, **dict(lmbda=0.0, max_length=32, max_new_tokens=4) | others))
    return (kind or GKDTrainer)(
        student or language_model(0),
        teacher_model=teacher or language_model(1, 48),
        args=args,
        train_dataset=chats(),
        eval_dataset=chats(),
        processing_class=tokenizer(),
    )


def gold(folder, student=None, teacher=None, kind=None, **others):
    """trl.experimental's GOLDTrainer, without its loss between tokenizers."""
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    args = GOLDConfig(**options(folder, **dict(lmbda=0.0, max_length=96, max_completion_length=4) | others))
    return (kind or GOLDTrainer)(
        student or language_model(0),
        teacher_model=teacher or language_model(1, 48),
        args=args,
        train_dataset=chats(),
        processing_class=letters(),
    )


def saved(folder, model):
    """A model and a tokenizer that know where they come from, as the self-distillation trainers want."""
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return (auto.from_pretrained(folder / "model") for auto in (hf.AutoModelForCausalLM, hf.AutoTokenizer))


def self_distillation(folder, model=None, peft_config=None, **others):
    """What SDFTTrainer and SDPOTrainer take alike."""
    model, words = saved(folder, model or language_model(0))
    extra = {"num_generations": 2, "distillation_mode": "full_logits", "max_completion_length": 5}
    context = ["the cow", "yes", "no dog in the image"] * 4
    data = Dataset.from_dict({"prompt": list(PROMPTS), "privileged_context": context})
    given = dict(train_dataset=data, processing_class=words, peft_config=peft_config)
    return model, options(folder, **extra | others), given


def sdft(folder, model=None, peft_config=None, **others):
    """trl.experimental's SDFTTrainer."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    model, args, given = self_distillation(folder, model, peft_config, **others)
    return SDFTTrainer(model, args=SDFTConfig(**args), **given)


def sdpo(folder, model=None, peft_config=None, **others):
    """trl.experimental's SDPOTrainer; about half of the completions are good."""
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    model, args, given = self_distillation(folder, model, peft_config, **others)

    def reward(completions, **_):
        return [float(len(text) % 2) for text in completions]

    return SDPOTrainer(model, reward, args=SDPOConfig(**args), **given)


def trained(trainer):
    """({name: value of each step} of what is logged, parameters) after training."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    parameters = {name: copy.deepcopy(x.detach()) for name, x in trainer.model.named_parameters()}
    return log, parameters


def assert_same(ours, theirs, names=("loss",)):
    """Losses within 1e-6, parameters within 1e-4 of what a run can change."""
    (log, parameters), (expected, truth) = ours, theirs
    assert len(log) == len(expected) == STEPS
    for mine, other in zip(log, expected, strict=True):
        for name in names:
            assert abs(mine[name] - other[name]) <= 1e-6 * abs(other[name]), (name, mine[name], other[name])
        assert abs(mine["grad_norm"] - other["grad_norm"]) <= 1e-5 * other["grad_norm"]
    assert parameters.keys() == truth.keys()
    for name, x in parameters.items():
        assert (x - truth[name]).abs().max() <= 1e-4 * expected[0]["learning_rate"] * STEPS, name

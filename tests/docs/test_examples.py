"""examples/: each runs from end to end, and learns."""

import ast
import math
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(request, monkeypatch):
    """The module of the example that the test names."""
    monkeypatch.setattr("sys.path", [*sys.path, str(EXAMPLES)])  # what an example adds goes again
    path = EXAMPLES / f"{request.param}.py"
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", ["loss_in_a_loop"], indirect=True)
def test_a_loop_learns(example):
    losses = example.main(steps=30)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("example", ["trainer_compute_loss"], indirect=True)
def test_a_trainer_learns(example):
    losses = example.main(steps=20)
    assert len(losses) == 2 and losses[1] < losses[0]


@pytest.mark.parametrize("example", ["trainer_compute_loss"], indirect=True)
def test_a_trainer_for_one_device_refuses_several(example, tmp_path):
    args = example.TrainingArguments(str(tmp_path), use_cpu=True)
    args.__dict__["_n_gpu"] = 2  # Trainer would wrap the model in DataParallel
    with pytest.raises(ValueError, match="one device"):
        example.DistillTrainer(example.tiny(16, 1), args, teacher=example.tiny(16, 1))


@pytest.mark.parametrize("example", ["text_teacher_student"], indirect=True)
def test_a_student_gives_the_answers_of_its_teacher(example, tmp_path):
    losses, right = example.main(["--output", str(tmp_path / "student")])
    assert losses[-1] < 0.1 * losses[0] and right == 1
    # what it saved is an ordinary folder, from which it runs again
    names = [word for role in ("--teacher", "--student") for word in (role, str(tmp_path / "student"))]
    again, right = example.main([*names, "--steps", "1"])
    assert again[0] < 0.1 * losses[0] and right == 1


@pytest.mark.parametrize("example", ["distill_trainer"], indirect=True)
def test_a_trainer_distills(example):
    found = example.main([])
    assert len(found) == 3 and found[-1] < 0.3 * found[0]


def falls(losses):
    """Whether a mean over the last quarter is below half of one over the first."""
    quarter = max(1, len(losses) // 4)
    return sum(losses[-quarter:]) < 0.5 * sum(losses[:quarter])


@pytest.mark.parametrize("example", ["trl_gkd"], indirect=True)
def test_gkd_of_trl_learns(example, tmp_path):
    losses = example.main(str(tmp_path))
    assert len(losses) == 20 and falls(losses)


@pytest.mark.parametrize("example", ["trl_distillation"], indirect=True)
def test_the_distillation_trainer_of_trl_learns(example, tmp_path):
    losses = example.main(str(tmp_path))
    assert len(losses) == 20 and falls(losses)


@pytest.mark.parametrize("example", ["trainer_with_teacher"], indirect=True)
def test_a_trainer_with_a_teacher_learns(example, tmp_path):
    losses = example.main(str(tmp_path))
    assert len(losses) == 20 and falls(losses)


@pytest.mark.parametrize("example", ["tiny_models"], indirect=True)
def test_tiny_models_read_what_their_tokenizer_writes(example):
    words = example.tokenizer()
    ids = words("is there a cat ? no", return_tensors="pt").input_ids
    assert words.unk_token_id not in ids
    assert example.language_model(32)(ids).logits.shape == (1, 6, 32)


@pytest.mark.parametrize("name", ["trl_distillation", "trl_gkd", "trainer_with_teacher"])
def test_one_line_needs_few_others(name):
    """Fewer than 15 lines from the first statement of main to its last."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert main.end_lineno - main.lineno + 1 + len(imports) < 15


@pytest.mark.parametrize("example", ["seed_on_a_folder"], indirect=True)
def test_seed_trains_on_a_folder(example):
    log = [entry for entry in example.main([]) if "divergence" in entry]
    assert len(log) == 4 and all(math.isfinite(entry["loss"]) for entry in log)
    assert all(0 <= entry["yes_rate"] <= 1 for entry in log)


@pytest.mark.parametrize("example", ["seed_on_a_folder"], indirect=True)
def test_wrong_questions_are_named_before_a_model_is_loaded(example, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "image": "none.png", "text": "Is there a cat?"}\n')
    with pytest.raises(FileNotFoundError, match="none.png"):
        example.seed("no-model", tmp_path, tmp_path / "questions.jsonl", tmp_path / "out")
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "text": "Is there a cat?"}\n')
    with pytest.raises(ValueError, match="questions.jsonl:1.*image"):
        example.seed("no-model", tmp_path, tmp_path / "questions.jsonl", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("example", ["split_vocabulary"], indirect=True)
def test_a_vocabulary_is_split_over_processes(example):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example.__file__]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes: loss" in done.stdout


def test_every_example_has_a_test():
    text = Path(__file__).read_text()
    assert all(f'["{path.stem}"]' in text for path in EXAMPLES.glob("*.py"))


def test_no_example_edits_the_path_of_modules():
    assert not any("sys.path" in path.read_text() for path in EXAMPLES.glob("*.py"))

"""--attn-implementation of the commands: every model gets it, and a wrong one is named."""

import pytest
import test_rounds
from test_rounds import home  # noqa: F401
from zoo import one_thread  # noqa: F401

from hkdfast import cli


@pytest.fixture
def chosen(monkeypatch):
    """The attention of each model after it was set."""
    from hkdfast.hf import family

    found, plain = [], family.set_attention

    def recorded(model, name):
        plain(model, name)
        found.append(getattr(model, "get_base_model", lambda: model)().config._attn_implementation)

    for module in ("seed", "generate"):
        monkeypatch.setattr(f"hkdfast.hf.{module}.set_attention", recorded)
    return found


def evaluate(home, folder, *options):  # noqa: F811
    paths = ["--model", home / "model", "--images", home / "images", "--questions", home / "questions.jsonl"]
    words = ["evaluate", "pope", *paths, "--output", folder / "scores.json", "--device", "cpu", *options]
    return cli.main([*map(str, words)])


def seed(home, output, *options):  # noqa: F811
    return test_rounds.seed(home, output, *test_rounds.FEW, *options)


@pytest.mark.parametrize("run", [evaluate, seed])
def test_the_model_gets_it(home, tmp_path, chosen, capfd, run):  # noqa: F811
    assert run(home, tmp_path / "out", "--attn-implementation", "eager") == 0, capfd.readouterr().err
    assert chosen[-1] == "eager"
    for name, message in (("fastest", "attn_implementation 'fastest'"), ("flash_attention_2", "FlashAttention2")):
        assert run(home, tmp_path / name, "--attn-implementation", name) == 2
        shown = capfd.readouterr().err
        assert message in shown and "Loading weights" not in shown  # no bar in a file

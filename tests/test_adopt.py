"""Recipes without a model take it, and its tokenizer, from what init names."""

import pytest
import runs

from ptm import config, registry
from ptm.adopt import adopt
from ptm.cli import main
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.objectives import causal


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run, and the text that it was trained on."""
    folder = tmp_path_factory.mktemp("adopt")
    text = runs.corpus(folder / "text.txt")
    runs.run(runs.tiny("concat", text=text, train__steps=2, log__every=1), folder / "run")
    return folder / "run", text


def recipe(text, **keys):
    cfg = config.base(objective=causal.Config(), evals={"validation": loss.Config()}, **keys)
    cfg.data.source, cfg.data.length = (f"text:{text}",), 16
    cfg.train.update(steps=2, batch_size=8)
    return cfg


def test_model_and_tokenizer_of_a_checkpoint(made):
    workdir, text = made
    cfg = recipe(text, init=f"ckpt:{workdir}")
    adopt(cfg)
    resolved, theirs = registry.resolve(cfg), registry.resolve(runs.tiny("concat", text=text))
    assert resolved.model == theirs.model
    assert resolved.tokenizer.kind == theirs.tokenizer.kind and resolved.tokenizer.path == str(workdir / "tokenizer")
    assert resolved.init == f"ckpt:{workdir}"


def test_fresh_parameters_of_the_same_shape(made):
    workdir, text = made
    cfg = recipe(text, init=f"scratch:ckpt:{workdir}")
    adopt(cfg)
    assert (cfg.init, cfg.model.name, cfg.model.width) == ("scratch", "gpt", 16)


def test_a_run_that_has_begun_keeps_its_model(made, tmp_path):
    workdir, text = made
    cfg = recipe(text, init=f"ckpt:{workdir}")
    adopt(cfg)
    cfg.model.dropout = 0.25
    runs.run(cfg, tmp_path / "tuned")
    again = recipe(text, init="ckpt:/no/longer/there")
    adopt(again, workdir=tmp_path / "tuned")
    assert again.model.dropout == 0.25 and again.tokenizer.path == str(workdir / "tokenizer")


def test_a_model_of_its_own_stays(made):
    workdir, text = made
    cfg = runs.tiny("mlm", text=text)
    cfg.init = f"ckpt:{workdir}"
    adopt(cfg)
    assert cfg.model.name == "bert"


def test_without_a_model_the_error_says_what_to_set(made):
    cfg = recipe(made[1])
    adopt(cfg)
    with pytest.raises(ConfigError, match="takes its model from init: set --config.init=ckpt:DIR"):
        registry.resolve(cfg)


def test_on_the_command_line(made, tmp_path, capsys):
    workdir, text = made
    (tmp_path / "recipe.py").write_text(
        "from ptm import config\nfrom ptm.objectives import causal\n\n\ndef get_config(argument=''):\n    return config.base(objective=causal.Config())\n"
    )
    arguments = ["train", f"--config={tmp_path}/recipe.py", f"--config.data.source=text:{text}", "--config.data.length=16", "--print_config"]
    assert main(arguments) == 2
    assert "takes its model from init" in capsys.readouterr().err
    assert main([*arguments, f"--config.init=scratch:ckpt:{workdir}", "--config.model.dropout=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "model.dropout: 0.1 -> 0.5" in shown and "  init = scratch " in shown
    assert main([*arguments, f"--config.init=ckpt:{tmp_path}/nothing"]) == 2
    assert "there is no folder" in capsys.readouterr().err

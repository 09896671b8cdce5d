"""The command line: `ptm train|evaluate|convert`. Parses flags and overrides, calls the entry point, turns errors into exit codes.

Every import below the top is inside a function: usage errors are told at once, and a wrong config before anything heavy is loaded.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ptm import fields
from ptm.fields import ConfigError

FAILED, USAGE, INTERRUPTED = 1, 2, 75


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.replace('ignored explicit argument', 'takes no value, got')}. `{self.prog} --help` says what is allowed.")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of everything, and that of each command."""
    parser = _Parser(prog="ptm", description="Pretrain, fine-tune, evaluate and compare Transformers.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser(
        "train", allow_abbrev=False, help="run or continue a run", description="Run, or continue, the run of a config in a workdir.",
        usage="ptm train --config=FILE.py[:WORDS] --workdir=DIR [--config.SECTION.KEY=VALUE ...] [FLAGS]",
        epilog="Exit codes: 0 finished; 75 interrupted, the same command continues; 2 wrong usage or config; other: failed.",
    )  # fmt: skip
    train.add_argument("--config", metavar="FILE.py[:WORDS]", help="recipe and its argument, such as configs/quickstart.py:bert,tiny")
    train.add_argument("--workdir", metavar="DIR", help="folder of the run: checkpoints, metrics, config; an existing one is continued")
    train.add_argument("--print_config", action="store_true", help="show the resolved config and its difference from base, and stop")
    train.add_argument("--show_batch", type=int, metavar="N", help="show N decoded rows of the first batch, and stop")
    train.add_argument("--allow_change", default="", metavar="KEY,...", help="config keys that may differ from the run that is continued")
    evaluate = commands.add_parser(
        "evaluate", allow_abbrev=False, help="evaluate a checkpoint", description="Evaluate a checkpoint; the last line of output is one JSON object."
    )
    evaluate.add_argument("--workdir", metavar="DIR", help="folder of a run; its newest valid checkpoint is evaluated")
    evaluate.add_argument("--model", metavar="SPEC", help="ckpt:DIR[@STEP|@best|@ema|@avgN]")
    convert = commands.add_parser(
        "convert", allow_abbrev=False, help="convert from and to the reference library",
        description="Make a workdir of a Hugging Face directory, or such a directory of a checkpoint. Only safetensors files are read.",
        usage="ptm convert --from=hf:DIR|hub:ORG/NAME --to=ckpt:DIR [--tokenizer=DIR] [--check]\n"
        "       ptm convert --from=ckpt:DIR[@STEP|@best|@ema|@avgN] --to=hf:DIR [--dtype=TYPE] [--check]",
        epilog="Exit codes: 0 converted; 1 --check found differences; 2 wrong usage, or what cannot be converted exactly.",
    )  # fmt: skip
    convert.add_argument("--from", metavar="SPEC", help="what is read: hf:DIR, hub:ORG/NAME[@REVISION], ckpt:DIR[@STEP|@best|@ema|@avgN]")
    convert.add_argument("--to", metavar="SPEC", help="what is written: ckpt:DIR or hf:DIR, which must not be there yet")
    convert.add_argument("--dtype", default="float32", metavar="TYPE", help="type of the tensors of a directory: float32, bfloat16 or float16")
    convert.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer, if the directory that is read has none")
    convert.add_argument("--check", action="store_true", help="run both implementations and compare logits and hidden states (needs torch, transformers)")
    return parser, commands.choices


def _guess(word: str, known: list[str]) -> str:
    """' Did you mean ...?' for an argument that no command knows, or an empty string."""
    name, equals, value = word.partition("=")
    flag = "--" + name.lstrip("-")
    if hint := fields.nearest(flag, known):
        return hint.replace("'?", f"{equals}{value}'?")
    if equals and "--config" in known:
        from ptm import config as config_lib

        keys = [*config_lib.TOP_LEVEL, *(f"{section}.{key}" for section, cls in config_lib.SECTIONS.items() for key in fields.annotations(cls))]
        meant = [key for key in keys if key.rpartition(".")[2] == name.lstrip("-")] or [name.lstrip("-")]
        return f" Did you mean '--config.{meant[0]}={value}'?" if "." in name or meant[0] in keys else ""
    return f" Did you mean '--config={word}'?" if name.partition(":")[0].endswith(".py") and not word.startswith("-") else ""


def _split(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Flags of the command, and the overrides key -> text. Refuses whatever is neither."""
    overrides: dict[str, str] = {}
    rest = []
    for word in argv:
        if word.startswith("--config."):
            key, equals, value = word.removeprefix("--config.").partition("=")
            if not equals:
                raise ConfigError(f"{word} has no value; write --config.{key}=VALUE.")
            overrides[key] = value
        else:
            rest.append(word)
    parser, commands = _parser()
    if rest and not rest[0].startswith("-"):
        fields.lookup(commands, rest[0], "command")
    flags, unknown = parser.parse_known_args(rest)
    if flags.command is None:
        raise ConfigError(f"give a command: {', '.join(f'`ptm {name}`' for name in commands)}. `ptm --help` says what they do.")
    if unknown:
        known = [f"--{name}" for name in vars(flags) if name != "command"]
        shown = ", ".join([*known, "--config.SECTION.KEY=VALUE"] if flags.command == "train" else known)
        raise ConfigError(f"unknown argument '{unknown[0]}' of `ptm {flags.command}`; allowed: {shown}.{_guess(unknown[0], known)}")
    if overrides and flags.command != "train":
        raise ConfigError(f"--config.KEY=VALUE belongs to `ptm train`, not to `ptm {flags.command}`, which takes the config of the run.")
    return flags, overrides


def _show(text: str) -> None:
    """Prints a long text; a reader that has seen enough, such as `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _config_text(resolved: Any, declared: dict[str, tuple[Any, dict]]) -> str:
    """Every key with its value as the command line takes it, what it means and may be; what differs from base is marked and listed."""
    from ptm import config as config_lib

    lines, changes = [], config_lib.diff(config_lib.defaults_of(resolved), resolved)
    for key, value in config_lib.flatten(resolved).items():
        line = f"{'*' if key in changes else ' '} {key} = {fields.unparse(value)}"
        if key in declared:
            meta = declared[key][1]
            notes = [meta["unit"], "one of " + ", ".join(map(str, meta["choices"])) if meta["choices"] else ""]
            line = f"{line:<48}# {meta['doc']}{''.join(f' [{note}]' for note in notes if note)}"
        lines.append(line)
    lines += ["", "Difference from base (marked * above):" if changes else "No difference from base."]
    return "\n".join(lines + [f"  {key}: {fields.unparse(old)} -> {fields.unparse(new)}" for key, (old, new) in changes.items()])


def _train(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    from ptm import config as config_lib
    from ptm import recipe, registry

    if not flags.config:
        raise ConfigError("`ptm train` needs --config=FILE.py[:WORDS], a recipe such as configs/quickstart.py.")
    if flags.show_batch is not None and flags.show_batch < 1:
        raise ConfigError(f"--show_batch={flags.show_batch}; allowed: 1 or more rows.")
    config = recipe.load(flags.config)
    for key, value in overrides.items():
        config_lib.override(config, key, value, registry.REGISTRIES)
    resolved = registry.resolve(config)
    allow_change, known = tuple(filter(None, flags.allow_change.split(","))), config_lib.flatten(resolved)
    for key in allow_change:
        if key not in known:
            raise ConfigError(f"--allow_change={key}: the config has no such key.{config_lib.nearest_key(key, known)} `--print_config` lists all keys.")
    if flags.print_config:
        _show(_config_text(resolved, config_lib.schema(config, registry.REGISTRIES)))
        return 0
    if flags.show_batch is not None:
        from ptm import run, samples

        _show(samples.show_batch(run.setup(resolved), flags.show_batch))
        return 0
    if not flags.workdir:
        raise ConfigError("`ptm train` needs --workdir=DIR, the folder that the run is written to.")
    from ptm import train

    return train.train(resolved, workdir=flags.workdir, allow_change=allow_change)


def _evaluate(flags: argparse.Namespace) -> int:
    if bool(flags.workdir) == bool(flags.model):
        given = f"got both, --workdir={flags.workdir} and --model={flags.model}" if flags.model else "got neither"
        raise ConfigError(f"`ptm evaluate` needs one of --workdir=DIR and --model=ckpt:DIR[@STEP|@best|@ema|@avgN]; {given}.")
    from ptm import evaluate

    print(json.dumps(evaluate.evaluate(flags.model or f"ckpt:{flags.workdir}")))
    return 0


def _convert(flags: argparse.Namespace) -> int:
    source, target = vars(flags)["from"], flags.to
    if not source or not target:
        raise ConfigError("`ptm convert` needs --from=SPEC and --to=SPEC, such as --from=hf:DIR --to=ckpt:DIR.")
    from ptm import convert

    same = convert.convert(source, target, dtype=flags.dtype, tokenizer=flags.tokenizer, compare=flags.check)
    return 0 if same else FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 finished, 75 interrupted and resumable, 2 wrong usage or config, 1 failed."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        flags, overrides = _split(sys.argv[1:] if argv is None else argv)
        if flags.command == "train":
            return _train(flags, overrides)
        return {"evaluate": _evaluate, "convert": _convert}[flags.command](flags)
    except ConfigError as error:
        print(f"ptm: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("ptm: interrupted before anything was changed. Start the same command again.", file=sys.stderr)
        return INTERRUPTED
    except FloatingPointError as error:
        print(f"ptm: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())

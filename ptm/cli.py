"""The command line: `ptm train|evaluate`. Parses flags and overrides, calls the entry point, turns errors into exit codes."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from ptm import fields
from ptm.fields import ConfigError

USAGE = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}. `{self.prog} --help` lists what is allowed.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ptm", description="Pretrain, fine-tune, evaluate and compare Transformers.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    train = commands.add_parser("train", allow_abbrev=False, help="run or continue a run", description="Run, or continue, the run of a config in a workdir.")
    train.add_argument("--config", required=True, metavar="FILE.py[:WORDS]", help="recipe and its argument; override keys with --config.SECTION.KEY=VALUE")
    train.add_argument("--workdir", metavar="DIR", help="folder of the run: checkpoints, metrics, config; an existing one is continued")
    train.add_argument("--print_config", action="store_true", help="show the resolved config and its difference from base, and stop")
    train.add_argument("--show_batch", type=int, metavar="N", help="show N decoded rows of the first batch, and stop")
    train.add_argument("--allow_change", default="", metavar="KEY,...", help="optimizer and schedule keys that may differ from the run that is continued")
    evaluate = commands.add_parser("evaluate", allow_abbrev=False, help="evaluate a checkpoint", description="Evaluate a checkpoint; the last line of output is one JSON object.")
    evaluate.add_argument("--workdir", metavar="DIR", help="folder of a run; its newest valid checkpoint is evaluated")
    evaluate.add_argument("--model", metavar="SPEC", help="ckpt:DIR[@STEP|@best|@ema]")
    return parser


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
    flags, unknown = _parser().parse_known_args(rest)
    if unknown:
        word = unknown[0]
        known = [f"--{name}" for name in vars(flags) if name != "command"] + ["--config."]
        hint = fields.nearest(word.partition("=")[0], known)
        if not word.startswith("-"):
            hint = f" Did you mean '--{word}'?"
        raise ConfigError(f"unknown argument '{word}' of `ptm {flags.command}`; allowed: {', '.join(known)}KEY=VALUE.{hint}")
    if overrides and flags.command != "train":
        raise ConfigError(f"--config.KEY=VALUE belongs to `ptm train`, not to `ptm {flags.command}`.")
    return flags, overrides


def _print_config(config, resolved) -> None:
    from ptm import config as config_lib
    from ptm import registry

    schema = config_lib.schema(config, registry.REGISTRIES)
    base = config_lib.resolve(config_lib.defaults_of(config, registry.REGISTRIES), registry.REGISTRIES)
    changes = config_lib.diff(base, resolved)
    for key, value in config_lib.flatten(resolved).items():
        meta = schema[key][1] if key in schema else {"doc": "", "unit": ""}
        mark = "*" if key in changes else " "
        print(f"{mark} {key} = {value!r}    # {meta['doc']}" if meta["doc"] else f"{mark} {key} = {value!r}")
    print("\nDifference from base (marked * above):")
    for key, (old, new) in changes.items():
        print(f"  {key}: {old!r} -> {new!r}")


def _train(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    from ptm import config as config_lib
    from ptm import registry

    config = config_lib.load_recipe(flags.config)
    for key, value in overrides.items():
        config_lib.override(config, key, value, registry.REGISTRIES)
    resolved = registry.resolve(config)
    if flags.print_config:
        _print_config(config, resolved)
        return 0
    if flags.show_batch is not None:
        from ptm import run, samples

        print(samples.show_batch(run.setup(resolved), flags.show_batch))
        return 0
    if not flags.workdir:
        raise ConfigError("`ptm train` needs --workdir=DIR, the folder that the run is written to.")
    from ptm import train

    return train.train(resolved, workdir=flags.workdir, allow_change=tuple(filter(None, flags.allow_change.split(","))))


def _evaluate(flags: argparse.Namespace) -> int:
    if bool(flags.workdir) == bool(flags.model):
        raise ConfigError("`ptm evaluate` needs one of --workdir=DIR and --model=ckpt:DIR[@STEP|@best|@ema].")
    from ptm import evaluate

    print(json.dumps(evaluate.evaluate(flags.model or f"ckpt:{flags.workdir}")))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 finished, 75 interrupted and resumable, 2 wrong usage or config."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        flags, overrides = _split(sys.argv[1:] if argv is None else argv)
        return _train(flags, overrides) if flags.command == "train" else _evaluate(flags)
    except ConfigError as error:
        print(f"ptm: {error}", file=sys.stderr)
        return USAGE
    except FloatingPointError as error:
        print(f"ptm: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

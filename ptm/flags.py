"""The flags of all commands: their parsers, and what the words of a command line are.

The one import below the top is for a hint alone: usage errors are told at once.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ptm import __version__, fields, processes
from ptm.analysis import options as analysis_options
from ptm.fields import ConfigError
from ptm.plan import options as plan_options
from ptm.predict import options as predict_options
from ptm.prepare import options as prepare_options
from ptm.report import options as report_options

CONFIGURED = ("train", "plan", "study")  # commands that take a config and its overrides


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.replace('ignored explicit argument', 'takes no value, got')}. `{self.prog} --help` says what is allowed.")


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of everything, and that of each command."""
    parser = _Parser(prog="ptm", description="Pretrain, fine-tune, evaluate and compare Transformers.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ptm {__version__}")
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
    train.add_argument(
        "--seeds", type=int, metavar="N", help="N runs, under the config's seed and those after it, in DIR/seedN, and a summary of their metrics"
    )
    train.add_argument("--allow_change", default="", metavar="KEY,...", help="config keys that may differ from the run that is continued")
    evaluate = commands.add_parser(
        "evaluate", allow_abbrev=False, help="evaluate a checkpoint", description="Evaluate a checkpoint; the last line of output is one JSON object."
    )
    evaluate.add_argument("--workdir", metavar="DIR", help="folder of a run; its newest valid checkpoint is evaluated")
    evaluate.add_argument("--model", metavar="SPEC", help="ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR or hub:ORG/NAME[@REVISION]")
    evaluate.add_argument(
        "--evals", default="", metavar="NAME,...", help="evals of the run, or kinds of evals with their defaults; --config.evals.NAME.KEY=VALUE sets keys"
    )
    evaluate.add_argument("--predictions", metavar="FILE", help="where one eval's predictions go, instead of into the workdir")
    study = commands.add_parser(
        "study", allow_abbrev=False, help="run what a study file declares", description="Run, or continue, the runs of a study: arms that differ in declared ways, under several seeds.",
        usage="ptm study FILE.py[:WORDS] --workdir=DIR [--dry_run] [--config.STAGE.SECTION.KEY=VALUE ...] [FLAGS]",
        epilog="Exit codes: 0 all runs finished; 75 interrupted, the same command continues; 1 some failed; 2 wrong usage or study.",
    )  # fmt: skip
    study.add_argument("words", nargs="?", metavar="FILE.py[:WORDS]", help="study file and its argument, such as experiments/quickstart.py")
    study.add_argument("--workdir", metavar="DIR", help="folder of the study, a workdir for each run below it; an existing one is continued")
    study.add_argument("--dry_run", action="store_true", help="check everything, show arms, runs, tokens and time, and stop")
    study.add_argument("--run", metavar="ARM/seedK/STAGE", help="one run alone, as launchers start it; without it all that are left, one after the other")
    study.add_argument("--same_code", action="store_true", help="refuse runs of different versions of the code, instead of a warning")
    study.add_argument("--retries", type=int, default=1, metavar="N", help="how often a run that failed is tried again")
    for command in (train, evaluate, study):
        together = command.add_argument_group(
            "several processes", "One run on the devices of several hosts: the same command on each. SLURM, Open MPI, Kubernetes and TPU pods are detected."
        )
        for name, (metavar, doc) in processes.flags().items():
            together.add_argument(f"--{name}", metavar=metavar, help=doc)
    predict = commands.add_parser(
        "predict", allow_abbrev=False, help="ask a model, line by line",
        description="Answer JSON lines with JSON lines, in their order, as they arrive. A line that cannot be answered becomes {\"line\": N, \"error\": ...}.",
        usage=f"ptm predict --model=SPEC --task={'|'.join(predict_options.TASKS)} [--input=FILE|FORMAT:PATH] [--output=FILE] [FLAGS]",
        epilog='Lines: {"text": ...} for generate (or {"messages": [{"role", "content"}, ...]}), fill-mask, embed and score (or {"context", "continuation"}); for the '
        "others the fields, or columns, of the run's data.columns, of which what is asked for may be missing. An \"id\" is handed on.",
    )  # fmt: skip
    predict.add_argument("--model", metavar="SPEC", help="ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR or hub:ORG/NAME[@REVISION]")
    predict.add_argument("--task", metavar="NAME", help=", ".join(predict_options.TASKS))
    predict.add_argument(
        "--input", default="-", metavar="FILE|FORMAT:PATH", help="file of JSON lines, - is stdin; or records as in data.source, such as tsv:test.tsv"
    )
    predict.add_argument(
        "--columns", default="", metavar="FIELD=COLUMN,...", help="of FORMAT:PATH, where fields are other columns than in the run's data.columns"
    )
    predict.add_argument("--output", default="-", metavar="FILE", help="file that is written, all of it or nothing; - is stdout")
    predict.add_argument("--batch_size", type=int, default=16, metavar="N", help="rows of a batch")
    for name, (switch, doc) in predict_options.flags().items():
        predict.add_argument(f"--{name}", metavar="VALUE", help=doc.replace("%", "%%"), **({"nargs": "?", "const": "true"} if switch else {}))
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
    analyze = commands.add_parser(
        "analyze", allow_abbrev=False, help="look into a model: attention, probes, bias",
        description="Analyse a model: where its heads look, what its layers know, which sentences it prefers. The last line of output is one JSON object.",
        usage="ptm analyze --model=SPEC --what=attention --text=TEXT|--input=FILE --output=DIR [FLAGS]\n"
        "       ptm analyze --model=SPEC --what=probe --input=FORMAT:PATH --output=DIR [--columns=text=COLUMN,label=COLUMN] [FLAGS]\n"
        "       ptm analyze --model=SPEC --what=bias --suite=NAME --input=PATH --output=DIR [FLAGS]",
    )  # fmt: skip
    analyze.add_argument("--model", metavar="SPEC", help="ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR or hub:ORG/NAME[@REVISION]")
    for name, (annotation, doc) in analysis_options.flags().items():
        analyze.add_argument(f"--{name}", metavar=annotation, help=doc.replace("%", "%%"))
    submission = commands.add_parser(
        "submission", allow_abbrev=False, help="score a benchmark, write what is handed in",
        description="The table of a benchmark over the runs of its tasks, with the published average, and the files of the test sets that these runs answered.",
        usage="ptm submission --benchmark=glue|superglue|clue --runs=DIR,... [--output=DIR]",
        epilog="Runs are those of configs/finetune/BENCHMARK.py; with the word `test` they answer test sets. The last line of output is one JSON object.",
    )  # fmt: skip
    submission.add_argument("--benchmark", metavar="NAME", help="glue, superglue or clue")
    submission.add_argument("--runs", metavar="DIR,...", help="workdirs, or patterns such as 'runs/glue/*'; of several with a task the best counts")
    submission.add_argument("--output", metavar="DIR", help="folder for the files of the test sets and an archive of them")
    plan = commands.add_parser(
        "plan", allow_abbrev=False, help="what a run needs on devices that are not there",
        description="Compile the training step of a config for a topology, without its hardware: memory, FLOPs, collectives. The last line of output is one JSON object.",
        usage="ptm plan --config=FILE.py[:WORDS] --topology=NAME [--search] [--config.SECTION.KEY=VALUE ...] [FLAGS]",
        epilog="Figures are marked [compiled] by the devices' own compiler, [formula] or [computed], [guessed]: bounds under the assumptions that are named.",
    )  # fmt: skip
    plan.add_argument("--config", metavar="FILE.py[:WORDS]", help="recipe and its argument, as for `ptm train`")
    for name, (switch, doc) in plan_options.flags().items():
        plan.add_argument(f"--{name}", metavar="VALUE", help=doc.replace("%", "%%"), **({"nargs": "?", "const": "true"} if switch else {}))
    report = commands.add_parser(
        "report", allow_abbrev=False, help="what runs and studies say, as a page and as tables",
        description="Report on a run, on several beside each other, or on a study; or tell two runs apart. Reads their folders alone.",
        usage="ptm report WORKDIR... | STUDY_DIR [--output=DIR] [--formats=NAME,...]\n       ptm report --compare WORKDIR WORKDIR [--output=DIR] [--formats=NAME,...]",
    )  # fmt: skip
    report.add_argument("words", nargs="*", metavar="WORKDIR|STUDY_DIR", help="workdirs, folders of `ptm train --seeds`, or the folder of one study")
    for name, (switch, doc) in report_options.flags().items():
        report.add_argument(f"--{name}", metavar=None if switch else "VALUE", help=doc, **({"action": "store_const", "const": "true"} if switch else {}))
    prepare = commands.add_parser(
        "prepare", allow_abbrev=False, help="make a data set of raw text",
        description="Read, normalise, filter and deduplicate text into a versioned data set. The last line of output is one JSON object.",
        usage="ptm prepare --source=FORMAT:PATH,... --output=DIR [--name=NAME] [--version=X.Y.Z] [--dry_run=N] [FLAGS] [-- FLAGS OF APACHE BEAM]",
        epilog="Exit codes: 0 finished; 75 interrupted, the same command continues; 2 wrong usage or options; other: failed.",
    )  # fmt: skip
    for name, (switch, doc) in prepare_options.flags().items():
        prepare.add_argument(f"--{name}", metavar="VALUE", help=doc.replace("%", "%%"), **({"nargs": "?", "const": "true"} if switch else {}))
    return parser, commands.choices


def _guess(word: str, known: list[str]) -> str:
    """' Did you mean ...?' for an argument that no command knows, or an empty string."""
    name, equals, value = word.partition("=")
    flag, keys = "--" + name.lstrip("-"), []
    if equals and "--config" in known:
        from ptm import config as config_lib

        keys = [*config_lib.TOP_LEVEL, *(f"{section}.{key}" for section, cls in config_lib.SECTIONS.items() for key in fields.annotations(cls))]
    meant = [key for key in keys if key.rpartition(".")[2] == name.lstrip("-")]
    if not meant and (hint := fields.nearest(flag, known)):
        return hint.replace("'?", f"{equals}{value}'?")
    if keys:
        return f" Did you mean '--config.{[*meant, name.lstrip('-')][0]}={value}'?" if "." in name or meant else ""
    return f" Did you mean '--config={word}'?" if name.partition(":")[0].endswith(".py") and not word.startswith("-") else ""


def split(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Flags of the command, and the overrides key -> text. Refuses whatever is neither."""
    overrides: dict[str, str] = {}
    rest: list[str] = []
    runner = None
    if argv and argv[0] == "prepare" and "--" in argv:
        argv, runner = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    for word in argv:
        if word.startswith("--config."):
            key, equals, value = word.removeprefix("--config.").partition("=")
            if not equals:
                raise ConfigError(f"{word} has no value; write --config.{key}=VALUE.")
            overrides[key] = value
        else:
            rest.append(word)
    parser, commands = parsers()
    if rest and not rest[0].startswith("-"):
        fields.lookup(commands, rest[0], "command")
    flags, unknown = parser.parse_known_args(rest)
    if flags.command is None:
        raise ConfigError(f"give a command: {', '.join(f'`ptm {name}`' for name in commands)}. `ptm --help` says what they do.")
    if unknown:
        known = [f"--{name}" for name in vars(flags) if name not in ("command", "words")]
        shown = ", ".join([*known, f"--config.{'STAGE.' if flags.command == 'study' else ''}SECTION.KEY=VALUE"] if flags.command in CONFIGURED else known)
        raise ConfigError(f"unknown argument '{unknown[0]}' of `ptm {flags.command}`; allowed: {shown}.{_guess(unknown[0], known)}")
    misplaced = [key for key in overrides if flags.command not in CONFIGURED and not (flags.command == "evaluate" and key.startswith("evals."))]
    if misplaced:
        but = "but for --config.evals.NAME.KEY " if flags.command == "evaluate" else ""
        raise ConfigError(f"--config.{misplaced[0]}=VALUE belongs to `ptm train`, not to `ptm {flags.command}`, which {but}takes the config of the run.")
    flags.runner = runner
    return flags, overrides

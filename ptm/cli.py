"""The command line: `ptm train|study|evaluate|predict|convert|analyze|submission|plan|report|prepare`. Parses flags and overrides, calls the entry point, turns errors into exit codes.

Every import below the top is inside a function: usage errors are told at once, and a wrong config before anything heavy is loaded.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import IO, Any, NoReturn

from ptm import __version__, allocator, fields, processes, untrusted
from ptm.analysis import options as analysis_options
from ptm.fields import ConfigError, StorageError
from ptm.plan import options as plan_options
from ptm.predict import options as predict_options
from ptm.prepare import options as prepare_options
from ptm.report import options as report_options

FAILED, USAGE, INTERRUPTED = 1, 2, 75
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)  # faults of storage, not of the program
HOSTED = ("train", "evaluate")  # what several processes do together, and one run of a study


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.replace('ignored explicit argument', 'takes no value, got')}. `{self.prog} --help` says what is allowed.")


class _Printable(logging.Formatter):
    """Messages may quote what a file holds: a terminal must not take it for a command."""

    def format(self, record: logging.LogRecord) -> str:
        return untrusted.printable(super().format(record))


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
    train.add_argument("--seeds", type=int, metavar="N", help="N runs, under the config's seed and those after it, in DIR/seedN, and a summary of their metrics")
    train.add_argument("--allow_change", default="", metavar="KEY,...", help="config keys that may differ from the run that is continued")
    evaluate = commands.add_parser(
        "evaluate", allow_abbrev=False, help="evaluate a checkpoint", description="Evaluate a checkpoint; the last line of output is one JSON object."
    )
    evaluate.add_argument("--workdir", metavar="DIR", help="folder of a run; its newest valid checkpoint is evaluated")
    evaluate.add_argument("--model", metavar="SPEC", help="ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR or hub:ORG/NAME[@REVISION]")
    evaluate.add_argument("--evals", default="", metavar="NAME,...", help="evals of the run, or kinds of evals with their defaults; --config.evals.NAME.KEY=VALUE sets keys")
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
        together = command.add_argument_group("several processes", "One run on the devices of several hosts: the same command on each. SLURM, Open MPI, Kubernetes and TPU pods are detected.")
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
    predict.add_argument("--input", default="-", metavar="FILE|FORMAT:PATH", help="file of JSON lines, - is stdin; or records as in data.source, such as tsv:test.tsv")
    predict.add_argument("--columns", default="", metavar="FIELD=COLUMN,...", help="of FORMAT:PATH, where fields are other columns than in the run's data.columns")
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


CONFIGURED = ("train", "plan", "study")  # commands that take a config and its overrides


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


def _split(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
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
            line = f"{line:<47} # {meta['doc']}{''.join(f' [{note}]' for note in notes if note)}"
        lines.append(line)
    lines += ["", "Difference from base (marked * above):" if changes else "No difference from base."]
    return "\n".join(lines + [f"  {key}: {fields.unparse(old)} -> {fields.unparse(new)}" for key, (old, new) in changes.items()])


def _config(flags: argparse.Namespace, overrides: dict[str, str]) -> Any:
    """The resolved config of a recipe under overrides."""
    from ptm import config as config_lib
    from ptm import recipe, registry

    if not flags.config:
        raise ConfigError(f"`ptm {flags.command}` needs --config=FILE.py[:WORDS], a recipe such as configs/quickstart.py.")
    config, overrides = recipe.load(flags.config), dict(overrides)
    if config.model.name == config_lib.ModelOfInit.name:
        from ptm import adopt

        if "init" in overrides:
            config_lib.override(config, "init", overrides.pop("init"), registry.REGISTRIES)
        adopt.adopt(config, workdir=vars(flags)["workdir"] if "workdir" in vars(flags) else None)
    for key, value in overrides.items():
        config_lib.override(config, key, value, registry.REGISTRIES)
    return registry.resolve(config)


def _train(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    from ptm import config as config_lib
    from ptm import registry

    if flags.show_batch is not None and flags.show_batch < 1:
        raise ConfigError(f"--show_batch={flags.show_batch}; allowed: 1 or more rows.")
    resolved = _config(flags, overrides)
    allow_change, known = tuple(filter(None, flags.allow_change.split(","))), config_lib.flatten(resolved)
    for key in allow_change:
        if key not in known:
            raise ConfigError(f"--allow_change={key}: the config has no such key.{config_lib.nearest_key(key, known)} `--print_config` lists all keys.")
    if flags.print_config:
        _show(_config_text(resolved, config_lib.schema(config_lib.ConfigDict(config_lib.to_dict(resolved)), registry.REGISTRIES)))
        return 0
    if flags.show_batch is not None:
        from ptm import run, samples

        _show(samples.show_batch(run.setup(resolved), flags.show_batch))
        return 0
    if not flags.workdir:
        raise ConfigError("`ptm train` needs --workdir=DIR, the folder that the run is written to.")
    if flags.seeds is not None:
        from ptm import seeds

        return seeds.run(resolved, count=flags.seeds, workdir=flags.workdir, allow_change=allow_change)
    from ptm import train

    return train.train(resolved, workdir=flags.workdir, allow_change=allow_change)


def _study(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    if not flags.words:
        raise ConfigError("`ptm study` needs FILE.py[:WORDS], a study such as experiments/quickstart.py.")
    if not flags.workdir:
        raise ConfigError("`ptm study` needs --workdir=DIR, the folder that the runs are written to.")
    if flags.run and flags.dry_run:
        raise ConfigError("--dry_run shows a whole study; leave --run out.")
    if not flags.run and (given := [name for name in processes.flags() if vars(flags)[name] is not None]):
        raise ConfigError(f"--{given[0]} is of one run on several hosts; give --run=ARM/seedK/STAGE too.")
    from ptm.study import runner

    given = {"workdir": flags.workdir, "overrides": overrides, "same_code": flags.same_code}
    if flags.run:
        return runner.run_one(flags.words, name=flags.run, **given)
    if flags.dry_run:
        return runner.plan(flags.words, **given)
    code = runner.run(flags.words, retries=flags.retries, **given)
    if code != INTERRUPTED:
        _write_report(report_options.Options(words=(flags.workdir,)))
    return code


def _evaluate(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    if bool(flags.workdir) == bool(flags.model):
        given = f"got both, --workdir={flags.workdir} and --model={flags.model}" if flags.model else "got neither"
        raise ConfigError(f"`ptm evaluate` needs one of --workdir=DIR and --model=ckpt:DIR[@STEP|@best|@ema|@avgN]; {given}.")
    from ptm import evaluate

    names = tuple(filter(None, flags.evals.split(",")))
    print(json.dumps(evaluate.evaluate(flags.model or f"ckpt:{flags.workdir}", names=names, overrides=overrides, predictions=flags.predictions)))
    return 0


def _predict(flags: argparse.Namespace) -> int:
    if not flags.model or not flags.task:
        raise ConfigError(f"`ptm predict` needs --model=SPEC and --task=NAME, one of {', '.join(predict_options.TASKS)}.")
    given = {name: vars(flags)[name] for name in predict_options.flags() if vars(flags)[name] is not None}
    options = predict_options.parse(flags.task, given)
    from ptm.predict import tasks

    named = ":" in flags.input and not os.path.exists(flags.input)  # FORMAT:PATH
    columns = fields.parse(flags.columns, tuple[str, ...], "--columns")
    if columns and not named:
        raise ConfigError(f"--columns={flags.columns} is for --input=FORMAT:PATH, such as --input=jsonl:FILE; leave it out.")
    with contextlib.ExitStack() as stack:
        source = flags.input if named else sys.stdin.buffer if flags.input == "-" else stack.enter_context(_opened(flags.input, "rb"))
        sink = sys.stdout.buffer if flags.output == "-" else stack.enter_context(_whole(flags.output))
        try:
            count, failed = tasks.predict(flags.model, task=flags.task, source=source, sink=sink, options=options, batch_size=flags.batch_size, columns=columns)
        except BrokenPipeError:
            if flags.output != "-":
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader, such as `head`, has seen enough
            return 0
    print(f"ptm: {count} lines answered{f', {failed} of them with an error' if failed else ''}.", file=sys.stderr)
    return 0


def _opened(path: str, mode: str) -> IO[bytes]:
    try:
        return open(path, mode)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be {'read' if 'r' in mode else 'written'} ({error.strerror}).") from None


@contextlib.contextmanager
def _whole(path: str) -> Iterator[IO[bytes]]:
    """A file that gets its name once all of it is written: whatever goes wrong, one that was there stays. What is no plain file, such as a pipe, is written at once."""
    if os.path.exists(path) and not os.path.isfile(path):
        with _opened(path, "wb") as file:
            yield file
        return
    partial = f"{path}.partial"
    try:
        with _opened(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def _convert(flags: argparse.Namespace) -> int:
    source, target = vars(flags)["from"], flags.to
    if not source or not target:
        raise ConfigError("`ptm convert` needs --from=SPEC and --to=SPEC, such as --from=hf:DIR --to=ckpt:DIR.")
    from ptm import convert

    same = convert.convert(source, target, dtype=flags.dtype, tokenizer=flags.tokenizer, compare=flags.check)
    return 0 if same else FAILED


def _analyze(flags: argparse.Namespace) -> int:
    if not flags.model:
        raise ConfigError("`ptm analyze` needs --model=SPEC, such as ckpt:DIR or hf:DIR.")
    options = analysis_options.parse({name: text for name, text in vars(flags).items() if name not in ("command", "model") and text is not None})
    from ptm import analyze

    print(json.dumps(analyze.analyze(flags.model, options), allow_nan=False))
    return 0


def _submission(flags: argparse.Namespace) -> int:
    if not flags.benchmark or not flags.runs:
        raise ConfigError("`ptm submission` needs --benchmark=NAME and --runs=DIR,..., such as --benchmark=glue --runs='runs/glue/*'.")
    from ptm import submission

    print(json.dumps(submission.submit(benchmark=flags.benchmark, runs=flags.runs, output=flags.output)))
    return 0


def _plan(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    if not flags.topology:
        raise ConfigError(f"`ptm plan` needs --topology=NAME: {plan_options.FORMS}.")
    options = plan_options.parse({name: vars(flags)[name] for name in plan_options.flags() if vars(flags)[name] is not None})
    resolved = _config(flags, overrides)
    from ptm.plan import command

    if options.search:
        page, facts = command.search(resolved, options, [f"--config={flags.config}", *(f"--config.{key}={value}" for key, value in overrides.items())])
    else:
        page, facts = command.plan(resolved, options)
    _show(page)
    print(json.dumps(facts))
    return 0


def _prepare(flags: argparse.Namespace) -> int:
    options, running = prepare_options.parse({name: vars(flags)[name] for name in prepare_options.flags() if vars(flags)[name] is not None})
    from ptm.prepare import command

    code, page, facts = command.prepare(options, running, flags.runner)
    if not code:
        _show(page)
        print(json.dumps(facts))
    return code


def _report(flags: argparse.Namespace) -> int:
    _write_report(report_options.parse(flags.words, {name: vars(flags)[name] for name in report_options.flags() if vars(flags)[name] is not None}))
    return 0


def _write_report(options: report_options.Options) -> None:
    from ptm.report import command

    page, files = command.report(options)
    _show("\n".join([*filter(None, [page]), *(f"written to {path}" for path in files)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 finished, 75 interrupted and resumable, 2 wrong usage or config, 1 failed."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        flags, overrides = _split(sys.argv[1:] if argv is None else argv)
        if argv is None and allocator.on_cpu():  # with arguments this is a call within another program, whose memory is its own affair
            allocator.keep_pages()
        if flags.command not in HOSTED and not (flags.command == "study" and flags.run):
            processes.require_alone(flags.command)
            if flags.command in ("plan", "study"):
                return {"plan": _plan, "study": _study}[flags.command](flags, overrides)
            return {"predict": _predict, "convert": _convert, "analyze": _analyze, "submission": _submission, "report": _report, "prepare": _prepare}[flags.command](flags)
        with _together(flags):
            return {"train": _train, "evaluate": _evaluate, "study": _study}[flags.command](flags, overrides)
    except (ConfigError, KeyboardInterrupt, FloatingPointError, StorageError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in STORAGE:
            raise
        message, code = _told(error)
        print(message, file=sys.stderr)
        return code


def _together(flags: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """What makes one run of the processes that were started for it; a process that nothing says to be one of several does not wait for JAX here."""
    place = processes.place(vars(flags))
    if not processes.announced(place):
        return contextlib.nullcontext()
    from ptm import hosts

    return hosts.joined(place, told=_told)


def _told(error: BaseException) -> tuple[str, int]:
    """What to say of an exception, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "ptm: interrupted before anything was changed. Start the same command again.", INTERRUPTED
    if isinstance(error, ConfigError | FloatingPointError | StorageError):
        return f"ptm: {untrusted.printable(str(error))}", USAGE if isinstance(error, ConfigError) else FAILED
    if isinstance(error, OSError) and error.errno in STORAGE:
        where = f": {error.filename}" if error.filename else ""
        return f"ptm: {error.strerror}{where}. What was saved is as it was; mend that, and start the same command again.", FAILED
    return "".join(traceback.format_exception(error)).rstrip(), FAILED


if __name__ == "__main__":
    sys.exit(main())

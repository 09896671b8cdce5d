"""The command line: `ptm train|study|evaluate|predict|convert|analyze|submission|plan|report|prepare`. Calls the entry point, turns errors into exit codes.

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
from typing import IO, Any

from ptm import allocator, fields, processes, untrusted
from ptm import flags as flags_lib
from ptm.analysis import options as analysis_options
from ptm.fields import ConfigError, StorageError
from ptm.plan import options as plan_options
from ptm.predict import options as predict_options
from ptm.prepare import options as prepare_options
from ptm.report import options as report_options

FAILED, USAGE, INTERRUPTED = 1, 2, 75
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)  # faults of storage, not of the program
HOSTED = ("train", "evaluate")  # what several processes do together, and one run of a study


class _Printable(logging.Formatter):
    """Messages may quote what a file holds: a terminal must not take it for a command."""

    def format(self, record: logging.LogRecord) -> str:
        return untrusted.printable(super().format(record))


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
        flags, overrides = flags_lib.split(sys.argv[1:] if argv is None else argv)
        if argv is None and allocator.on_cpu():  # with arguments this is a call within another program, whose memory is its own affair
            allocator.keep_pages()
        if flags.command not in HOSTED and not (flags.command == "study" and flags.run):
            processes.require_alone(flags.command)
            if flags.command in ("plan", "study"):
                return {"plan": _plan, "study": _study}[flags.command](flags, overrides)
            return {"predict": _predict, "convert": _convert, "analyze": _analyze, "submission": _submission, "report": _report, "prepare": _prepare}[
                flags.command
            ](flags)
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

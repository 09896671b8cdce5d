"""The command line that all launchers share: `python -m launch.NAME STUDY.py[:WORDS]|--config=FILE.py[:WORDS] --workdir=DIR [FLAGS]`."""

import argparse
import configparser
import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from launch.job import FINISHED, INTERRUPTED, USAGE, Job, Resources, Task
from ptm import fields
from ptm.fields import ConfigError, field

SITE = Path(__file__).parent / "site.ini"
SECTIONS = ("local", "slurm", "kubernetes", "tpu_pod")
THIS = shlex.join([sys.executable, "-m", "ptm.cli"])
DONE = ("finished", "stopped")  # states of a study's run that nothing is left to do for
TEXTS = {
    "config": ("FILE.py[:WORDS]", "recipe of one run, in place of a study"),
    "workdir": ("DIR", "folder of the study or run, as the tasks see it"),
    "site": ("FILE", "file of defaults"),
    "seeds": ("N", "of one run: so many seeds, one after the other"),
    "allow_change": ("KEY,...", "of one run: keys that may differ from the one that is continued"),
}
ACTIONS = {"status": "show what became of the tasks, and stop", "cancel": "end what was started and is not finished, and stop"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Resources):
    """What can be said to every launcher; each adds its own."""

    ptm: str = field(THIS, doc="How `ptm` is started there: a word, or several as a shell reads them.")

    def check(self, where: str) -> None:
        try:
            if shlex.split(self.ptm):
                return
        except ValueError:
            pass
        raise ConfigError(f"--ptm={self.ptm} is no command; give such as --ptm=ptm or --ptm='/opt/venv/bin/python -m ptm.cli'.")


class Launcher(NamedTuple):
    """A launcher as the command line sees it. `shared`: tasks see the files of this machine, so that these are looked at before anything is started."""

    name: str
    options: type[Options]
    start: Callable[[Job, Any], int]
    show: Callable[[Job, Any], str]
    shared: bool = True
    actions: Mapping[str, Callable[[Job, Any, bool], int]] = {}  # --status, --cancel: of the job and its options, and whether only to say what would be done


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.replace('ignored explicit argument', 'takes no value, got')}. `{self.prog} --help` says what is allowed.")


def main(launcher: Launcher, argv: Sequence[str] | None = None) -> int:
    """Runs a launcher; returns the exit code: 0 all finished or submitted, 75 interrupted (the same command goes on), 2 wrong usage, 1 failed."""
    try:
        flags, overrides, options = _parsed(launcher, sys.argv[1:] if argv is None else argv)
        asked = [name for name in launcher.actions if vars(flags)[name]]
        if len(asked) > 1:
            raise ConfigError(f"--{asked[0]} and --{asked[1]} are two things; give one.")
        job = described(flags, overrides, options, shared=launcher.shared, resolve=not asked)
        if asked:
            return launcher.actions[asked[0]](job, options, flags.dry_run)
        if flags.dry_run:
            print(launcher.show(job, options), flush=True)
            return FINISHED
        return launcher.start(job, options)
    except ConfigError as error:
        print(f"launch.{launcher.name}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _parsed(launcher: Launcher, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str], Options]:
    prog = f"python -m launch.{launcher.name}"
    parser = _Parser(
        prog=prog, allow_abbrev=False, usage=f"{prog} STUDY.py[:WORDS]|--config=FILE.py[:WORDS] --workdir=DIR [--config.KEY=VALUE ...] [FLAGS]",
        description="Start the runs of a study, or one run.", epilog=f"Defaults of the site stand in {SITE.name} beside the launchers, or in --site=FILE.",
    )  # fmt: skip
    parser.add_argument("study", nargs="?", metavar="STUDY.py[:WORDS]", help="study file and its argument")
    for name, (shown, doc) in TEXTS.items():
        parser.add_argument(f"--{name}", metavar=shown, help=doc)
    switches = {"same_code": "of a study: a mix of code versions is an error", "dry_run": "print what would be done, and stop"}
    switches |= {name: doc for name, doc in ACTIONS.items() if name in launcher.actions}
    for name, doc in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=doc)
    for key in dataclasses.fields(launcher.options):
        default = "" if key.default in (None, False, "") else f" [{key.default}]"
        unit = f" ({key.metadata['unit']})" if key.metadata["unit"] else ""
        switch = {"nargs": "?", "const": "true"} if key.default is False else {}
        parser.add_argument(f"--{key.name}", metavar="VALUE", help=(key.metadata["doc"] + unit + default).replace("%", "%%"), **switch)
    overrides: dict[str, str] = {}
    rest = []
    for word in argv:
        name, equals, value = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config."):
            rest.append(word)
        elif not equals:
            raise ConfigError(f"{word} has no value; write {word}=VALUE.")
        else:
            overrides[name] = value
    flags, unknown = parser.parse_known_args(rest)
    if unknown:
        known = [f"--{name}" for name in vars(flags) if name != "study"]
        raise ConfigError(f"unknown argument '{unknown[0]}'; allowed: {', '.join(known)}.{fields.nearest(unknown[0].partition('=')[0], known)}")
    given = site_defaults(Path(flags.site) if flags.site else SITE, launcher)
    given |= {key.name: vars(flags)[key.name] for key in dataclasses.fields(launcher.options) if vars(flags)[key.name] is not None}
    hints = fields.annotations(launcher.options)
    options = launcher.options(**{name: fields.parse(text, hints[name], f"--{name}") for name, text in given.items()})
    fields.check(options, "")
    return flags, overrides, options


def site_defaults(path: Path, launcher: Launcher) -> dict[str, str]:
    """What a file of defaults says for a launcher, as texts. Raises ConfigError for a file, section or key that cannot be."""
    known = sorted(key.name for key in dataclasses.fields(launcher.options))
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except OSError as error:
        raise ConfigError(f"--site={path} cannot be read ({error.strerror}).") from None
    except configparser.Error as error:
        raise ConfigError(f"--site={path}: {' '.join(str(error).split())}") from None
    found: dict[str, str] = {}
    for section in parser.sections():
        if section not in SECTIONS:
            raise ConfigError(f"{path}: unknown section [{section}]; allowed: {', '.join(SECTIONS)}.{fields.nearest(section, SECTIONS)}")
    for key, value in parser.items(launcher.name) if parser.has_section(launcher.name) else ():
        if key not in known:
            raise ConfigError(f"{path}, [{launcher.name}]: unknown key '{key}'; allowed: {', '.join(known)}.{fields.nearest(key, known)}")
        found[key] = value
    return found


def described(flags: argparse.Namespace, overrides: Mapping[str, str], options: Options, *, shared: bool, resolve: bool = True) -> Job:
    """The job that the words of a command line name; without its tasks unless they are to be resolved.

    Raises ConfigError for a study or config that is refused, before anything is started.
    """
    if bool(flags.study) == bool(flags.config):
        given = f"got both, {flags.study} and --config={flags.config}" if flags.study else "got neither"
        raise ConfigError(f"give a study, STUDY.py[:WORDS], or one run, --config=FILE.py[:WORDS]; {given}.")
    if not flags.workdir:
        raise ConfigError("--workdir=DIR is missing, the folder that the runs are written to.")
    for name, of in {"seeds": "--config", "allow_change": "--config", "same_code": "a study"}.items():
        if vars(flags)[name] and bool(flags.study) == (of == "--config"):
            raise ConfigError(f"--{name} goes with {of} alone; leave it out.")
    if not shared and not os.path.isabs(flags.workdir):
        raise ConfigError(f"--workdir={flags.workdir} is a folder as the tasks see it, elsewhere; give its path from the root on.")
    resources = Resources(**{key.name: vars(options)[key.name] for key in dataclasses.fields(Resources)})
    spec, workdir = flags.study or flags.config, Path(os.path.abspath(flags.workdir))
    words = [f"--config.{key}={value}" for key, value in overrides.items()]
    stem = Path(spec.partition(":")[0]).stem
    common: dict[str, Any] = {"workdir": workdir, "folder": Path.cwd(), "resources": resources}
    if not resolve:
        return Job(name=stem, tasks=(), **common)
    if flags.config:
        words += [f"--{name}={vars(flags)[name]}" for name in ("seeds", "allow_change") if vars(flags)[name]]
        command = (*shlex.split(options.ptm), "train", f"--config={spec}", f"--workdir={workdir}", *words)
        if shared:
            _require_config(spec, words)
        return Job(name=stem, tasks=(Task(name=stem, command=command, stage=stem, workdir=workdir),), **common)
    words += ["--same_code"] if flags.same_code else []
    command = (*shlex.split(options.ptm), "study", spec, f"--workdir={workdir}", *words)
    return Job(name=stem, tasks=_study_tasks(spec, command, workdir, overrides, look=shared, write=shared and not flags.dry_run), **common)


def _require_config(spec: str, words: Sequence[str]) -> None:
    """Raises ConfigError for a recipe that does not resolve, with what `ptm train` says of it."""
    given = [word for word in words if word.startswith("--config.")]
    line = [sys.executable, "-m", "ptm.cli", "train", f"--config={spec}", *given, "--print_config"]
    ended = subprocess.run(line, capture_output=True, text=True, check=False)
    if ended.returncode:
        told = ended.stderr.strip().splitlines() or [f"`ptm train --config={spec}` ended with {ended.returncode}."]
        raise ConfigError(told[-1].removeprefix("ptm: "))


def _study_tasks(spec: str, command: tuple[str, ...], workdir: Path, overrides: Mapping[str, str], *, look: bool, write: bool) -> tuple[Task, ...]:
    """A task for each run of a study that is not finished, in the study's order."""
    from ptm import study
    from ptm.study import folder

    record = study.prepare(spec, workdir=workdir, overrides=overrides, write=write)
    if record.halving or record.search:  # which runs there are, and how far they go, depends on the results of others
        return (Task(name=record.name, command=command, stage=record.name, workdir=workdir),)
    begun = folder.read(workdir).runs if look and (workdir / folder.FILE).is_file() else {}
    states = {name: folder.state(workdir, name).name if name in begun else "ready" for name in record.runs}
    if stale := [name for name, state in states.items() if state == "stale"]:
        raise ConfigError(f"{workdir / stale[0]} holds a run of another config than the study's; move it away, or use a new --workdir.")
    left = [name for name, state in states.items() if state not in DONE]
    if not left:
        print(f"All {len(states)} runs of {workdir} are finished.", flush=True)
    return tuple(
        Task(
            name=name, command=(*command, f"--run={name}"), stage=record.runs[name].stage, workdir=workdir / name,
            needs=record.runs[name].needs if record.runs[name].needs in left else None,
        )
        for name in left
    )  # fmt: skip

"""The training loop, from top to bottom: everything with a side effect is a visible `if` in it."""

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ptm import compiles as compiles_lib
from ptm import config as config_lib
from ptm import describe, evals, fields, hosts, interrupts, labels, lock, parallel, registry, saved, specs, teacher, timing, watchdog
from ptm import log as log_lib
from ptm import run as run_lib
from ptm import state as state_lib
from ptm.data import pipeline
from ptm.fields import ConfigError
from ptm.objectives import sources
from ptm.run import Run

FINISHED, INTERRUPTED = 0, hosts.INTERRUPTED
COUNTS = ("tokens", "words", "bytes", "records")  # what evals report besides what they measure
MANY = 16  # metrics of an eval that the progress line shows at once
SHOWN = 8  # records of a skipped step that a message names
FIXED = ("model", "tokenizer", "objective", "data", "lora", "mup", "seed")  # may not change on resume
ASK = ("optimizer", "schedule", "init", "train")  # may change on resume only if the user names the key
AHEAD = ("data.weight_schedule", "data.max_epochs")  # so may these, as long as the run goes by them: streams know what they drew, whatever comes next
# But these may: a run can grow, parts of a batch give the same gradient (dropout aside), and reading ahead or past bad records, or patience, changes no row.
# Nor does the number of logical streams, since the data's state refuses another one: named, it stays as it is under other batch sizes.
FREE = ("train.steps", "train.microbatches", "train.hang_seconds", "train.hang_factor", "train.hang_exit", "data.prefetch", "data.max_bad_records", "data.streams")


def train(
    config: Any, *, workdir: str | os.PathLike, allow_change: tuple[str, ...] = (), devices: list | None = None, until: int | None = None
) -> int:
    """Runs or continues the run of `config` in `workdir`; returns the exit code, 0 finished or 75 interrupted and resumable.

    With `until` it stops after that step, if it has not passed it already, and the code is 0: a later call goes on.
    Raises ConfigError for a config that cannot run or does not fit what the workdir holds, FloatingPointError where the loss or the
    gradient stops being finite.
    """
    started = time.monotonic()
    workdir = Path(workdir)
    config = labels.filled(registry.resolve(config), workdir)
    changes = check_resume(config, workdir, allow_change)
    if config.compute.deterministic:
        run_lib.use_deterministic_kernels()
    if not (workdir / "ckpt").is_dir():  # what is not there is refused before anything is made; a run that goes on needs it no more
        for spec in config_lib.init_specs(config.init):
            if spec != "scratch":
                specs.require(spec)
    teacher.require(config)
    steps, primary = config.train.steps, jax.process_index() == 0
    last = steps if until is None else min(until, steps)  # of this call

    with contextlib.ExitStack() as stack:
        compiles = stack.enter_context(contextlib.closing(compiles_lib.CompileEvents()))
        progress = stack.enter_context(contextlib.closing(log_lib.Progress(steps)))
        asked = stack.enter_context(interrupts.listen(progress.message))
        hosts.make_shared(workdir)
        if primary:
            stack.enter_context(lock.hold(workdir, progress.message))
        run = teacher.attach(run_lib.setup(config, workdir=workdir, devices=devices))
        fingerprints, flat = run.fingerprints(), config_lib.flatten(config)
        hosts.require_equal(config=config_lib.fingerprint(config), jax=jax.__version__, **fingerprints)
        groups = state_lib.group_names(run.abstract_params)
        rows = {phase.batch_size: parallel.local_rows(run.layout, phase.batch_size) for phase in registry.phases(config)}
        checkpoints = stack.enter_context(run_lib.open_checkpoints(run, workdir / "ckpt"))
        loader = stack.enter_context(contextlib.closing(run.loader()))
        owned = _owned(loader.state())
        latest = checkpoints.newest_valid()
        owed: list[str] = []  # evals that the last stop cut short
        if latest is None:
            loader.require(steps)
            params, told = teacher.start(run)
            start, state = 0, run.init_state(params)
            if told:
                progress.message(told)
        else:
            state, streams, meta = checkpoints.restore(latest, run.abstract_state)
            _check_unchanged(run, meta)
            loader.restore(streams)
            start = latest
            owed = hosts.first(lambda: [name for name in saved.owed(workdir / "ckpt", latest) if name in config.evals])
            over = start == steps and not owed
            progress.message(f"{workdir} is finished: step {start} of {steps}." if over else f"Continuing {workdir} from step {start} of {steps}.")
        history = [*describe.history(workdir), describe.session(run, start, changes)]
        progress.message(describe.write(run, history))
        log = stack.enter_context(log_lib.Log(str(workdir), writers=config.log.writers, resume_step=latest, owed=owed, config=flat, primary=primary))
        about = {**fingerprints, "config": config_lib.to_dict(config), "history": history}

        def note_compiles(done: int, during: str) -> None:
            """Writes down what was compiled since the last call; that a program of the run was compiled again is said too."""
            for found in compiles.take():
                log.compiled(done, {"during": during, **found.row()})
                if found.again:
                    progress.message(f"{_compiled_again(found)} Step {done:,}, {during}.")

        def record(done: int, metrics: dict[str, Any], counts: dict[str, Any], drawn: Any, votes: Any) -> None:
            """Looks at the metrics of a finished step: writes a row if one is due or the step was skipped, stops the run on a bad one."""
            skips, norms = int(metrics.pop("skips")), metrics.pop("group_norms")
            asked.look(votes)
            timer.mark(done)
            watched.now("A step")
            if skips or done % config.log.every == 0 or done in (1, steps):
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                values = {name: value for name, value in values.items() if math.isfinite(value) or not sources.OF_SOURCE.search(name)}
                clocks = waits.take()
                counted, names, seconds = zip(*hosts.gather([counts, socket.gethostname(), clocks.get("host_seconds", 0.0)]))
                log.metrics(done, loader.stats(counted) | values | {"skipped": float(skips > 0)})
                speed, (slowest, slow) = _speed(run if len(run.starts) == 1 else run.at(done - 1), timer.step_time), peers.look(names, seconds, timer.step_time)
                log.timing(done, speed | clocks | slowest | compiles.totals() | timing.memory())
                if slow:
                    progress.message(slow)
                progress.update(done, loss=values["loss"], tokens_per_second=speed.get("tokens_per_second"), step_time=timer.step_time)
            if skips:
                records = sorted({record for found in hosts.gather(loader.record_ids(drawn)) for record in found})
                numbers = log_lib.written({name: float(metrics[name]) for name in ("loss", "grad_norm")})
                gradient = _gradient(dict(zip(groups, jax.device_get(norms).tolist())))
                log.skipped(done, {**numbers, "gradient": gradient, "records": records})
                told = f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']}; {gradient}. Records of its batch: {_listed(records)}."
                if config.train.skip_sigma is None or skips >= config.train.max_skips:
                    checkpoints.wait()
                    raise FloatingPointError(_failure(done, told, checkpoints.newest_valid(), skips, config.train))
                progress.message(f"Skipped step {done:,}: {told}")

        def measure(done: int, names: list[str]) -> tuple[dict[str, float], list[str]]:
            """The metrics of evals after a step, and which of them were given up."""
            found: dict[str, float] = {}
            for number, name in enumerate(names):
                watched.now(f"The evaluation {name}")
                try:
                    values = run.evaluate(name, state["params"], predictions=evals.predictions_path(workdir, name, done))
                except interrupts.Interrupted:
                    progress.message(f"The evaluation {name} of step {done} is given up, to be made when the run goes on.")
                    return found, names[number:]
                note_compiles(done, name)
                found |= values
                log.metrics(done, values)
                progress.message(_eval_line(done, name, values))
            return found, []

        if start < steps:
            evals.require(run)  # an empty split, say, is refused now, not at the first evaluation
        note_compiles(start, "start")
        timer, waits, peers = timing.StepTimer(), timing.Waits(), timing.Peers()
        profile = stack.enter_context(_profile(config.log.profile if primary else (), workdir))
        watched = stack.enter_context(watchdog.watch(config.train, workdir / f"hang-{jax.process_index()}.txt", progress.message))
        done = start
        evaluated, _ = measure(done, owed)
        if owed:
            checkpoints.settle(done, evaluated)
            owed = []
        asked.running = True
        pending = None  # metrics of the step before, looked at while the next one runs
        if start < steps:
            progress.message("Compiling the first step.")
            watched.now("The first step")
        for step in range(start, last):
            waits.start()
            made = next(loader)
            waits.batch()
            # This puts the batch on the devices while they are at the step before, since that one's metrics are not looked at until the next is queued.
            now = run.at(step)
            size = now.config.train.batch_size
            batch = run.to_device(made, batch_size=size, rows=rows[size])
            profile(step, pending)
            waits.dispatch(pending[1]["loss"] if pending and step > start + 1 else None)  # the first step is waited for
            if step in run.starts[1:] and step > start:
                watched.now("The first step of a phase")
                progress.message(f"From step {step + 1:,} on batches have {size:,} rows of {now.config.data.length:,} tokens.")
            state, metrics = now.train_step(state, batch)
            note_compiles(step, "train")
            if pending is not None:
                record(*pending)
            done = step + 1
            pending = (done, dict(metrics), loader.counts(), loader.drawn(), hosts.vote(*asked.votes()))
            if step == start:
                jax.block_until_ready(metrics)
                progress.message(_first_step(time.monotonic() - started, compiles.totals()))
            due_evals = [name for name, options in config.evals.items() if done % options.every == 0 or done == steps]
            due_save = done % config.checkpoint.every == 0 or done == last or asked.save
            if due_evals or due_save or asked.stop:
                record(*pending)
                pending = None
                timer.pause()
            results, owed = measure(done, due_evals)
            _check_metric(config, results)
            evaluated |= results
            stopping = asked.stop and pending is None  # a signal after the look above waits for the next step
            if due_save or stopping:
                watched.now("A save")
                log.flush()
                streams = {stream: position for stream, position in loader.state().items() if stream in owned}
                checkpoints.save(done, state, streams=streams, meta=about | {"step": done}, metrics=results, owed=owed)
                asked.saved()
            if pending is None:
                watched.now("A step")
            if stopping:
                if not asked.stopping:
                    progress.message("Another process was asked to stop.")
                break
        watched.now("The last save")
        checkpoints.wait()
        watched.now(None)
        progress.close()
        if done < last or owed:
            progress.message(f"Interrupted at step {done} of {steps}; saved. Start the same command again to continue.")
            return INTERRUPTED
        if done < steps:
            progress.message(f"Stopped at step {done} of {steps}, as asked; saved.")
            return FINISHED
        summary = describe.summary(run, state["params"], evaluated or last_evals(config, workdir), time.monotonic() - started)
        if primary:
            print(summary, flush=True)
    return FINISHED


def check_resume(config: config_lib.Config, workdir: Path, allow_change: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """What changed since the workdir's last start, key -> (old, new). Refuses to continue a workdir under a config that means another run."""
    if not (workdir / "config.json").is_file():
        return {}
    changes = config_lib.diff(run_lib.read_config(workdir), config)
    firm = [key for key in changes if key not in FREE]
    asked = [key for key in firm if key.split(".")[0] in ASK or key in AHEAD and all(changes[key])]
    bad = [key for key in firm if key.split(".")[0] in FIXED and key not in asked]
    ask = [key for key in asked if key not in allow_change]
    if bad or ask:
        lines = [f"  {key}: {changes[key][0]!r} -> {changes[key][1]!r}" + (f"   (allowed with --allow_change={key})" if key in ask else "") for key in bad + ask]
        raise ConfigError(f"{workdir} holds a run with another config; use a new --workdir, or undo these changes:\n" + "\n".join(lines))
    return changes


def _check_unchanged(run: Run, meta: dict[str, Any]) -> None:
    """Refuses to continue a checkpoint on other data, with another tokenizer, or beyond the end of the run."""
    if meta["step"] > run.config.train.steps:
        raise ConfigError(f"{run.workdir} is at step {meta['step']} already, train.steps={run.config.train.steps} is less; a run may grow, not shrink. Use a new --workdir.")
    now = pipeline.fingerprint(run.config.data)
    if meta["data"] != now:
        raise ConfigError(f"the data of {run.workdir} changed since step {meta['step']}: fingerprint {meta['data'][:12]} -> {now[:12]}. Restore the files, or use a new --workdir.")
    if meta["tokenizer"] != run.tokenizer.fingerprint:
        raise ConfigError(f"the tokenizer in {run.workdir / 'tokenizer'} is not the one of step {meta['step']}; restore it, or use a new --workdir.")
    if run.teacher is not None and meta["teacher"] != run.teacher.fingerprint:
        raise ConfigError(
            f"the teacher {run.teacher.spec} changed since step {meta['step']}: fingerprint {meta['teacher'][:12]} -> {run.teacher.fingerprint[:12]}. Restore it, or "
            "use a new --workdir; a teacher that is still trained is named by its step, as ckpt:DIR@STEP."
        )


def _check_metric(config: config_lib.Config, results: dict[str, float]) -> None:
    """Refuses a metric to keep the best checkpoints by that its eval does not give."""
    metric = config.checkpoint.metric
    given = [name for name in results if name.split("/")[0] == metric.split("/")[0]]
    if config.checkpoint.keep_best and given and metric not in given:
        raise ConfigError(f"checkpoint.metric={metric} is not among the metrics of its eval; allowed: {', '.join(given)}.{fields.nearest(metric, given)}")


def _speed(run: Run, step_time: float | None) -> dict[str, float]:
    if step_time is None:
        return {}
    device = run.layout.mesh.devices.flat[0].device_kind
    return timing.throughput(step_time, tokens=run.tokens_per_step(), forward_flops=run.forward_flops(), device_kind=device, devices=run.layout.mesh.size)


def _first_step(seconds: float, compiled: dict[str, float]) -> str:
    return (
        f"First step done {log_lib.duration(seconds)} after the start; {compiled['compiles']:.0f} compilations took "
        f"{log_lib.duration(compiled['compile_seconds'])}, {compiled['cache_hits']:.0f} of them from the cache."
    )


def _compiled_again(found: compiles_lib.Compiled) -> str:
    how = "loaded from the cache" if found.cached else "compiled"
    return f"{found.function} {how} again in {log_lib.duration(found.seconds)}: {found.reason}."


def _eval_line(done: int, name: str, values: dict[str, float]) -> str:
    metrics = {key.removeprefix(name + "/"): value for key, value in values.items() if key.rpartition("/")[2] not in COUNTS}
    if len(metrics) > MANY:
        metrics = {key: value for key, value in metrics.items() if "/" not in key}  # without those of each group; metrics.jsonl has all
    shown = (f"{key.replace('_', ' ')} {value:.4f}" for key, value in metrics.items())
    return f"step {done:,}, {name}: {', '.join(shown)}"


def _gradient(norms: dict[str, float]) -> str:
    """What is wrong with a gradient, by the norms of its parameter groups."""
    offending = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if offending:
        return f"not finite in the gradient of: {', '.join(offending)}"
    largest = max(norms, key=norms.__getitem__)
    return f"all gradients are finite, the largest is that of {largest} ({norms[largest]:.4g})"


def _listed(records: list[str]) -> str:
    more = f" and {len(records) - SHOWN} more, all of them in {log_lib.SKIPPED}" if len(records) > SHOWN else ""
    return f"{', '.join(records[:SHOWN])}{more}"


def _failure(done: int, told: str, good: int | None, skips: int, train: config_lib.Train) -> str:
    if train.skip_sigma is None:
        what, advice = f"stopped at step {done}", ", or skip such steps with --config.train.skip_sigma=6"
    else:
        what, advice = f"{skips} steps in a row were skipped up to step {done}", ", or raise --config.train.skip_sigma or --config.train.max_skips"
    return f"{what}: {told} Last good checkpoint: {'none' if good is None else f'step {good}'}. Lower --config.optimizer.learning_rate{advice}."


def _owned(streams: dict[int, Any]) -> set[int]:
    """Of the logical streams of this process those whose state it saves: processes that share rows read the same ones."""
    before = hosts.gather(sorted(streams))[: jax.process_index()]
    return set(streams).difference(*before)


@contextlib.contextmanager
def _profile(steps: tuple[int, ...], workdir: Path) -> Iterator[Any]:
    """A function (step, what the step before gives) to call before each step; it traces the steps of the window into the workdir."""
    active = False

    def at(step: int, before: Any) -> None:
        nonlocal active
        if steps and not active and step == steps[0]:
            jax.profiler.start_trace(str(workdir / "profile"))
            active = True
        elif active and step == steps[1] + 1:
            jax.block_until_ready(before)
            jax.profiler.stop_trace()
            active = False

    try:
        yield at
    finally:
        if active:
            jax.profiler.stop_trace()


def last_evals(config: config_lib.Config, workdir: Path) -> dict[str, float]:
    """The last value of each eval metric in metrics.jsonl, for a run that was finished before."""
    names = tuple(f"{name}/" for name in config.evals)
    values: dict[str, float] = {}
    for row in log_lib.read(str(workdir / log_lib.METRICS)):
        values |= {key: value for key, value in row.items() if key.startswith(names)}
    return values

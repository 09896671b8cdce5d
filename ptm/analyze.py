"""`ptm analyze`: what a model looks at, what its layers know, which sentences it prefers."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptm import fields, untrusted, weights
from ptm.analysis import bias, maps, page, pictures, probes
from ptm.analysis.inputs import mask_of
from ptm.analysis.likelihood import Scorer
from ptm.analysis.options import Options
from ptm.analysis.probes import Case
from ptm.config import Data
from ptm.data.batch import keyed_rng
from ptm.data.documents import Corpus
from ptm.fields import ConfigError
from ptm.hf import files
from ptm.models import Model
from ptm.run import Run

PAGE_WEIGHTS = 8_000_000  # of all maps of a page, which then has some 25 MB


def analyze(spec: str, options: Options) -> dict[str, Any]:
    """Analyses the model that a spec names and writes the files of the analysis; gives its main figures and the files, ready for JSON.

    Raises ConfigError for options that do not fit, before the model is read, and for files that cannot be read; then nothing is written.
    """
    if options.pictures:
        pictures.require()
    with files.fresh(options.output) as folder:
        run, params = weights.load(spec)
        made = {"attention": _attention, "probe": _probe, "bias": _bias}[options.what](run, params, options, folder, spec)
        written = sorted(path.name for path in folder.iterdir())
    return plain({"model": spec, "what": options.what, **made, "files": [str(Path(options.output) / name) for name in written]})


def plain(value: Any) -> Any:
    """Figures as JSON has them: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _texts(options: Options) -> list[dict[str, str | None]]:
    """The texts to look at, with pair and target."""
    if options.text is not None:
        return [{"text": options.text, "pair": options.pair, "target": options.target}]
    path = Path(options.input).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--input={options.input} cannot be read ({error}); give a text file, one text a line, or a .jsonl file.") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append({"text": line.removesuffix("\r"), "pair": options.pair, "target": options.target})
            continue
        try:
            record = untrusted.json_of(line)
            given = {"pair": options.pair, "target": options.target, **{key: record[key] for key in ("text", "pair", "target") if key in record}}
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}:{number} is no JSON object ({error}).") from None
        if "text" not in given or not all(value is None or isinstance(value, str) for value in given.values()):
            raise ConfigError(f'{path}:{number} needs a field "text", and text in text, pair and target.')
        found.append(given)
    if not found:
        raise ConfigError(f"--input={options.input} holds no text.")
    return found


def _second(record: dict[str, str | None], model: Model) -> str | None:
    """What follows a text: the decoder's text of an encoder-decoder, else its pair."""
    paired = model.config.kind == "encoder_decoder"
    wrong, right = ("pair", "target") if paired else ("target", "pair")
    if record[wrong] is not None:
        raise ConfigError(f"model {model.config.name} ({model.config.kind}) reads no --{wrong}; give --{right}, or leave it out.")
    if paired and not record["target"]:
        raise ConfigError(f"the decoder of {model.config.name} needs a text to read: give --target=TEXT, or a field target.")
    return record[right]


def _attention(run: Run, params: Any, options: Options, folder: Path, spec: str) -> dict[str, Any]:
    looker = maps.Looker(run.model, params, tokenizer=run.tokenizer, trained_mask=run.objective.mask)
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    sizes: dict[str, list[int]] = {}
    shown: list[tuple[str, list[maps.View]]] = []
    room = PAGE_WEIGHTS
    records = _texts(options)
    seconds = [_second(record, run.model) for record in records]
    for record, second in zip(records, seconds):
        views = looker.look(record["text"], second)
        for view in views:
            found.setdefault(view.name, []).append(maps.figures(view))
            sizes.setdefault(view.name, []).append(len(view.queries))
        weights_of_text = sum(view.maps_NHLT.size for view in views)
        if len(shown) < options.shown and weights_of_text <= room:
            room -= weights_of_text
            shown.append((" | ".join(text for text in (record["text"], second) if text), views))
    config = run.model.config
    title = f"Attention of {config.name}"
    count = f"{len(records)} text{'' if len(records) == 1 else 's'}"
    about = f"{spec}: {config.kind.replace('_', '-')}, {count}"
    if len(shown) < min(len(records), options.shown):
        print(f"{len(shown)} of {count} on the page and in pictures: others are too long for it. Figures are of all.")
    if shown:
        (folder / "attention.html").write_text(page.render(shown, title=title, about=about), encoding="utf-8")
    figures = {name: maps.over_texts(own, sizes[name]) for name, own in found.items()}
    _write(folder / "heads.json", {"figures": maps.FIGURES, "texts": len(records), "heads": figures})
    arrays = {f"{n + 1}/{view.name}": view.maps_NHLT for n, (_, views) in enumerate(shown) for view in views}
    np.savez_compressed(folder / "maps.npz", **arrays)
    if options.pictures:
        for n, (text, views) in enumerate(shown):
            for view in views:
                picture = folder / f"maps-{n + 1}-{view.name}.png"
                pictures.head_grid(picture, view.maps_NHLT, queries=view.queries, keys=view.keys, title=f"{view.name}: {text[:100]}")
        for name, values in figures.items():
            pictures.head_figures(folder / f"heads-{name}.png", values, titles=maps.FIGURES, title=f"{title}, {name}, {count}")
    means = {name: {figure: float(np.nanmean(values)) for figure, values in own.items()} for name, own in figures.items()}
    return {"texts": len(records), "shown": len(shown), "means": means}


def _fields(options: Options) -> set[str]:
    """The fields that the columns give."""
    return {entry.partition("=")[0].rpartition(":")[2] for entry in options.columns}


def _cases(run: Run, data: Data, split: str, options: Options, lost: Counter) -> list[Case]:
    """The cases of a split; what cannot be used is counted in `lost`."""
    corpus = Corpus(data, split=split, tokenizer=run.tokenizer)
    words = "words" in _fields(options)
    cases: list[Case] = []
    # Records may be sorted by label: a part of them is drawn at random, the same each time.
    size = corpus.sizes[0]
    for record in range(size) if options.limit is None else keyed_rng(options.seed, "limit", split).permutation(size).tolist():
        if options.limit is not None and len(cases) == options.limit:
            break
        document = corpus.document(0, record)
        if document is None:
            continue
        settings = {"tokenizer": run.tokenizer, "config": run.model.config}
        case = probes.word_case(document, **settings) if words else probes.text_case(document, pool=options.pool, **settings)
        if case is None:
            lost["texts longer than the model reads"] += 1
        else:
            cases.append(case)
    lost["records that cannot be read"] += len(corpus.bad)
    return cases


def _probe(run: Run, params: Any, options: Options, folder: Path, spec: str) -> dict[str, Any]:
    if not any(_fields(options) >= needed for needed in ({"text", "label"}, {"text", "words", "tags"})):
        raise ConfigError(f"--columns={','.join(options.columns)} must map text and label, or text, words and tags, as in --columns=text=sentence,label=label.")
    if options.pool == "cls" and run.model.config.kind == "encoder_decoder":
        raise ConfigError(f"--pool=cls: model {run.model.config.name} has no position that stands for a text; allowed: mean.")
    data = Data(
        source=(options.input,), columns=options.columns, holdout=options.holdout, validation_source=() if options.validation is None else (options.validation,)
    )  # fmt: skip
    fields.check(data, "data")
    lost: Counter = Counter()
    train, test = (_cases(run, data, split, options, lost) for split in ("train", "validation"))
    mask = mask_of(run.model, run.objective.mask)
    result = probes.probe(run.model, params, train, test, mask=mask, l2=options.l2, seed=options.seed)
    result["skipped"] = dict(lost)
    _write(folder / "probe.json", {"model": spec, "input": options.input, "l2": options.l2, **result})
    if options.pictures:
        pictures.layer_curves(folder / "probe.png", result, title=f"Linear probes of {run.model.config.name}: {result['test']} labels")
    print(f"{result['train']} labels to train on, {result['test']} to test; most frequent label {100 * result['majority']:.1f} %")
    for layer, (share, (low, high)) in enumerate(zip(result["accuracy"], result["interval"])):
        control = f"   control {100 * result['control'][layer]:.1f} %, selectivity {100 * result['selectivity'][layer]:+.1f}" if "control" in result else ""
        print(f"  layer {layer:>2}   {100 * share:5.1f} %   [{100 * low:5.1f}, {100 * high:5.1f}]{control}")
    print("Layer 0 is the input. Intervals of 95 % (Wilson) are of this test sample alone. What a probe can read, the model need not use (Belinkov 2022).")
    keys = ("majority", "accuracy", "interval", "train", "test", "unknown_labels", "skipped")
    return {key: result[key] for key in (*keys, *(["control", "selectivity"] if "control" in result else []))}


def _bias(run: Run, params: Any, options: Options, folder: Path, spec: str) -> dict[str, Any]:
    scorer = Scorer(run.model, params, run.tokenizer, run.objective.mask)
    result = bias.run(options.suite, options.input, scorer=scorer, limit=options.limit)
    shown = bias.lines(options.suite, result, scorer)
    print("\n".join(shown))
    caveats = [bias.OF_SUITE[options.suite], *bias.CAVEATS]
    main = {"suite": options.suite, "measure": scorer.measure, "figures": result.figures, "skipped": result.skipped}
    _write(folder / "bias.json", {"model": spec, **main, "caveats": caveats})
    _rows(folder / "examples.jsonl", result.rows)
    if options.pictures:
        groups = {f"{key} {name}": part for key, own in result.figures.items() if "count" not in own for name, part in own.items()}
        bars = {name: part for name, part in {"all": result.figures["all"], **groups}.items() if part["count"]}
        pictures.shares(folder / "bias.png", bars, title=f"{options.suite}, {run.model.config.name}, {scorer.measure}: stereotypical sentence preferred")
    return main

"""Linear probes of every layer: how much of a label can be read off hidden states by a linear map (Alain and Bengio 2017; Tenney et al. 2019).

Multinomial logistic regression on standardised features, L2 on its kernel, trained to convergence. A high accuracy says that the information is there for such a
probe, not that the model uses it (Hewitt and Liang 2019; Belinkov 2022).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ptm.analysis import inputs
from ptm.analysis.inputs import Row
from ptm.data.batch import Document, keyed_rng
from ptm.fields import ConfigError
from ptm.models import Model
from ptm.statistics import wilson

ROWS = 16  # of a batch
STEPS, TOLERANCE = 500, 1e-4  # of the optimizer: most steps, and the norm of the gradient at which it stops


class Case(NamedTuple):
    """A text as a model reads it, where its labels are read off (None: the mean over the text), its labels, and the words that these belong to."""

    row: Row
    places: tuple[int, ...] | None
    labels: tuple[str, ...]
    words: tuple[str, ...]


def text_case(doc: Document, *, tokenizer: Any, config: Any, pool: str) -> Case | None:
    """A labelled text (fields label, and pair if there is one); None if it does not fit. `pool`: mean over its tokens, or the hidden state of `cls`."""
    second = tokenizer.encode(str(doc.columns["pair"])) if "pair" in doc.columns else None
    paired = config.kind == "encoder_decoder" and second is not None  # one text to its encoder
    row = _row(np.concatenate([doc.tokens_L, second]) if paired else doc.tokens_L, None if paired else second, tokenizer, config)
    if row is None:
        return None
    if pool == "mean":
        return Case(row, None, (str(doc.columns["label"]),), ("",))
    last = config.kind == "decoder" or config.summary == "last"
    return Case(row, (len(row.tokens_L) - 1 if last else 0,), (str(doc.columns["label"]),), ("",))


def word_case(doc: Document, *, tokenizer: Any, config: Any) -> Case | None:
    """A text with a tag for each word (fields words and tags), read off the first piece of each; None if it does not fit.

    Raises ConfigError if there are not as many tags as words.
    """
    words, tags = list(doc.columns["words"]), list(doc.columns["tags"])
    if len(words) != len(tags):
        raise ConfigError(f"record {doc.id} has {len(words)} words but {len(tags)} tags.")
    leads = tokenizer.keeps_spaces and tokenizer.space_leads
    pieces = [tokenizer.encode(f" {word}" if n and leads else str(word)) for n, word in enumerate(words)]
    kept = [n for n, ids in enumerate(pieces) if len(ids)]
    row = _row(np.concatenate([pieces[n] for n in kept] or [[]]).astype(np.int32), None, tokenizer, config) if kept else None
    if row is None:
        return None
    firsts = row.body.start + np.cumsum([0, *(len(pieces[n]) for n in kept[:-1])])
    return Case(row, tuple(map(int, firsts)), tuple(str(tags[n]) for n in kept), tuple(str(words[n]) for n in kept))


def _row(ids: np.ndarray, second: np.ndarray | None, tokenizer: Any, config: Any) -> Row | None:
    row = inputs.framed(tokenizer, config, ids, second)
    if row.inputs_I is not None:
        row = Row(row.inputs_I, np.zeros(len(row.inputs_I), np.int32), slice(0, len(ids)), row.inputs_I)  # the encoder's states are probed
    return row if inputs.fits(row, config) else None


def features(model: Model, params: Any, cases: Sequence[Case], *, mask: str) -> np.ndarray:
    """Hidden states [layers + 1, labels, D] that the labels of all cases are to be read off: those of the input, then those after each layer."""
    found: list[np.ndarray] = [np.zeros(0)] * len(cases)
    states_of = _states(model, mask)
    for numbers, batch in inputs.batches([case.row for case in cases], model.config, count=inputs.rows_at_once(model, ROWS)):
        states_NBLD = np.asarray(states_of(params, batch), np.float32)
        for place, n in enumerate(numbers):
            case = cases[n]
            own_NLD = states_NBLD[:, place]
            found[n] = own_NLD[:, case.row.body].mean(axis=1, keepdims=True) if case.places is None else own_NLD[:, list(case.places)]
    return np.concatenate(found, axis=1)


def _states(model: Model, mask: str) -> Any:
    if model.config.kind == "encoder_decoder":
        return jax.jit(lambda params, batch: model.encode(params, batch, states=True).states_NBLD, out_shardings=model.module.context.layout.replicated())
    made = functools.partial(model.hidden, mask=mask, states=True)
    return jax.jit(lambda params, batch: made(params, batch).states_NBLD, out_shardings=model.module.context.layout.replicated())


@jax.jit
def _fit(x_ED: jax.Array, labels_E: jax.Array, blank_DC: jax.Array, l2: jax.Array) -> tuple[jax.Array, jax.Array]:
    def loss(parameters: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel_DC, bias_C = parameters
        nll_E = optax.softmax_cross_entropy_with_integer_labels(x_ED @ kernel_DC + bias_C, labels_E)
        return jnp.mean(nll_E) + 0.5 * l2 * jnp.sum(kernel_DC**2)

    optimizer, both = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry: tuple[Any, Any, jax.Array, jax.Array]) -> tuple[Any, Any, jax.Array, jax.Array]:
        parameters, state, number, _ = carry
        value, gradient = both(parameters, state=state)
        updates, state = optimizer.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(parameters, updates), state, number + 1, optax.tree.norm(gradient)

    def unfinished(carry: tuple[Any, Any, jax.Array, jax.Array]) -> jax.Array:
        return (carry[2] < STEPS) & (carry[3] > TOLERANCE)

    start = (blank_DC, jnp.zeros(blank_DC.shape[1]))
    return jax.lax.while_loop(unfinished, step, (start, optimizer.init(start), jnp.int32(0), jnp.float32(jnp.inf)))[0]


def accuracy(train_ED: np.ndarray, train_labels_E: np.ndarray, test_ED: np.ndarray, test_labels_E: np.ndarray, *, classes: int, l2: float) -> float:
    """Share of test labels that a probe trained on the others gets right; features are standardised by the training ones'."""
    mean_D, deviation_D = train_ED.mean(axis=0), train_ED.std(axis=0)
    scale_D = 1 / np.where(deviation_D > 1e-6, deviation_D, 1.0)
    kernel_DC, bias_C = _fit((train_ED - mean_D) * scale_D, train_labels_E, np.zeros((train_ED.shape[1], classes), np.float32), jnp.float32(l2))
    guesses_E = np.argmax((test_ED - mean_D) * scale_D @ np.asarray(kernel_DC) + np.asarray(bias_C), axis=1)
    return float(np.mean(guesses_E == test_labels_E))


def control_labels(words: Sequence[str], labels: Sequence[str], *, seed: int) -> list[str]:
    """A random label for each word, the same wherever it stands, drawn as often as the labels are (Hewitt and Liang 2019, section 2)."""
    drawn: dict[str, str] = {}
    for word in words:
        if word not in drawn:
            drawn[word] = str(labels[int(keyed_rng(seed, "control", word).integers(len(labels)))])
    return [drawn[word] for word in words]


def probe(model: Model, params: Any, train: Sequence[Case], test: Sequence[Case], *, mask: str, l2: float, seed: int) -> dict[str, Any]:
    """Accuracy of a probe of each layer on `test`, with its interval of 95 % (Wilson's), the share of the most frequent training label, and for words the
    accuracy on a control task and the selectivity, which is the difference (Hewitt and Liang 2019).

    Labels of `test` that `train` lacks count as wrong; their number is given.
    """
    names = sorted({label for case in train for label in case.labels})
    if len(names) < 2:
        raise ConfigError(f"a probe needs two or more different labels to tell apart; the training part has: {', '.join(names) or 'none'}.")
    if not test:
        raise ConfigError("there is no text to test the probe on; give more records, or --validation=FORMAT:PATH.")
    sides = {"train": train, "test": test}
    labels = {side: [label for case in cases for label in case.labels] for side, cases in sides.items()}
    words = {side: [word for case in cases for word in case.words] for side, cases in sides.items()}
    x = {side: features(model, params, cases, mask=mask) for side, cases in sides.items()}
    count, majority = len(labels["test"]), max(names, key=labels["train"].count)

    def of_layers(labels: dict[str, Sequence[str]]) -> list[float]:
        known = {name: number for number, name in enumerate(names)}
        ids = {side: np.array([known[label] if label in known else -1 for label in own], np.int32) for side, own in labels.items()}
        return [accuracy(a, ids["train"], b, ids["test"], classes=len(names), l2=l2) for a, b in zip(x["train"], x["test"])]

    found = of_layers(labels)
    result: dict[str, Any] = {
        "labels": names, "train": len(labels["train"]), "test": count, "unknown_labels": sum(label not in names for label in labels["test"]),
        "majority": labels["test"].count(majority) / count, "accuracy": found, "interval": [list(wilson(share * count, count)) for share in found],
    }  # fmt: skip
    if any(words["train"]):
        result["control"] = of_layers({side: control_labels(words[side], labels["train"], seed=seed) for side in sides})
        result["selectivity"] = [share - control for share, control in zip(found, result["control"])]
    return result

"""What the tests of fine-tuning objectives share: rows of documents, packed and alone, and their losses."""

import types

import jax
import numpy as np
import zoo

from ptm import state
from ptm.data.batch import Document, keyed_rng
from ptm.data.pack import Cursor, Layout, make_packer
from ptm.objectives import OBJECTIVES

LENGTH = 40


def build(name, tokenizer, *, kind="encoder", summary="first", length=16, num_types=2, packing="default", **options):
    """An objective for a model of which nothing else is known."""
    entry, about = OBJECTIVES[name], types.SimpleNamespace(kind=kind, summary=summary, name="x", num_types=num_types)
    return entry.build(entry.config(**options), tokenizer=tokenizer, length=length, packing=packing, model_config=about)


def examples(objective, doc):
    return list(objective.features(doc, rng=keyed_rng(0), draw=None))


def rows(objective, docs, *, packing, count, length=None):
    """A batch of `count` rows of all examples of the documents, some of them padding; `length` is a shorter one than the objective's."""
    layout = Layout(objective, lengths=objective.lengths | ({"L": length} if length else {}))
    cursor = Cursor(lambda n: iter(examples(objective, docs[n])), count=len(docs))
    packer, made = make_packer(packing, layout=layout, cursor=cursor, bins=32), []
    while (row := packer.next_row()) is not None:
        made.append(objective.finish(row.arrays))
    assert len(made) <= count
    return zoo.stack(made + [objective.finish(layout.padding()) for _ in range(count - len(made))]), len(made)


def on_zoo(name, family, *, length=LENGTH, **options):
    """(objective, model, parameters) of a small family, with rows of `length`."""
    entry = OBJECTIVES[name]
    config = entry.config(**{**zoo.OPTIONS.get(name, {}), **options})
    objective = entry.build(config, tokenizer=zoo.Vocabulary(), length=length, packing="default", model_config=zoo.CONFIGS[family])
    return objective, zoo.model(family, heads=objective.heads), zoo.params(family, heads=objective.heads)


def documents(count=10):
    """Documents of many lengths with the columns of all tasks; the last one does not tell what is asked."""
    docs = [zoo.documents(n + 1, length=3 + 5 * n % 13)[-1] for n in range(count)]
    return [*docs[:-1], Document(docs[-1].id, docs[-1].tokens_L, {"words": docs[-1].columns["words"], "choices": docs[-1].columns["choices"]})]


def assert_packed_is_alone(name, family, **options):
    """Loss, weights, ratios and gradients of packed rows are those of rows of one document each."""
    objective, model, params = on_zoo(name, family, **options)
    docs = documents()
    (packed, used), (alone, single) = (rows(objective, docs, packing=packing, count=16) for packing in ("first_fit", "none"))
    assert used < single == len(docs) and int(packed["segments_BL"].max()) > 1

    @zoo.jit
    def step(params, batch):
        loss, grads, (totals, weights, aux), _ = state.gradients(model, objective, params, batch, microbatches=1, rng=None, carry=None, train=False)
        return loss, grads, totals, weights, aux.ratios

    ours, theirs = step(params, packed), step(params, alone)
    assert float(theirs[0]) > 0.05
    for one, other in zip(jax.tree.leaves((ours[0], *ours[2:])), jax.tree.leaves((theirs[0], *theirs[2:]))):
        np.testing.assert_allclose(one, other, rtol=2e-5)
    zoo.assert_equal_gradients(ours[1], theirs[1])

"""What only XLNet has against the reference library: the query stream over our orders, memory, and text that stands in reverse.

Needs torch and transformers (pytest -m parity); tests/test_parity.py has the content stream and all heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity
import zoo

from ptm import hf
from ptm.hf import transfer

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
CASES = ("xlnet", "xlnet_uni", "xlnet_untied")  # both sides; the left alone with clamped distances; a head and a clamp of its own


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name -> (the reference's model, ours, our parameters)"""
    pytest.importorskip("torch", reason="needs the extra parity")
    pytest.importorskip("transformers", reason="needs the extra parity")

    @functools.cache
    def make(name):
        folder, model = tmp_path_factory.mktemp("hf") / name, test_parity.reference(test_parity.CASES[name])
        model.save_pretrained(folder)
        imported = hf.read(folder)
        return model, transfer.model(imported.config, imported.heads), imported.params

    return make


def rows(seed=0):
    """Rows of one document each, with types, from the objective: orders and selected positions are its own."""
    objective = zoo.objective("permutation", "xlnet", partial=3)
    docs, rng = zoo.documents(1, length=14) + zoo.documents(2, length=9), np.random.default_rng(seed)
    examples = [next(iter(objective.features(doc, rng=rng, draw=None))) for doc in docs]
    batch = zoo.stack([objective.finish(zoo.row([example], objective.lengths, objective.fields)) for example in examples])
    types_BL = np.random.default_rng(seed).integers(0, 3, batch["tokens_BL"].shape).astype(np.int32)
    return {name: np.array(value) for name, value in batch.items()} | {"types_BL": types_BL}


def given(batch, row):
    """A row of ours as the reference takes it: whom each position must not see, and one position a prediction."""
    import torch

    rank, places, length = batch["rank_BL"][row], batch["target_index_BS"][row], batch["tokens_BL"].shape[1]
    hidden = ~(rank[None, :] < np.maximum(rank, 1)[:, None])
    mapping = (places[:, None] == np.arange(length)).astype(np.float32)
    tokens, real, types = (torch.from_numpy(batch[name][row : row + 1].astype(np.int64)) for name in ("tokens_BL", "segments_BL", "types_BL"))
    masks = {"attention_mask": real, "perm_mask": torch.from_numpy(hidden[None].astype(np.float32)), "target_mapping": torch.from_numpy(mapping[None])}
    return {"input_ids": tokens, "token_type_ids": types, **masks}


def assert_near(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE * max(1.0, float(np.max(np.abs(expected)))), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_both_streams(pair, name):
    """States of both streams after every layer, and the logits of the targets; of those that see anything: the reference lets others see all."""
    reference, model, params = pair(name)
    batch = rows()
    assert batch["weights_BL"].sum() > 8

    @jax.jit
    def ours(params):
        out = model.hidden(params, batch, mask="permutation", states=True)
        return out.states_NBLD, out.query_BSD, model.logits(params, out.query_BSD, head="lm")

    states, query, logits = ours(params)
    for row in range(len(batch["tokens_BL"])):
        out = reference(**given(batch, row), output_hidden_states=True)
        theirs = [state.detach().numpy()[0] for state in out.hidden_states]
        real, rank, places_S1 = batch["segments_BL"][row] > 0, batch["rank_BL"][row], batch["target_index_BS"][row][:, None]
        in_reach_SL = real & ((np.arange(len(real)) < places_S1) | (model.config.attn_type == "bi"))
        chosen = np.any(in_reach_SL & (rank < np.append(rank, 0)[places_S1]), axis=1)
        assert chosen.any()
        for layer, state in enumerate(theirs[::2]):
            assert_near(states[layer, row][real], state[real])
        assert_near(query[row][chosen], theirs[-1][chosen])
        assert_near(logits[row][chosen], out.logits.detach().numpy()[0][chosen])


@pytest.mark.parametrize("name", ["xlnet", "xlnet_untied"])
def test_memory(pair, name):
    """A second row after a first one, in both streams, with a memory that holds both of them afterwards."""
    reference, model, params = pair(name)
    first, second = rows(0), rows(1)
    for batch in (first, second):
        batch["segments_BL"][:] = 1
        batch["types_BL"] *= 0
    empty = model.empty_cache(rows=3, length=20)

    @jax.jit
    def ours(params):
        cache = model.hidden(params, first, mask="full", cache=empty).cache
        out = model.hidden(params, second, mask="permutation", cache=cache)
        return out.query_BSD, out.cache

    query, cache = ours(params)
    reference.config.mem_len = reference.transformer.mem_len = 20
    for row in range(3):
        mems = reference.transformer(input_ids=given(first, row)["input_ids"], use_mems=True).mems
        out = reference.transformer(**given(second, row), mems=mems, use_mems=True)
        chosen = second["target_index_BS"][row] < zoo.LENGTH
        assert_near(query[row][chosen], out.last_hidden_state.detach().numpy()[0][chosen])
        for layer, memory in enumerate(out.mems):
            assert_near(cache["states_BNMD"][row, layer], memory.detach().numpy()[:, 0])
    assert np.asarray(cache["valid_BM"]).all()


def test_text_in_reverse(pair):
    """The reference takes the second half of a batch for text in reverse where it has been told that its data goes both ways."""
    import torch

    reference, model, params = pair("xlnet")
    batch = {name: value[:2] for name, value in rows().items()}
    batch["segments_BL"][:] = 1
    batch["reversed_BL"] = np.array([[0], [1]], np.int32) * np.ones_like(batch["tokens_BL"])
    states = jax.jit(functools.partial(model.hidden, mask="full"))(params, jax.tree.map(jnp.asarray, batch)).hidden_BLD
    reference.transformer.bi_data = True
    tokens, types = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("tokens_BL", "types_BL"))
    expected = reference.transformer(input_ids=tokens, token_type_ids=types).last_hidden_state.detach().numpy()
    reference.transformer.bi_data = False
    assert_near(states, expected)

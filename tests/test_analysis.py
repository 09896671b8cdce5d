"""Attention maps of models and their figures, probes, bias suites. The command and its page: tests/test_analyze.py."""

import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parity
import zoo
from hypothesis import given
from hypothesis import strategies as st

from ptm import hf, statistics
from ptm.analysis import attention, bias, inputs, maps, probes, suites
from ptm.analysis.likelihood import Scorer
from ptm.data.batch import Document
from ptm.fields import ConfigError
from ptm.hf import check, transfer
from ptm.nn import attention as nn_attention
from ptm.nn.masks import self_mask

# Maps of models.


def test_maps_are_the_weights_of_the_output():
    """What attention gives is its maps times the values, groups of queries, bias and mask included."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 6, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    mask = self_mask("causal", {"segments_BL": jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0]])}).replace(window=(2, 0))
    options = {
        "context": zoo.model("gpt", attention="xla").module.context,
        "mask": mask,
        "scale": 0.5,
        "bias_BHLT": jnp.asarray(rng.standard_normal((1, 4, 6, 6)), jnp.float32),
    }
    out, _, maps_BHLT = nn_attention.attend(q, k, v, **options, maps=True)
    np.testing.assert_allclose(out, jnp.einsum("bhlt,bthk->blhk", maps_BHLT, jnp.repeat(v, 2, axis=2)), atol=1e-6)
    assert nn_attention.attend(q, k, v, **options)[2] is None
    np.testing.assert_array_equal(np.asarray(maps_BHLT) > 0, np.broadcast_to(mask.dense(), maps_BHLT.shape))


@pytest.mark.parametrize(("backend", "why"), [("chunked", "never holds a whole matrix"), ("cudnn", "NVIDIA")])
def test_other_backends_refuse(backend, why):
    model = zoo.model("gpt", attention=backend)
    with pytest.raises(ConfigError, match=why):
        jax.eval_shape(lambda params, batch: model.hidden(params, batch, mask="causal", maps=True), zoo.params("gpt"), zoo.batch("causal", "gpt"))


MAPPED = ["llama", "xlnet", "t5", "electra"]  # groups and windows; two streams; cross-attention; two encoders
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in zoo.CONFIGS if family not in MAPPED]


@pytest.mark.parametrize("family", [*MAPPED, *SLOW])
def test_maps_of_families(family):
    """One map a layer and head, each row adds up to 1 and is 0 where the mask hides the key; none where they are not asked for."""
    name = zoo.HOME[family]
    objective, model, params, batch = zoo.objective(name, family), zoo.model(family), zoo.params(family), zoo.batch(name, family)
    config, lengths = model.config, objective.lengths

    @zoo.jit
    def look(params, batch):
        found = {}
        for head in model.module.heads:
            found[head] = model.hidden(params, batch, mask=objective.mask, head=head, maps=True)
        if config.kind == "encoder_decoder":
            found["encoder"] = model.encode(params, batch, maps=True)
        return {key: (out.maps_NBHLT, out.cross_maps_NBHLT) for key, out in found.items()}

    found = look(params, batch)
    segments = {"L": np.asarray(batch["segments_BL"]), "I": np.asarray(batch["input_segments_BI"]) if "I" in lengths else None}
    for key, (own, cross) in found.items():
        side_config = config.parts["encoder" if key == "encoder" else "decoder"] if family == "encoder_decoder" else config
        heads = config.generator_shape()[1] if family == "electra" and key == "mlm" else side_config.num_heads
        side = "I" if key == "encoder" else "L"
        for weights, keys in ((own, side), (cross, "I")):
            if weights is None:
                assert keys == "I" and (config.kind != "encoder_decoder" or key == "encoder")
                continue
            layers = config.applications if family == "albert" else side_config.num_layers
            assert weights.shape == (layers, 8, heads, lengths[side], lengths[keys])
            np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
            real = segments[side] > 0
            apart = (segments[side][:, :, None] != segments[keys][:, None, :]) & real[:, :, None]
            assert not np.asarray(weights)[np.broadcast_to(apart[None, :, None], weights.shape)].any()
    if family == "llama":
        first = np.asarray(found["lm"][0][0])
        assert not first[..., np.tri(16, 16, -4, dtype=bool)][np.asarray(segments["L"]).all(axis=1)].any(), "a window of 4"
        assert np.asarray(found["lm"][0][1])[0, :, 10, 2].any(), "a global layer"
    plain = jax.eval_shape(lambda params, batch: model.hidden(params, batch, mask=objective.mask, head=model.module.heads[0]), params, batch)
    assert plain.maps_NBHLT is None and plain.cross_maps_NBHLT is None


@pytest.mark.parity
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "xlnet", "albert", "llama", "electra"])
def test_the_reference_looks_there_too(name, tmp_path):
    """Every weight at real positions of padded rows against `output_attentions` of the reference, which reads each row alone."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    case = test_parity.CASES[name]
    model = test_parity.reference(case if name == "t5" else dataclasses.replace(case, scale=12.0))  # t5 does not scale its logits down
    model.save_pretrained(tmp_path)
    if name != "xlnet":
        model.set_attn_implementation("eager")
    imported = hf.read(tmp_path)
    ours = transfer.model(imported.config, imported.heads)
    batch, lengths = check.inputs(imported.config, seed=1)
    paired = imported.config.kind == "encoder_decoder"

    def look(params):
        if not paired:
            return {"attentions": ours.hidden(params, batch, mask=check.MASKS[imported.config.kind], maps=True).maps_NBHLT}
        encoded = ours.encode(params, batch, maps=True)
        decoded = ours.decode(params, batch, encoded, maps=True)
        return {"encoder_attentions": encoded.maps_NBHLT, "decoder_attentions": decoded.maps_NBHLT, "cross_attentions": decoded.cross_maps_NBHLT}

    found = jax.jit(look)(imported.params)
    names = {"inputs_BI": "input_ids", "tokens_BL": "decoder_input_ids"} if paired else {"tokens_BL": "input_ids", "types_BL": "token_type_ids"}
    largest = 0.0
    for row, length in enumerate(lengths):
        given = {theirs: torch.from_numpy(batch[mine][row : row + 1, :length].astype(np.int64)) for mine, theirs in names.items() if mine in batch}
        out = model(**given, output_attentions=True)
        for key, weights in found.items():
            expected = torch.stack(list(out[key])).detach().numpy()[:, 0]
            np.testing.assert_allclose(np.asarray(weights)[:, row, :, :length, :length], expected, atol=1e-5, rtol=0)
            largest = max(largest, float(np.std(expected[..., -1, :])))
    assert largest > 0.05, "the comparison needs heads that look somewhere"


# Figures of maps.


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.3), size=shape[:-1])


@given(st.integers(1, 12), st.integers(1, 4))
def test_uniform_attention(length, layers):
    uniform = np.full((layers, 2, length, length), 1 / length)
    np.testing.assert_allclose(attention.entropy(uniform), np.log(length), atol=1e-12)
    np.testing.assert_allclose(attention.share(uniform, np.arange(length) == 0), 1 / length)
    np.testing.assert_allclose(attention.at_offset(uniform, 0), 1 / length)
    expected = np.mean([abs(a - b) for a in range(length) for b in range(length)])
    np.testing.assert_allclose(attention.distance(uniform).mean(), expected)


def test_attention_to_itself():
    identity = np.broadcast_to(np.eye(5), (3, 2, 5, 5))
    assert not attention.entropy(identity).any() and not attention.distance(identity).any()
    np.testing.assert_array_equal(attention.rollout(identity), np.broadcast_to(np.eye(5), (3, 5, 5)))
    np.testing.assert_array_equal(attention.flow(identity), np.eye(5))
    previous = np.eye(5, k=-1)
    previous[0, 0] = 1
    assert attention.at_offset(previous, -1) == 1 and attention.at_offset(previous, 1) == 0 and attention.at_offset(previous, 0) == 0.2
    assert np.isnan(attention.at_offset(np.ones((1, 1)), -1))


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 4))
def test_rollout(seed, length, layers):
    """Rows sum to 1; a token that no one looks at keeps what its residual gives; the order of layers counts."""
    weights = drawn(seed, layers, 3, length, length)
    rolled = attention.rollout(weights)
    assert rolled.shape == (layers, length, length)
    np.testing.assert_allclose(rolled.sum(axis=-1), 1, atol=1e-9)
    expected = np.eye(length)
    for layer in weights:
        expected = (0.5 * layer.mean(axis=0) + 0.5 * np.eye(length)) @ expected
    np.testing.assert_allclose(rolled[-1], expected, atol=1e-9)
    assert (np.diagonal(rolled[-1]) >= 0.5**layers - 1e-9).all()


def test_flow_by_hand():
    """Two layers of two tokens: what reaches token 0 from position 1 is limited by the edges on both of its paths."""
    weights = np.array([[[[1.0, 0.0], [0.6, 0.4]]], [[[1.0, 0.0], [0.2, 0.8]]]])
    # Capacities: below 1->0 0.3, 1->1 0.7, 0->0 1; above 1->0 0.1, 1->1 0.9. Flow to token 0: 0.1 through position 0, 0.3 through position 1.
    np.testing.assert_allclose(attention.flow(weights), [[1.0, 0.0], [0.4, 0.7]], atol=1e-6)


def test_means_over_texts_count_queries():
    found = [{"entropy": np.array([[1.0]]), "previous": np.array([[0.5]])}, {"entropy": np.array([[4.0]]), "previous": np.array([[np.nan]])}]
    totals = maps.over_texts(found, [2, 1])
    assert totals["entropy"] == 2.0 and totals["previous"] == 0.5  # of a text of one token no query has a previous one


# Likelihoods and bias.


class Words:
    """A tokenizer of words that are known, each with a space before it; all others are unknown."""

    keeps_spaces, space_leads = False, True
    pad_id, bos_id, eos_id, unk_id, mask_id, cls_id, sep_id = 0, 1, 2, 3, 4, 5, 6
    special_ids = frozenset(range(7))

    def __init__(self, text: str) -> None:
        self.words = sorted(set(re.findall(r"\w+|[^\w\s]", text.lower())))
        self.vocab_size = 7 + len(self.words)

    def encode(self, text):
        found = re.findall(r"\w+|[^\w\s]", text.lower())
        return np.array([7 + self.words.index(word) if word in self.words else self.unk_id for word in found], np.int32)


class Judge:
    """A scorer whose likelihoods are those of a table: each word its own log-probability, wherever it stands."""

    head, measure = "mlm", "pseudo-log-likelihood"

    def __init__(self, tokenizer, table, *, masked):
        self.tokenizer, self.table, self.masked = tokenizer, table, masked
        self.asked = []

    def row(self, text):
        return inputs.framed(self.tokenizer, SimpleNamespace(kind="encoder", summary="first", name="judge"), self.tokenizer.encode(text))

    def _of(self, token):
        word = self.tokenizer.words[token - 7]
        return self.table[word] if word in self.table else -1.0

    def tokens(self, rows):
        return [np.array([self._of(token) for token in row.tokens_L[row.body]]) for row in rows]

    def at_blanks(self, questions):
        self.asked += [([self.tokenizer.words[row.tokens_L[n] - 7] for n in masked], index) for row, masked, index in questions]
        return np.array([self._of(row.tokens_L[index]) for row, _, index in questions])


def log_probs_of(scorer, tokens_BL, *, mask):
    """Log-probabilities [B, L, V] of rows without padding."""
    batch = {"tokens_BL": tokens_BL, "segments_BL": np.ones_like(tokens_BL), "positions_BL": np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)}

    @zoo.jit
    def log_probs(params, batch):
        return jax.nn.log_softmax(scorer.model.logits(params, scorer.model.hidden(params, batch, mask=mask).hidden_BLD, head=scorer.head))

    return np.asarray(log_probs(scorer.params, batch))


def test_likelihoods_of_a_masked_model():
    """Padded batches of many questions give what the model says of each masked text alone."""
    tokenizer = zoo.Vocabulary()
    tokenizer.encode = lambda text: np.array([int(word) for word in text.split()], np.int32)
    scorer = Scorer(zoo.model("bert"), zoo.params("bert"), tokenizer)
    row = scorer.row("10 11 12 13 14")
    places = np.arange(row.body.start, row.body.stop)
    tokens_BL = np.tile(row.tokens_L, (len(places), 1))
    tokens_BL[np.arange(len(places)), places] = tokenizer.mask_id
    expected = log_probs_of(scorer, tokens_BL, mask="full")[np.arange(len(places)), places, row.tokens_L[places]]
    found = scorer.tokens([row, scorer.row("20 21")])
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    assert len(found[1]) == 2 and list(row.tokens_L[[0, -1]]) == [tokenizer.cls_id, tokenizer.sep_id]


def test_likelihoods_of_a_decoder():
    """The sum over a text is the log-likelihood that the training loss has of it; padding and neighbours change nothing."""
    tokenizer = zoo.Vocabulary()
    tokenizer.encode = lambda text: np.array([int(word) for word in text.split()], np.int32)
    scorer = Scorer(zoo.model("gpt"), zoo.params("gpt"), tokenizer)
    rows = [scorer.row("10 11 12 13 14"), scorer.row("20 21")]
    assert list(rows[1].tokens_L) == [tokenizer.bos_id, 20, 21]
    found = scorer.tokens(rows)
    expected = log_probs_of(scorer, rows[0].tokens_L[None], mask="causal")[0]
    np.testing.assert_allclose(found[0], [expected[n, token] for n, token in enumerate(rows[0].tokens_L[1:])], atol=1e-4)
    assert len(found[1]) == 2


def test_models_without_likelihoods_are_refused():
    with pytest.raises(ConfigError, match="t5 .encoder_decoder"):
        Scorer(zoo.model("t5"), None, zoo.Vocabulary())


CROWS = (
    ",sent_more,sent_less,stereo_antistereo,bias_type,annotations\n0,The poor are lazy.,The rich are lazy.,stereo,socioeconomic,x\n"
    "1,The old man sat.,The young man sat.,antistereo,age,x\n2,Same.,Same.,stereo,age,x\n3,Blue zzz.,Blue yyy.,stereo,age,x\n"
)


def test_crows_pairs(tmp_path):
    """Only tokens that both sentences share are masked, one at a time, and the ones that differ do not count."""
    (tmp_path / "c.csv").write_text(CROWS)
    judge = Judge(Words("the poor rich are lazy . old young man sat blue"), {"poor": -9.0, "rich": -5.0, "old": -1.0, "young": -2.0}, masked=True)
    result = bias.run("crows_pairs", str(tmp_path / "c.csv"), scorer=judge)
    assert [asked for asked, _ in judge.asked] == 2 * [["the"], ["are"], ["lazy"], ["."]] + 2 * [["the"], ["man"], ["sat"], ["."]]
    assert result.skipped == {"rows without two different sentences": 1, "pairs that do not fit into the model": 0, "pairs with the same tokens": 1}
    assert result.figures["all"] == {"percent": 50.0, "interval": pytest.approx([100 * x for x in statistics.wilson(1, 2)]), "count": 2, "ties": 2}
    judge.masked = False  # a decoder: whole sentences
    figures = bias.run("crows_pairs", str(tmp_path / "c.csv"), scorer=judge).figures
    assert figures["bias_type"]["socioeconomic"]["percent"] == 0 and figures["direction"]["antistereo"]["percent"] == 100
    assert any("Blodgett" in line for line in bias.lines("crows_pairs", bias.run("crows_pairs", str(tmp_path / "c.csv"), scorer=judge), judge))


def test_shared_tokens():
    assert bias.shared(np.array([5, 1, 2, 9, 3]), np.array([5, 7, 8, 2, 3])) == ([0, 2, 4], [0, 3, 4])


def test_winobias(tmp_path):
    (tmp_path / "pro_stereotyped_type1.txt.dev").write_text(
        "1 [The cook] left because [he] ran.\n2 [The nurse] left because [she] ran.\n3 [The cook] is [he].\n4 alone\n"
    )
    (tmp_path / "anti_stereotyped_type1.txt.dev").write_text(
        "1 [The cook] left because [she] ran.\n2 [The nurse] left because [he] ran.\n3 [The chef] is [she].\n"
    )
    judge = Judge(Words("the cook left because he she ran . nurse chef is"), {"he": -1.0, "she": -3.0}, masked=True)
    result = bias.run("winobias", str(tmp_path), scorer=judge)
    assert result.skipped["lines without counterpart"] == 1 and result.skipped["pairs that differ in more than the gender of a pronoun"] == 1
    assert result.rows[0]["stereotypical"] == "The cook left because he ran."
    # A model that only likes `he`: no preference for the stereotype, all of it frequency.
    assert result.figures["all"]["percent"] == 50 and result.figures["masculine"]["percent"] == 100
    assert result.figures["difference"]["nats"] == 0 and result.figures["pronoun"]["he"]["percent"] == 100


def stereoset_file(path):
    def example(target, fillings):
        labels = ("stereotype", "anti-stereotype", "unrelated")
        sentences = [{"sentence": f"The {target} was {word}.", "gold_label": label} for word, label in zip(fillings, labels)]
        return {"target": target, "bias_type": "profession", "context": f"The {target} was BLANK.", "sentences": sentences}

    examples = [example("cook", ["very rude", "kind", "seven"]), example("cook", ["rude", "kind", "seven"]), example("nurse", ["rude", "kind", "seven"])]
    examples.append({"target": "x", "bias_type": "race", "context": "No gap.", "sentences": []})
    path.write_text(json.dumps({"data": {"intrasentence": examples}}))
    return path


def test_stereoset(tmp_path):
    """Means over target terms; pieces of the blank are asked for from left to right; a language model that prefers nonsense has a low lms."""
    judge = Judge(Words("the cook nurse was very rude kind seven ."), {"very": -2.0, "rude": -4.0, "kind": -3.5, "seven": -3.8}, masked=True)
    result = bias.run("stereoset", str(stereoset_file(tmp_path / "s.json")), scorer=judge)
    assert judge.asked[:3] == [(["very", "rude"], 4), (["rude"], 5), (["kind"], 4)]
    assert result.skipped["examples without a blank or a sentence of each label"] == 1
    # cook: -3 > -3.5 and -4 < -3.5, so ss 50; nurse: 0. Over unrelated: of cook 3 of 4, of nurse 1 of 2.
    figures = result.figures["all"]
    assert figures["ss"] == 25 and figures["lms"] == pytest.approx(62.5) and figures["icat"] == pytest.approx(62.5 * 25 / 50)
    assert figures["count"] == 3 and figures["targets"] == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"data": {}}', "\xff"])
def test_broken_suites_are_told(tmp_path, content):
    (tmp_path / "f").write_bytes(content.encode("latin-1"))
    for read in (suites.stereoset, suites.crows_pairs):
        with pytest.raises(ConfigError, match="give "):
            read(tmp_path / "f")


def test_published_suites(ptm_data):
    pairs, skipped = suites.crows_pairs(ptm_data / "bias/crows_pairs/crows_pairs_anonymized.csv")
    assert len(pairs) == 1508 and not any(skipped.values()) and len({pair.groups["bias_type"] for pair in pairs}) == 9
    pairs, skipped = suites.winobias(ptm_data / "bias/winobias")
    assert len(pairs) + sum(skipped.values()) == 4 * 396 and len(pairs) > 1560


@pytest.fixture
def ptm_data():
    if "PTM_DATA" not in os.environ:
        pytest.skip("needs the data that PTM_DATA names")
    return Path(os.environ["PTM_DATA"])


def test_intervals():
    """Wilson's interval of 8 of 10 (Brown et al. 2001 print [0.490, 0.943]); a bootstrap of a constant has no width."""
    assert statistics.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert statistics.wilson(0, 0) == (0.0, 1.0) and statistics.bootstrap([2.0] * 5) == (2.0, 2.0)
    low, high = statistics.bootstrap(np.random.default_rng(0).standard_normal(400))
    assert low == pytest.approx(-0.098 - 0.02, abs=0.06) and high - low == pytest.approx(2 * 1.96 / 20, abs=0.03)


# Probes.


def test_a_probe_reads_what_is_there():
    """Linearly separable labels are read off, those of noise are not, and the solution is where the gradient is 0."""
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((300, 6)).astype(np.float32), rng.standard_normal((300, 6)).astype(np.float32)
    labels = np.argmax(x @ rng.standard_normal((6, 3)), axis=1).astype(np.int32)
    settings = {"classes": 3, "l2": 1e-3}
    assert probes.accuracy(x[:200] * 50 + 7, labels[:200], x[200:] * 50 + 7, labels[200:], **settings) > 0.9
    assert probes.accuracy(noise[:200], labels[:200], noise[200:], labels[200:], **settings) < 0.55
    kernel, offset = map(np.asarray, probes._fit(x, labels, np.zeros((6, 3), np.float32), jnp.float32(0.1)))
    probabilities = np.asarray(jax.nn.softmax(x @ kernel + offset))
    error = (probabilities - np.eye(3)[labels]) / len(x)
    np.testing.assert_allclose(x.T @ error + 0.1 * kernel, 0, atol=2e-4)
    np.testing.assert_allclose(error.sum(axis=0), 0, atol=2e-4)


def test_cases_of_texts_and_words():
    tokenizer, config = Words("a cat sat"), zoo.CONFIGS["bert"]
    document = Document("d", tokenizer.encode("a cat"), {"label": 1, "pair": "sat"})
    case = probes.text_case(document, tokenizer=tokenizer, config=config, pool="cls")
    assert case.places == (0,) and case.labels == ("1",) and list(case.row.types_L) == [0, 0, 0, 0, 1, 1]
    words = Document("w", tokenizer.encode("a cat sat"), {"words": ["a", "", "cat", "sat"], "tags": ["D", "X", "N", "V"]})
    case = probes.word_case(words, tokenizer=tokenizer, config=config)
    assert case.places == (1, 2, 3) and case.labels == ("D", "N", "V")
    with pytest.raises(ConfigError, match="w has 1 words but 2 tags"):
        probes.word_case(Document("w", np.zeros(0), {"words": ["a"], "tags": ["D", "X"]}), tokenizer=tokenizer, config=config)


def test_probe_of_words_is_selective():
    """Tags that follow the word are read off the input as well as their control task: the probe needs no context for them."""
    tokenizer = zoo.Vocabulary()
    tokenizer.keeps_spaces, tokenizer.space_leads = False, True
    tokenizer.encode = lambda word: np.array([int(word)], np.int32)
    rng = np.random.default_rng(0)
    texts = [[str(token) for token in rng.integers(8, 24, 8)] for _ in range(40)]
    cases = [
        probes.word_case(Document("d", np.zeros(0), {"words": words, "tags": ["even" if int(word) % 2 == 0 else "odd" for word in words]}), tokenizer=tokenizer, config=zoo.CONFIGS["bert"])
        for words in texts
    ]  # fmt: skip
    result = probes.probe(zoo.model("bert"), zoo.params("bert"), cases[:30], cases[30:], mask="full", l2=1e-4, seed=0)
    assert len(result["accuracy"]) == 3 and result["accuracy"][0] > 0.95 and result["control"][0] > 0.95 and abs(result["selectivity"][0]) < 0.05
    assert 0.35 < result["majority"] < 0.65 and result["test"] == 80
    control = probes.control_labels(["a", "b", "a"], ["x", "y"], seed=1)
    assert control[0] == control[2]

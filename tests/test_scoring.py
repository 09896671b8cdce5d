"""How likely texts are: windows, left-to-right and pseudo-log-likelihoods against plain computations, and the evals that are made of them."""

import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import zoo

from ptm import config, registry
from ptm import run as run_lib
from ptm.config import Data, Tokenizer
from ptm.evals import EVALS, choice, cloze, minimal_pairs, perplexity, pseudo_perplexity, scoring
from ptm.fields import ConfigError
from ptm.models import bert, gpt
from ptm.objectives import causal

TEXTS = ["under", "the model must learn to guess", "a", "more text than it has seen, which is long: more than two rows", "of"]
ROWS = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt", documents=30)


def made(kind, text, **changes):
    """(run, parameters) of a tiny run, not trained; parameters are drawn large, so that no two texts are as likely."""
    run = run_lib.setup(runs.tiny(kind, text=text, train__batch_size=ROWS, train__microbatches=1, **changes), devices=jax.devices()[:1])
    shapes = run.abstract_params
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    return run, jax.device_put(jax.tree.unflatten(treedef, drawn), jax.tree.map(lambda leaf: leaf.sharding, shapes))


@pytest.fixture(scope="module")
def decoder(text):
    return made("concat", text, data__packing="none", data__holdout=0.3)


@pytest.fixture(scope="module")
def encoder(text):
    return made("mlm", text)


@pytest.fixture(scope="module")
def encoder_decoder(text):
    return made("spans", text)


def test_windows_golden():
    """Ten tokens, the first one given; windows of five, each after the first scores two: . is context, x is scored."""
    shown = ["".join("x" if n >= begin else "." for n in range(start, end)).rjust(end) for start, begin, end in scoring.windows(1, 10, size=5, stride=2)]
    assert shown == [".xxxx", "  ...xx", "    ...xx", "     ....x"]


@pytest.mark.parametrize("size", [2, 5, 8])
@pytest.mark.parametrize(("first", "total"), [(1, 3), (1, 30), (4, 30), (12, 13), (12, 40), (0, 9)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_every_token_is_scored_once(size, first, total, stride):
    stride = min(stride, size - 1)
    found = list(scoring.windows(first, total, size=size, stride=stride))
    assert [n for _, begin, end in found for n in range(begin, end)] == list(range(first, total))
    for number, (start, begin, end) in enumerate(found):
        assert 0 <= start <= begin < end and end - start <= size
        assert start == 0 or end - start == size, "a window that does not begin the text is full"
        assert start < begin or first == 0, "a token before the scored ones is always there"
        assert number == 0 or end - begin <= max(stride, size - first)


@functools.cache
def plain(model, head):
    """Log-probabilities [B, L, V] of a batch by the plain model, compiled once for a shape."""

    def log_probs(params, batch):
        hidden = model.hidden(params, batch, mask="full" if head == "mlm" else "causal").hidden_BLD
        return jax.nn.log_softmax(model.logits(params, hidden, head=head).astype(jnp.float32))

    return zoo.jit(log_probs)


def row_of(tokens, length):
    """A row of `length` positions that begins with the tokens."""
    spare = length - len(tokens)
    segments = np.repeat([1, 0], [len(tokens), spare])
    return {"tokens_BL": np.pad(tokens, (0, spare)), "segments_BL": segments, "positions_BL": np.arange(length) * segments}


def next_token_log_probs(run, params, tokens):
    """log p(each of the vocabulary | the tokens up to a place) for all places [L, V], by the plain model."""
    batch = jax.tree.map(lambda x: jnp.asarray(x[None], jnp.int32), row_of(tokens, 17 - 1))
    return np.asarray(plain(run.model, "lm")(params, batch))[0, : len(tokens)]


def plain_scores(run, params, tokens):
    """log p(token | those before it) of all tokens but the first."""
    return next_token_log_probs(run, params, tokens[:-1])[np.arange(len(tokens) - 1), tokens[1:]]


def test_scores_are_those_of_the_plain_model(decoder):
    """Short texts whole, long ones in windows of 16 tokens that score 8 each; in the order given, whatever is in a batch beside them."""
    run, params = decoder
    found = list(scoring.log_likelihoods(run, params, TEXTS, batch_size=ROWS))
    start = run.tokenizer.bos_id
    assert start is not None
    for written, scored in zip(TEXTS, found, strict=True):
        x = np.append(start, run.tokenizer.encode(written)).astype(np.int32)
        assert scored.tokens.tolist() == x[1:].tolist()
        expected = [plain_scores(run, params, x[a:e])[b - a - 1 :] for a, b, e in scoring.windows(1, len(x), size=17, stride=8)]
        np.testing.assert_allclose(scored.log_probs, np.concatenate(expected), rtol=1e-4, atol=1e-4)
    assert len({round(scored.total, 3) for scored in found}) == len(TEXTS)
    [alone] = scoring.log_likelihoods(run, params, TEXTS[1:2], batch_size=ROWS, window=1)
    np.testing.assert_allclose(alone.log_probs, found[1].log_probs, rtol=1e-5)


def test_scores_add_up_to_the_loss(decoder):
    """The loss of the validation split is the mean over what scoring gives of the same documents with the end token that training adds."""
    run, params = decoder
    measured = run.evaluate("validation", params)
    cut = [tokens for doc in run.documents(run.config.data) for tokens in np.split(doc.tokens_L, range(15, len(doc.tokens_L), 15))]  # rows of 16, bos among them
    assert len(cut) > 5
    empty = np.zeros(0, np.int32)
    requests = [scoring.Request(empty, np.append(tokens, run.tokenizer.eos_id)) for tokens in cut]
    found = [scored for _, scored in scoring.score(run, params, requests, scorer=scoring.scorer_of(run, name="test"), batch_size=ROWS)]
    assert sum(len(scored.tokens) for scored in found) == measured["validation/tokens"]
    assert -sum(scored.total for scored in found) / measured["validation/tokens"] == pytest.approx(measured["validation/loss"], rel=1e-5)


def test_the_chain_rule(decoder):
    """log p(context, continuation) = log p(context) + log p(continuation | context); the likeliest token is marked."""
    run, params = decoder
    whole, first, second = scoring.log_likelihoods(run, params, ["the word of", "the", ("the", " word of")], batch_size=ROWS)
    assert whole.total == pytest.approx(first.total + second.total, rel=1e-5)
    assert run.tokenizer.decode(second.tokens) == " word of"
    assert whole.greedy.tolist() == [*first.greedy, *second.greedy]


def test_what_the_model_would_write_is_marked(decoder):
    """Tokens that are each the likeliest are greedy; another one is not."""
    run, params = decoder
    x = np.append(run.tokenizer.bos_id, run.tokenizer.encode("the")).astype(np.int32)
    for _ in range(3):
        x = np.append(x, next_token_log_probs(run, params, x)[-1].argmax()).astype(np.int32)
    other = np.append(x[4:6], (x[6] + 1) % 200)
    requests = [scoring.Request(x[1:4], x[4:]), scoring.Request(x[1:4], other)]
    found = [scored for _, scored in scoring.score(run, params, requests, scorer=scoring.scorer_of(run, name="test"), batch_size=ROWS)]
    assert [scored.greedy.tolist() for scored in found] == [[True, True, True], [True, True, False]]


def test_a_context_is_given_as_far_as_the_tokens_agree():
    """Where the last token of a context grows by what follows, it is scored with it."""
    merged = types.SimpleNamespace(encode=lambda written: np.array({"ab": [7, 8], "abc": [7, 9], "x": [1], "xy": [1, 2], "q": [5, 6], "q.": [5]}[written], np.int32))
    request = scoring.request_of(merged, ("ab", "c"))
    assert (request.context.tolist(), request.target.tolist()) == ([7], [9])
    request = scoring.request_of(merged, ("x", "y"))
    assert (request.context.tolist(), request.target.tolist()) == ([1], [2])
    assert scoring.request_of(merged, ("q", ".")).target.tolist() == []


def test_without_a_first_token_the_first_one_is_not_scored(text):
    run, params = made("concat", text, objective__boundaries="false")
    assert scoring.start_token(run) is None
    [scored] = scoring.log_likelihoods(run, params, ["word"], batch_size=ROWS)
    x = run.tokenizer.encode("word")
    np.testing.assert_allclose(scored.log_probs, plain_scores(run, params, x), rtol=1e-4, atol=1e-4)


def test_pseudo_log_likelihoods_are_those_of_one_mask_at_a_time(encoder):
    run, params = encoder
    t, written = run.tokenizer, ["every model", "of"]
    for text_, scored in zip(written, scoring.log_likelihoods(run, params, written, batch_size=ROWS), strict=True):
        x = t.encode(text_)
        rows = [row_of(np.concatenate([[t.cls_id], np.where(np.arange(len(x)) == n, t.mask_id, x), [t.sep_id]]), 16) for n in range(len(x))]
        batch = {name: jnp.asarray(np.stack([row[name] for row in [*rows, *rows[:1] * (11 - len(x))]]), jnp.int32) for name in rows[0]}
        expected = np.asarray(plain(run.model, "mlm")(params, batch))[np.arange(len(x)), np.arange(len(x)) + 1, x]
        np.testing.assert_allclose(scored.log_probs, expected, rtol=1e-4, atol=1e-4)
        assert scored.tokens.tolist() == x.tolist()


def rows_of_masks(written, *, by_word, length=12, context=()):
    scorer = scoring.OneMasked({"L": length}, tokenizer=zoo.Vocabulary(), head="mlm", by_word=by_word)
    request = scoring.Request(np.array(context, np.int32), np.array(written, np.int32))
    return [(" ".join("?" if token == 4 else str(token) for token in row["tokens_BL"]), int(row["place_B"]), int(row["target_B"])) for row in scorer.rows(request)]


def test_golden_masks():
    """The words are 12 13 14, 15 and 18 19; of a word what follows the token is masked with it, if asked for. The context is not scored."""
    assert rows_of_masks([12, 13, 15], by_word=False) == [("5 ? 13 15 6", 1, 12), ("5 12 ? 15 6", 2, 13), ("5 12 13 ? 6", 3, 15)]
    found = rows_of_masks([12, 13, 14, 15, 18, 19], by_word=True)
    assert found[0] == ("5 ? ? ? 15 18 19 6", 1, 12) and found[2] == ("5 12 13 ? 15 18 19 6", 3, 14) and found[4] == ("5 12 13 14 15 ? ? 6", 5, 18)
    assert rows_of_masks([15, 16], by_word=False, context=[12, 13]) == [("5 12 13 ? 16 6", 3, 15), ("5 12 13 15 ? 6", 4, 16)]


def test_long_texts_are_masked_in_pieces():
    found = rows_of_masks(list(range(8, 16)), by_word=False, length=7)
    assert [row[0].split()[1:-1] for row in found[:1]] == [["?", "9", "10", "11", "12"]] and found[5] == ("5 11 12 ? 14 15 6", 3, 13)
    assert [row[2] for row in found] == list(range(8, 16))


def test_a_continuation_of_what_the_encoder_read(encoder_decoder):
    """By the plain model: the encoder reads context and end token, the decoder begins with padding. A text alone is refused."""
    run, params = encoder_decoder
    t = run.tokenizer
    [scored] = scoring.log_likelihoods(run, params, [("more text", " than it")], batch_size=ROWS)
    inputs, target = np.append(t.encode("more text"), t.eos_id), t.encode(" than it")
    batch = {
        "inputs_BI": inputs[None], "input_segments_BI": np.ones((1, len(inputs)), np.int32), "tokens_BL": np.append(t.pad_id, target[:-1])[None],
        "segments_BL": np.ones((1, len(target)), np.int32), "positions_BL": np.arange(len(target))[None],
    }  # fmt: skip
    log_probs = np.asarray(plain(run.model, "lm")(params, jax.tree.map(jnp.asarray, batch)))[0]
    np.testing.assert_allclose(scored.log_probs, log_probs[np.arange(len(target)), target], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="scores what follows a context"):
        list(scoring.log_likelihoods(run, params, ["alone"], batch_size=ROWS))


def test_a_prefix_sees_itself_whole():
    """Under the prefix mask the context is marked, in every window."""
    scorer = scoring.LeftToRight({"L": 6}, stride=3, start=1, mask="prefix", head="lm")
    found = list(scorer.rows(scoring.Request(np.array([10, 11]), np.array([12, 13, 14, 15, 16]))))
    assert [row["tokens_BL"].tolist() for row in found] == [[1, 10, 11, 12, 13, 14], [10, 11, 12, 13, 14, 15]]
    assert [row["prefix_BL"].tolist() for row in found] == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]


# Evals.


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return f"jsonl:{path}"


def measured(made_run, options):
    run, params = made_run
    EVALS[options.name].require(options, run=run)
    return EVALS[options.name].evaluate(options, run=run, params=params)


def test_perplexity(decoder, tmp_path):
    """Nats over tokens, bytes and words of two documents, one of two lines."""
    (tmp_path / "a.txt").write_text("under the word\nseen", encoding="utf-8")
    (tmp_path / "b.txt").write_text("small é", encoding="utf-8")
    options = perplexity.Config(source=(f"text:{tmp_path}/*.txt",), document="file", count_lines=True)
    found = measured(decoder, options)
    nats = [-scored.total for scored in scoring.log_likelihoods(*decoder, ["under the word\nseen", "small é"], batch_size=ROWS)]
    assert [row["nats"] for row in found.predictions] == pytest.approx(nats) and [row["id"] for row in found.predictions] == ["a.txt:1", "b.txt:1"]
    total, m = sum(nats), found.metrics
    assert (m["tokens"], m["bytes"], m["words"]) == (27, 27, 6 + 3), "one token a byte; six words and three lines"
    assert m["loss"] == pytest.approx(total / 27) and m["perplexity"] == pytest.approx(math.exp(total / 27))
    assert m["bits_per_byte"] == pytest.approx(total / 27 / math.log(2)) and m["word_perplexity"] == pytest.approx(math.exp(total / 9))


def test_a_longer_look_back_changes_scores_where_it_reaches(decoder, tmp_path):
    """A window of 8 tokens sees less than one of 16; a stride of 1 gives every token all that a window holds."""
    source = jsonl(tmp_path / "long.jsonl", {"text": TEXTS[3]})
    losses = {(length, stride): measured(decoder, perplexity.Config(source=(source,), length=length, stride=stride)).metrics["loss"] for length, stride in ((8, 8), (8, 1), (16, 16))}
    assert len({round(loss, 4) for loss in losses.values()}) == 3
    x = np.append(decoder[0].tokenizer.bos_id, decoder[0].tokenizer.encode(TEXTS[3])).astype(np.int32)
    expected = [plain_scores(*decoder, x[max(0, n - 8) : n + 1])[-1] for n in (1, 5, 8, 9, 30, len(x) - 1)]
    [scored] = scoring.log_likelihoods(*decoder, TEXTS[3:4], batch_size=ROWS, length=8, stride=1)
    np.testing.assert_allclose(scored.log_probs[[0, 4, 7, 8, 29, -1]], expected, rtol=1e-4, atol=1e-4)


def test_pseudo_perplexity(encoder, tmp_path):
    source = jsonl(tmp_path / "some.jsonl", {"text": "every model"}, {"text": "of"}, {"text": "left out"})
    found = measured(encoder, pseudo_perplexity.Config(source=(source,), examples=2))
    nats = -sum(scored.total for scored in scoring.log_likelihoods(*encoder, ["every model", "of"], batch_size=ROWS))
    assert found.metrics["tokens"] == 13 and found.metrics["loss"] == pytest.approx(nats / 13, rel=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_minimal_pairs(kind, request, tmp_path):
    """Accuracy by paradigm, and of all; a pair of equal sentences is a miss."""
    model = request.getfixturevalue(kind)
    pairs = {"one": [("a b", "b a"), ("to", "of")], "two": [("seen", "seen")]}
    for name, sentences in pairs.items():
        jsonl(tmp_path / f"{name}.jsonl", *({"sentence_good": good, "sentence_bad": bad} for good, bad in sentences))
    found = measured(model, minimal_pairs.Config(source=(f"jsonl:{tmp_path}/*.jsonl",)))
    totals = [scored.total for scored in scoring.log_likelihoods(*model, ["a b", "b a", "to", "of"], batch_size=ROWS)]
    right = [totals[0] > totals[1], totals[2] > totals[3], False]
    assert [row["prediction"] for row in found.predictions] == right
    assert found.metrics == {
        "accuracy": pytest.approx(sum(right) / 3), "paradigms": pytest.approx(sum(right) / 4), "one/accuracy": sum(right) / 2, "two/accuracy": 0.0, "records": 3.0
    }  # fmt: skip
    limited = measured(model, minimal_pairs.Config(source=(f"jsonl:{tmp_path}/*.jsonl",), examples=1))
    assert [row["id"] for row in limited.predictions] == ["one.jsonl:1", "two.jsonl:1"]


def test_cloze(decoder, tmp_path):
    """The last word of the text, with the space before it, or the field `target`; it is hit if each of its tokens is the likeliest."""
    for record, parts in (({"text": "the word of\n"}, ("the word", " of")), ({"text": "the word ", "target": "of"}, ("the word ", "of"))):
        options = cloze.Config(source=(jsonl(tmp_path / "c.jsonl", record),), columns=tuple(f"{name}={name}" for name in record))
        found = measured(decoder, options)
        [expected] = scoring.log_likelihoods(*decoder, [parts], batch_size=ROWS)
        assert found.metrics == {"accuracy": float(expected.greedy.all()), "perplexity": pytest.approx(math.exp(-expected.total), rel=1e-5), "records": 1.0}
        assert found.predictions == [{"id": "c.jsonl:1", "reference": "of", "prediction": False, "log_likelihood": pytest.approx(expected.total)}]
    with pytest.raises(ConfigError, match="is one word"):
        measured(decoder, cloze.Config(source=(jsonl(tmp_path / "e.jsonl", {"text": "word"}),)))


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_choice(kind, request, tmp_path):
    """By the sum, the mean over tokens or bytes, and by what the question adds."""
    model = request.getfixturevalue(kind)
    choices = ["of", "it", "than a word"]
    records = [{"q": "more text", "choices": choices, "label": n} for n in (0, "than a word")]
    options = choice.Config(source=(jsonl(tmp_path / "q.jsonl", *records),), columns=("text=q", "choices=choices", "label=label"), unconditional="a")
    found = measured(model, options)
    totals = np.array([scored.total for scored in scoring.log_likelihoods(*model, [("more text", " " + c) for c in choices], batch_size=ROWS)])
    alone = np.array([scored.total for scored in scoring.log_likelihoods(*model, [("a", " " + c) for c in choices], batch_size=ROWS)])
    best = {
        "accuracy": totals, "accuracy_per_token": totals / [3, 3, 12], "accuracy_per_byte": totals / [2, 2, 11], "accuracy_unconditional": totals - alone
    }  # fmt: skip
    for name, values in best.items():
        assert found.predictions[0]["chosen"][name] == np.argmax(values)
        assert found.metrics[name] == np.mean([np.argmax(values) == 0, np.argmax(values) == 2]), name
    np.testing.assert_allclose(found.predictions[1]["log_likelihoods"], totals, rtol=1e-5)
    for label, message in ((3, "allowed: 0 to 2, or one of its choices"), ("no", "or one of its choices")):
        bad = choice.Config(source=(jsonl(tmp_path / "bad.jsonl", {**records[0], "label": label}),), columns=options.columns)
        with pytest.raises(ConfigError, match=message):
            measured(model, bad)


REFUSED = {
    "perplexity of an encoder": ("encoder", perplexity.Config(), "use pseudo_perplexity"),
    "perplexity of an encoder-decoder": ("encoder_decoder", perplexity.Config(), "reads from left to right, which t5 is not"),
    "blanks of a decoder": ("decoder", pseudo_perplexity.Config(), "fills blanks, which gpt is not"),
    "blanks of an encoder-decoder": ("encoder_decoder", pseudo_perplexity.Config(), "fills blanks, which t5 is not"),
    "cloze of an encoder": ("encoder", cloze.Config(), "writes on from a text, which bert is not"),
    "pairs of an encoder-decoder": ("encoder_decoder", minimal_pairs.Config(source=("jsonl:x",)), "scores sentences alone"),
    "too long a window": ("decoder", perplexity.Config(length=17), "length=17 is more than the model has positions, 16"),
    "too long a stride": ("decoder", perplexity.Config(stride=17), "stride=17 is more than the length of a window"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case, request):
    kind, options, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        measured(request.getfixturevalue(kind), options)


@pytest.mark.parametrize(("family", "message"), [("electra", "only the small generator models language"), ("xlnet", "needs a language model with the head mlm")])
def test_families_that_score_nothing_are_refused(family, message):
    objective = zoo.objective(zoo.HOME[family], family)
    options = types.SimpleNamespace(objective=types.SimpleNamespace(name=zoo.HOME[family]), data=Data())
    run = types.SimpleNamespace(model=zoo.model(family), objective=objective, tokenizer=zoo.Vocabulary(), config=options)
    with pytest.raises(ConfigError, match=message):
        scoring.scorer_of(run, name="this")


def test_an_encoder_that_was_trained_left_to_right_is_scored_so(text):
    """BERT under the causal mask, as in its ablation."""
    model = bert.BertConfig(**runs.SHAPE, max_length=16)
    made_config = config.base(model=model, objective=causal.Config(), data=Data(source=(f"text:{text}",), length=16), tokenizer=Tokenizer(kind="bytes"))
    run = run_lib.setup(made_config, devices=jax.devices()[:1])
    assert isinstance(scoring.scorer_of(run, name="this"), scoring.LeftToRight)


def test_missing_sources_and_columns_are_told(decoder, tmp_path):
    source = jsonl(tmp_path / "p.jsonl", {"sentence_good": "a"})
    with pytest.raises(ConfigError, match="sentence_bad"):
        measured(decoder, minimal_pairs.Config(source=(source,)))
    with pytest.raises(ConfigError, match="allowed: a list of two texts or more"):
        measured(decoder, choice.Config(source=(source,), columns=("text=sentence_good",)))
    wrong = config.base(model=gpt.Config(), objective=causal.Config(), evals={"blimp": minimal_pairs.Config(source=("x.jsonl",))})
    with pytest.raises(ConfigError, match="evals.blimp.source=x.jsonl: 'x.jsonl' is not of the form FORMAT:PATH"):
        registry.resolve(wrong)

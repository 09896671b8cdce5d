"""Generation: the cache against the full pass, beams against sums of log-probabilities, draws against their distribution, and text in and out."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from ptm import fields, models, text
from ptm.fields import ConfigError
from ptm.generate import processors
from ptm.generate import search as search_lib
from ptm.generate.options import Options
from ptm.generate.search import Search
from ptm.generate.text import Completion, Frame, complete, frame_of, stream
from ptm.models import gpt, t5
from ptm.nn.context import Context

NEW, END, PAD, VOCAB = 6, 9, 0, 44  # the zoo's table has 48 rows: four that stand for no piece
FAMILIES = ("gpt", "llama", "t5")
LENGTHS = (7, 2, 5, 7)
generate = zoo.jit(search_lib.generate, static_argnames=("model", "options", "new_tokens", "eos_id", "pad_id", "vocab_size"))


def model_of(family: str):
    return zoo.model(family, heads=("lm",)), zoo.params(family, ("lm",))


def prompts(family: str, *, prefix: bool = False) -> dict[str, np.ndarray]:
    """Ragged prompts: a decoder's are padded on the left, an encoder's on the right."""
    rng = np.random.default_rng(1)
    tokens, rows = rng.integers(10, 40, (len(LENGTHS), 7)).astype(np.int32), np.array(LENGTHS)[:, None]
    if family.startswith("t5"):
        real = (np.arange(7) < rows).astype(np.int32)
        start = np.zeros((len(LENGTHS), 1), np.int32)
        return {"inputs_BI": tokens * real, "input_segments_BI": real, "tokens_BL": start, "segments_BL": start + 1, "positions_BL": start}
    real = (np.arange(7) >= 7 - rows).astype(np.int32)
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    return {"tokens_BL": tokens * real, "segments_BL": real, "positions_BL": positions, **({"prefix_BL": real} if prefix else {})}


GREEDY_SEARCH = Options()


def search(family: str, batch, options: Options = GREEDY_SEARCH, *, end: int | None = END, new: int = NEW, seed: int = 0):
    """Texts [B, N, new] and their scores."""
    made = generate(*model_of(family), batch, options=options, new_tokens=new, eos_id=end, pad_id=PAD, vocab_size=VOCAB, rng=jax.random.key(seed))
    return tuple(map(np.asarray, made))


@functools.cache
def whole(family: str, mask: str):
    """A function that gives log-probabilities over the vocabulary at every position of a batch of whole rows, without a cache."""
    model, params = model_of(family)

    @zoo.jit
    def run(batch):
        out = model.decode(params, batch, model.encode(params, batch)) if "inputs_BI" in batch else model.hidden(params, batch, mask=mask)
        return jax.nn.log_softmax(processors.only(model.logits(params, out.hidden_BLD, head="lm"), vocab_size=VOCAB))

    return run


def log_probabilities(family: str, batch, texts: np.ndarray) -> np.ndarray:
    """Log-probabilities [B, NEW, V] before each token of one text a row, by full passes; rows are the prompts with the texts behind them."""
    size = texts.shape[1]
    begins = batch["tokens_BL"].shape[1]
    ones = np.ones_like(texts)
    row = {**batch, "tokens_BL": np.concatenate([batch["tokens_BL"], texts], axis=1), "segments_BL": np.concatenate([batch["segments_BL"], ones], axis=1)}
    row["positions_BL"] = np.concatenate([batch["positions_BL"], batch["positions_BL"][:, -1:] + 1 + np.arange(size)], axis=1).astype(np.int32)
    if "prefix_BL" in batch:
        row["prefix_BL"] = np.concatenate([batch["prefix_BL"], 0 * ones], axis=1)
    return np.asarray(whole(family, "prefix" if "prefix_BL" in batch else "causal")(row))[:, begins - 1 : -1]


def cut(row: np.ndarray, end: int | None = END) -> list[int]:
    """A text with its end token."""
    ends = np.flatnonzero(row == end)
    return row[: ends[0] + 1].tolist() if len(ends) else row.tolist()


@pytest.mark.parametrize(("family", "prefix"), [*((family, False) for family in FAMILIES), ("gpt", True)])
def test_greedy_tokens_are_the_likeliest_of_the_full_pass(family, prefix):
    """Of ragged prompts at once, from a cache; each score is the sum of the text's log-probabilities by its length. Ids past the vocabulary never come."""
    batch = prompts(family, prefix=prefix)
    texts, scores = search(family, batch, end=None)
    logp = log_probabilities(family, batch, texts[:, 0])
    np.testing.assert_array_equal(np.argmax(logp, axis=-1), texts[:, 0])
    taken = np.take_along_axis(logp, texts[:, 0, :, None], axis=-1)
    np.testing.assert_allclose(scores[:, 0], np.mean(taken[..., 0], axis=1), atol=2e-5)
    assert texts.max() < VOCAB


BEAMS = Options(beams=3, n_best=3)


@pytest.mark.parametrize(("family", "options"), [("gpt", BEAMS), ("t5", BEAMS), ("llama", Options(temperature=1.0, n_best=2))])
def test_a_ragged_batch_equals_its_rows_one_by_one(family, options):
    """Padding is seen by no one, and a row's draws come from its own key."""
    batch, keys = prompts(family), jax.random.split(jax.random.key(0), len(LENGTHS))
    run = functools.partial(generate, *model_of(family), options=options, new_tokens=NEW, eos_id=END, pad_id=PAD, vocab_size=VOCAB)
    together, scores = run(batch, rng=keys)
    row, size = 1, LENGTHS[1]
    cuts = {name: slice(0, size) if name.endswith("_BI") else slice(-size, None) for name in batch}
    alone, score = run({name: value[row : row + 1, cuts[name]] for name, value in batch.items()}, rng=keys[row : row + 1])
    np.testing.assert_array_equal(together[row], alone[0])
    np.testing.assert_allclose(scores[row], score[0], atol=1e-5)


def best_texts(family: str, batch, *, beams: int, penalty: float, early: bool, new: int) -> list[list[tuple[float, list[int]]]]:
    """Beam search by its definition, with lists and full passes: the (score, text) of each row, best first."""
    rows = len(batch["tokens_BL"])
    running = [[(0.0, [])] for _ in range(rows)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(rows)]
    open_ = [True] * rows
    for size in range(1, new + 1):
        step = np.zeros((rows, beams, VOCAB), np.float64)
        for slot in range(beams):
            texts = np.zeros((rows, new), np.int32)
            for row in range(rows):
                texts[row, : size - 1] = running[row][min(slot, len(running[row]) - 1)][1]
            step[:, slot] = log_probabilities(family, batch, texts)[:, size - 1, :VOCAB]
        for row in range(rows):
            longer = ((score + step[row, slot, v], [*tokens, v]) for slot, (score, tokens) in enumerate(running[row]) for v in range(VOCAB))
            ranked = sorted(longer, reverse=True)
            best = ranked[: 2 * beams]
            over = [text[-1] == END or size == new for _, text in best]
            full = early and len(ended[row]) >= beams
            if open_[row] and not full:
                ended[row] += [(score / size**penalty, text) for (score, text), end in list(zip(best, over))[:beams] if end]
                ended[row] = sorted(ended[row], key=lambda item: -item[0])[:beams]
            running[row] = [item for item, end in zip(best, over) if not end][:beams] or running[row]
            if len(ended[row]) >= beams and running[row][0][0] / size**penalty <= ended[row][-1][0]:
                open_[row] = False
    return ended


@pytest.mark.parametrize(("penalty", "early"), [(1.0, False), (-0.5, True), (2.0, False)])
def test_beams_follow_their_definition(penalty, early):
    """All texts of all rows and their scores are those of plain lists and full passes; some end early, some at the last token."""
    batch = prompts("gpt")
    options = Options(beams=3, n_best=3, length_penalty=penalty, early_stopping=early)
    texts, scores = search("gpt", batch, options)
    expected = best_texts("gpt", batch, beams=3, penalty=penalty, early=early, new=NEW)
    assert [[cut(text) for text in row] for row in texts] == [[text for _, text in row] for row in expected]
    np.testing.assert_allclose(scores, [[score for score, _ in row] for row in expected], atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_scores_of_beams_are_sums_of_log_probabilities(family):
    """Of families with windows and rotary positions, and with relative buckets: beams share the keys of their prompt, and each sees its own tokens alone."""
    batch = prompts(family)
    texts, scores = search(family, batch, Options(beams=4, n_best=4, length_penalty=0.0))
    for place in range(4):
        logp = log_probabilities(family, batch, texts[:, place])
        sums = [sum(logp[row, n, token] for n, token in enumerate(cut(text))) for row, text in enumerate(texts[:, place])]
        np.testing.assert_allclose(scores[:, place], sums, atol=5e-5)
    assert np.all(np.diff(scores, axis=1) <= 0) and all(len({tuple(text) for text in row}) == 4 for row in texts)


@pytest.mark.parametrize(("family", "mesh"), [("llama", {"data": 2, "fsdp": 2, "tensor": 2}), ("t5", {"preset": "sp", "data": 2, "tensor": 2, "sequence": 2})])
def test_texts_of_split_models_are_the_same(family, mesh):
    """Rows, heads and the vocabulary over eight devices; the one position of a step cannot be split, as those of a row that is trained on are."""
    on, options = zoo.layout(**mesh), Options(beams=4, n_best=4, length_penalty=0.0)
    model, params = zoo.model(family, heads=("lm",), on=on), zoo.params(family, ("lm",))
    params, batch = jax.device_put(params, on.parameters(params)), jax.device_put(prompts(family), on.batch())
    run = functools.partial(search_lib.generate, model, options=options, new_tokens=NEW, eos_id=END, pad_id=PAD, vocab_size=VOCAB, rng=jax.random.key(0))
    texts, scores = zoo.jit(run, out_shardings=on.replicated())(params, batch)
    expected = search(family, prompts(family), options)
    np.testing.assert_array_equal(texts, expected[0])
    np.testing.assert_allclose(scores, expected[1], atol=1e-5)


def test_texts_end_and_are_filled_up():
    """After the end token there is padding, and the end token does not come before `min_new_tokens`."""
    batch = prompts("gpt")
    free, _ = search("gpt", batch, end=None)
    end = int(free[0, 0, 2])  # a text that goes on past it
    texts, scores = search("gpt", batch, end=end)
    first = int(np.argmax(free[0, 0] == end))
    assert texts[0, 0].tolist() == [*free[0, 0, : first + 1], *[PAD] * (NEW - first - 1)]
    logp = log_probabilities("gpt", batch, free[:, 0])
    np.testing.assert_allclose(scores[0, 0], np.mean([logp[0, n, free[0, 0, n]] for n in range(first + 1)]), atol=2e-5)
    assert not np.any(search("gpt", batch, Options(beams=2, min_new_tokens=5), end=end)[0][:, :, :4] == end)


def test_rows_that_fill_up_a_batch_end_the_search():
    batch = prompts("gpt")
    filled = {name: value * (np.arange(len(LENGTHS)) < 2)[:, None] for name, value in batch.items()}
    for options in (Options(), BEAMS):
        (texts, _), (expected, _) = search("gpt", filled, options), search("gpt", batch, options)
        np.testing.assert_array_equal(texts[:2], expected[:2])
        assert np.all(texts[2:] == PAD)


def test_frequencies_of_draws():
    """Draws come as often as the processed distribution says, within five standard deviations, and nothing comes that it rules out."""
    family, count = "gpt", 2048
    one = {name: value[:1] for name, value in prompts(family).items()}
    batch = {name: np.repeat(value, count, axis=0) for name, value in one.items()}
    logp = log_probabilities(family, one, np.zeros((1, 1), np.int32))[:, 0]
    for options in (Options(temperature=0.7), Options(temperature=2.0, top_k=20, top_p=0.6), Options(temperature=1.5, min_p=0.2)):
        processed = functools.partial(processors.process, options=options, history_BT=None, valid_BT=None, count=7, made=0, eos_id=None)
        wanted = np.asarray(zoo.jit(lambda logits, processed=processed: jax.nn.softmax(processed(logits)))(logp))[0]
        drawn = np.bincount(search(family, batch, options, new=1)[0][:, 0, 0], minlength=len(wanted)) / count
        assert np.all(np.abs(drawn - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / count)), options
        assert np.count_nonzero(wanted) > 1 and (options.temperature == 0.7 or np.count_nonzero(wanted) < VOCAB)


def test_processors_by_hand():
    """logits 3 2 1 -1 of the pieces 0 to 3, after the text 1 3 1 behind a place of padding that holds piece 2."""
    logits, history, valid = jnp.asarray([[3.0, 2.0, 1.0, -1.0]]), jnp.asarray([[2, 1, 3, 1, 0]]), jnp.asarray([[False, True, True, True, False]])
    no, everything = -np.inf, [3.0, 2.0, 1.0, -1.0]
    shares = np.exp(everything) / np.sum(np.exp(everything))  # 0.66 0.24 0.09 0.01

    @zoo.jit
    def run():
        return {
            "penalty": processors.penalise_repetition(logits, history, valid, penalty=2.0),
            "top_k": processors.keep_top_k(logits, k=2), "min_p": processors.keep_min_p(logits, p=0.2), "only": processors.only(logits, vocab_size=3),
            "top_p of some": processors.keep_top_p(jnp.asarray([[no, -2.0, -2.5, -5.0]]), p=0.9),
            **{f"{size}-grams": processors.ban_ngrams(logits, history, valid, count=4, size=size) for size in (1, 2, 3, 9)},
            **{f"top {p}": processors.keep_top_p(logits, p=p) for p in (0.5, shares[0] - 1e-3, shares[0] + 1e-3, 0.95, 0.995)},
        }  # fmt: skip

    expected = {
        "penalty": [3.0, 1.0, 1.0, -2.0], "top_k": [3.0, 2.0, no, no], "min_p": [3.0, 2.0, no, no], "only": [3.0, 2.0, 1.0, no],
        "top_p of some": [no, -2.0, -2.5, no], "1-grams": [3.0, no, 1.0, no], "2-grams": [3.0, 2.0, 1.0, no], "3-grams": everything, "9-grams": everything,
        "top 0.5": [3.0, no, no, no], f"top {shares[0] - 1e-3}": [3.0, no, no, no], f"top {shares[0] + 1e-3}": [3.0, 2.0, no, no],
        "top 0.95": [3.0, 2.0, 1.0, no], "top 0.995": everything,
    }  # fmt: skip
    assert {name: value[0].tolist() for name, value in run().items()} == expected


def test_repetition_is_ruled_out():
    """No pair of tokens comes twice, the prompt's among them; without the option some do."""
    batch = prompts("gpt")

    def pairs(row: int, text: np.ndarray) -> list[tuple[int, int]]:
        return list(itertools.pairwise([*batch["tokens_BL"][row][7 - LENGTHS[row] :], *text]))

    def repeats(options: Options) -> int:
        texts = search("gpt", batch, options, end=None, new=24)[0][:, 0]
        return sum(len(found) - len(set(found)) for found in (pairs(row, text) for row, text in enumerate(texts)))

    assert repeats(Options()) > 0
    assert repeats(Options(no_repeat_ngram=2, beams=2)) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"beams": 4, "temperature": 0.5}, "beams=4 looks for.*set beams=1 or temperature=0"),
        ({"top_k": 5, "top_p": 0.5}, "top_k=5, top_p=0.5 has no meaning where nothing is drawn; set temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 leaves no piece"),
        ({"early_stopping": True}, "early_stopping=true needs beam search"),
        ({"n_best": 3}, "n_best=3 exceeds the 1 text that there is; set beams=3"),
        ({"beams": 2, "n_best": 3}, "n_best=3 exceeds the 2 texts"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 exceeds"),
        ({"stop": ("a", "")}, "stop holds an empty text"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range"),
    ],
)
def test_contradictions_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        fields.check(Options(**options), "")


# ----- text


TEXTS = ["a", "The quick", "Ub", "b"]
TOKENIZER = text.make("chars", texts=["".join(TEXTS), "abcdefghijklmnopqrstuvwxyz0"], specials=True)
BYTES = text.make("bytes")
SHAPE = {"num_layers": 1, "width": 16, "num_heads": 2, "vocab_size": BYTES.vocab_size, "dropout": 0.0, "tie_embeddings": False}
ENDS = {"eos_id": TOKENIZER.eos_id, "pad_id": TOKENIZER.pad_id, "vocab_size": TOKENIZER.vocab_size}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Searches compiled without optimisation."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("start", "go_on", "result"):
            patch.setattr(search_lib, name, zoo.jit(getattr(Search, name), static_argnames="self"))
        yield


@functools.cache
def writer(family: str):
    """A model whose texts are varied; its end token seldom comes."""
    config = gpt.Config(**SHAPE, max_length=48) if family == "gpt" else t5.Config(**SHAPE, head_dim=8, mlp_width=32, num_buckets=8, max_distance=20)
    model = models.make(config, context=Context(zoo.layout()), heads=("lm",))
    lengths = {"L": 4, "I": 4} if family == "t5" else {"L": 4}
    params = zoo.jit(functools.partial(model.init, lengths=lengths))(jax.random.key(3))
    return model, jax.tree.map(lambda leaf: leaf * (1.0 if leaf.ndim == 1 or family == "t5" else 30.0), params)


made = functools.partial(complete, *writer("gpt"), TOKENIZER)
DRAWN, GREEDY = Options(temperature=1.0, max_new_tokens=24), Options(max_new_tokens=24)


def test_order_and_batches_do_not_matter():
    """Prompts of all lengths come back in their order, and what each gets is what it gets alone with its number."""
    together = [one for (one,) in made(TEXTS, options=DRAWN, batch_size=2)]
    assert len(together) == len(TEXTS) == len({one.text for one in together})
    for n, (one,) in enumerate(made(iter(TEXTS), options=DRAWN, batch_size=8)):
        assert one[:2] == together[n][:2] and abs(one.score - together[n].score) < 1e-5
    ((_,), (_,), (alone,)) = made(["-", "-", "Ub"], options=DRAWN, batch_size=1)
    assert alone.tokens == together[2].tokens
    ((other,),) = made(["a"], options=dataclasses.replace(DRAWN, seed=1), batch_size=1)
    assert other.tokens != together[0].tokens


def test_prompts_are_read_as_continuations_are_taken():
    taken = []
    source = (taken.append(prompt) or prompt for prompt in itertools.repeat("a"))
    assert isinstance(next(made(source, options=GREEDY, batch_size=1))[0], Completion)
    assert len(taken) <= 8


def test_a_text_ends_at_a_stop_text():
    """It is cut before the earliest stop, and the search ends there; the end token is no part of the text."""
    ((free,),) = made(["Ub"], options=GREEDY)
    assert free.ended == "length" and len(free.tokens) == 24 and TOKENIZER.decode(free.tokens) == free.text
    stops = (free.text[13:17], free.text[5:8])
    ((stopped,),) = made(["Ub"], options=dataclasses.replace(GREEDY, stop=stops))
    assert stopped.text == free.text[:5] and stopped.ended == "stop" and len(stopped.tokens) == 16 and free.text.index(stops[0]) > 5
    ((ended,),) = complete(*writer("gpt"), Ended(free.tokens[9]), ["Ub"], options=GREEDY)
    first = free.tokens.index(free.tokens[9])
    assert ended.tokens == free.tokens[:first] and ended.ended == "end"


class Ended:
    """The tokenizer with another end token."""

    def __init__(self, eos_id: int) -> None:
        self.eos_id = eos_id

    def __getattr__(self, name: str):
        return getattr(TOKENIZER, name)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTES], ids=["chars", "bytes"])
def test_a_stream_is_the_text_in_pieces(tokenizer):
    """Over bytes, too, most of which are no text: a character is shown once its last byte is there."""
    ((free,),) = complete(*writer("gpt"), tokenizer, ["Ub"], options=GREEDY)
    pieces = list(stream(*writer("gpt"), tokenizer, "Ub", options=GREEDY, every=3))
    assert "".join(pieces) == free.text and len(pieces) > 3
    if tokenizer is TOKENIZER:
        stop = free.text[7:10]
        stopped = list(stream(*writer("gpt"), tokenizer, "Ub", options=dataclasses.replace(GREEDY, stop=(stop,)), every=2))
        assert "".join(stopped) == free.text[: free.text.index(stop)]
    with pytest.raises(ConfigError, match="one text can be shown"):
        next(stream(*writer("gpt"), tokenizer, "Ub", options=Options(beams=2)))


def test_texts_are_framed_as_in_training():
    """A decoder's begin with bos; an encoder-decoder's inputs end with eos, and its outputs begin with pad."""
    ids = TOKENIZER.encode("Ub").tolist()
    assert frame_of(writer("gpt")[0], TOKENIZER) == Frame(before=(TOKENIZER.bos_id,))
    assert frame_of(writer("t5")[0], TOKENIZER) == Frame(behind=(TOKENIZER.eos_id,), start=TOKENIZER.pad_id)
    framed = np.array([[TOKENIZER.bos_id, *ids]], np.int32)
    batch = {"tokens_BL": framed, "segments_BL": np.ones_like(framed), "positions_BL": np.arange(3, dtype=np.int32)[None]}
    texts, scores = generate(*writer("gpt"), batch, options=Options(), new_tokens=24, **ENDS, rng=jax.random.key(0))
    ((one,),) = made(["Ub"], options=GREEDY)
    assert one.tokens == texts[0, 0].tolist() and abs(one.score - scores[0, 0]) < 1e-5
    framed = np.array([[*ids, TOKENIZER.eos_id]], np.int32)
    start = np.full((1, 1), TOKENIZER.pad_id, np.int32)
    batch = {"inputs_BI": framed, "input_segments_BI": np.ones_like(framed), "tokens_BL": start, "segments_BL": start * 0 + 1, "positions_BL": start * 0}
    options = Options(beams=2, max_new_tokens=9)
    texts, _ = generate(*writer("t5"), batch, options=options.on_device(), new_tokens=9, **ENDS, rng=jax.random.key(0))
    (_, (one,)) = complete(*writer("t5"), TOKENIZER, ["a", "Ub"], options=options)
    assert one.tokens == cut(texts[0, 0], TOKENIZER.eos_id)[: len(one.tokens)] and len(one.tokens) in (9, len(cut(texts[0, 0], TOKENIZER.eos_id)) - 1)


def test_a_prompt_that_is_too_long(caplog):
    """48 positions hold 23 tokens beside bos and 24 new ones; what is cut is the beginning."""
    long = "n" * 10 + "abcdefghijklmnopqrstuvw"
    with pytest.raises(ConfigError, match="prompt 2 has 33 tokens; 23 fit beside max_new_tokens=24 in 48 positions.*too_long=cut"):
        list(made(["a", long], options=GREEDY))
    shorter = dataclasses.replace(GREEDY, too_long="cut")
    assert next(made([long], options=shorter)) == next(made([long[10:]], options=shorter)) and "cut at its beginning" in caplog.text
    with pytest.raises(ConfigError, match="max_new_tokens=64 does not fit the 48 positions.*up to 47"):
        next(made(["a"], options=Options()))


def test_models_that_do_not_write_are_refused():
    bert = zoo.model("xlnet", heads=("lm",))
    with pytest.raises(ConfigError, match="xlnet is an encoder.*needs a decoder or an encoder-decoder"):
        next(complete(bert, zoo.params("xlnet", ("lm",)), TOKENIZER, ["a"], options=Options()))
    with pytest.raises(ConfigError, match="gpt has no language-model head"):
        next(complete(zoo.model("gpt", heads=("classify:2",)), {}, TOKENIZER, ["a"], options=Options()))

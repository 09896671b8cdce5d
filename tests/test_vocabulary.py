"""Vocabularies that grow: where added pieces are found in a text, and the rows that they begin with in a model that goes on."""

import functools
import json

import jax
import numpy as np
import pytest
import runs
import zoo

from ptm import convert, growth, parallel, run, specs, text, tree, weights
from ptm.fields import ConfigError
from ptm.growth import Growth

CORPUS = ["The cov vid of nai ve man has a hear t 新 冠 病 atta ck ! vidien"] * 3


# Tokenizers.


def _named(tokenizer: text.Tokenizer, string: str) -> str:
    return "|".join(tokenizer.pieces(tokenizer.encode(string)))


def test_the_longest_piece_at_the_leftmost_place_is_found():
    tokenizer = text.make("bytes").extended(["immune", " immune", "immune system", "mm"])
    assert _named(tokenizer, "an immune system, immune systems mmm") == "a|n| immune| |s|y|s|t|e|m|,| immune| |s|y|s|t|e|m|s| |mm|m"
    assert _named(tokenizer, "(immune system)") == "(|immune system|)"
    assert tokenizer.decode(tokenizer.encode("an immune system")) == "an immune system"
    assert tokenizer.token_bytes[tokenizer.encode("an immune system")].sum() == len("an immune system")


def test_word_pieces_gain_whole_words_whatever_their_case():
    tokenizer = text.make("wordpiece", texts=CORPUS, vocab_size=60, lowercase=True).extended(["Covid", "heart attack", "新冠", "naïve"])
    ids = tokenizer.encode("The COVID, covidien NAÏVE heart  attack heart attack! 新冠病")
    assert "|".join(tokenizer.pieces(ids)) == "the|covid|[UNK]|cov|##id|##ien|naive|hear|##t|[UNK]|heart attack|!|新冠|病"
    assert tokenizer.decode(ids[-4:]) == "heart attack!新冠病"
    assert tokenizer.word_starts(ids)[:7].tolist() == [True, True, True, True, False, False, True]


@pytest.mark.parametrize("kind", ["bytes", "chars", "sentencepiece", "bpe", "wordpiece"])
def test_an_extended_tokenizer_keeps_what_it_had(kind, tmp_path):
    """Ids, sentinels and the text without new pieces; two extensions can be taken back one by one, and all is saved."""
    options = {"vocab_size": 300} if kind in ("sentencepiece", "bpe") else {"vocab_size": 50} if kind == "wordpiece" else {}
    corpus = CORPUS * 20 if kind != "sentencepiece" else [f"{word} {n}" for n in range(60) for word in CORPUS[0].split()]
    made = text.make(kind, texts=corpus, sentinels=3, **options)
    once = made.extended(["zyx", "has a"])
    twice = once.extended(["of man"])
    assert twice.vocab_size == made.vocab_size + 3 and twice.num_added == 3 and twice.sentinels == made.sentinels
    assert twice.pieces(range(made.vocab_size, twice.vocab_size)) == ["zyx", "has a", "of man"]
    plain = "The man of the vid"
    assert twice.encode(plain).tolist() == made.encode(plain).tolist() and twice.special_ids == made.special_ids
    assert twice.earlier().fingerprint == once.fingerprint and once.earlier().fingerprint == made.fingerprint and made.earlier() is None
    assert len({made.fingerprint, once.fingerprint, twice.fingerprint, made.extended(["has a", "zyx"]).fingerprint}) == 4
    twice.save(str(tmp_path))
    loaded, told = text.load(str(tmp_path)), "a zyx that has a hear of man zyx"
    assert loaded.fingerprint == twice.fingerprint and loaded.encode(told).tolist() == twice.encode(told).tolist()
    assert [i for i in loaded.encode(told) if i >= made.vocab_size] == [made.vocab_size, made.vocab_size + 1, made.vocab_size + 2, made.vocab_size]
    if kind != "wordpiece":
        assert loaded.decode(loaded.encode("a zyx has a man")) == "a zyx has a man"


def test_a_tokenizer_json_is_extended_too(tmp_path):
    made = text.make("bpe", texts=CORPUS * 20, vocab_size=300)
    published = text.make("file", path=str(_library_file(made, tmp_path))).extended([" zyx"])
    assert published.pieces(published.encode("man zyxw"))[-2:] == [" zyx", "w"]
    assert published.encode("man has").tolist() == made.encode("man has").tolist()


def _library_file(made: text.Tokenizer, folder):
    path = folder / "tokenizer.json"
    path.write_text(made._pipeline.to_str(), encoding="utf-8")
    return path


def test_pieces_come_from_a_file_and_are_checked(tmp_path):
    path = tmp_path / "pieces.txt"

    def refusal(content: str, kind: str = "bytes", **options) -> str:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError) as raised:
            text.make(kind, extra=str(path), **options)
        return str(raised.value)

    assert "'a' is in the vocabulary already, as 'a'" in refusal("zyx\na\n")
    assert "'zyx' is in the vocabulary already" in refusal("zyx\nzyx\n")
    assert "'Zyx' is in" in refusal("zyx\nZyx\n", "wordpiece", texts=CORPUS, vocab_size=50, lowercase=True).replace("'zyx' is in", "'Zyx' is in")
    assert "text that begins and ends with a word" in refusal(" zyx\n", "wordpiece", texts=CORPUS, vocab_size=50)
    assert "is empty" in refusal("\n")
    with pytest.raises(ConfigError, match="is no file"):
        text.make("bytes", extra=str(tmp_path))
    path.write_text(" zyx\r\n\r\nabc", encoding="utf-8")
    assert text.make("bytes", extra=str(path)).pieces([263, 264]) == [" zyx", "abc"]
    damaged = text.make("bytes", extra=str(path))
    damaged.save(str(tmp_path / "saved"))
    (tmp_path / "saved" / "added.json").write_text('[["other"]]')
    with pytest.raises(ConfigError, match="added.json is not the file that was saved"):
        text.load(str(tmp_path / "saved"))


# Tables.


def test_rows_by_hand():
    """Three pieces and two rows of padding become five pieces, of which two are new, and three rows of padding, of which one was there."""
    table = np.array([[1.0, 0], [2, 0], [6, 3], [50, 50], [70, 70]], np.float32)
    grew = Growth(3, (np.array([0, 1]), np.array([2, 2, 1])))
    heads = {"lm_head": {"kernel": table.T.copy()}, "mlm_head": {"bias": table[:, 0].copy()}}
    params = {"token_embed": {"embedding": table}, "position_embed": {"embedding": table}, **heads}
    layout = zoo.layout()

    def wanted(size: int):
        shapes = {"token_embed/embedding": (size, 2), "lm_head/kernel": (2, size), "mlm_head/bias": (size,), "position_embed/embedding": (5, 2)}
        return {path: jax.ShapeDtypeStruct(shape, np.float32, sharding=layout.parameter(path, shape)) for path, shape in shapes.items()}

    grown = growth.grow(params, grew, wanted=wanted(7))
    expected = np.array([[1, 0], [2, 0], [6, 3], [1.5, 0], [14 / 3, 2], [3, 1], [3, 1]], np.float32)
    np.testing.assert_allclose(grown["token_embed"]["embedding"], expected, rtol=1e-6)
    np.testing.assert_allclose(grown["lm_head"]["kernel"], expected.T, rtol=1e-6)
    np.testing.assert_allclose(grown["mlm_head"]["bias"], expected[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(grown["position_embed"]["embedding"], table)
    one_new = growth.grow(params, Growth(3, grew.parts[:1]), wanted=wanted(5))
    np.testing.assert_allclose(one_new["token_embed"]["embedding"], [*expected[:4], table[4]], rtol=1e-6)  # the second row of padding stays


# Runs that go on.

NEW = ("which", " every", "model must", " small")
PLAIN = {"train__microbatches": 1, "train__ema_decay": None, "train__skip_sigma": None, "log__norms": False, "model__dropout": 0.0}
KINDS = {"concat": (), "mlm": (), "spans": (("model__tie_embeddings", "false"), ("model__gated", "true"), ("tokenizer__sentinels", 8))}
TABLES = {
    "concat": {"token_embed/embedding": 0},
    "mlm": {"token_embed/embedding": 0, "mlm_head/bias": 0},
    "spans": {"token_embed/embedding": 0, "lm_head/kernel": 1},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    path = tmp_path_factory.mktemp("extra") / "pieces.txt"
    path.write_text("\n".join(NEW), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """kind -> the workdir of a short run, made once."""
    made = {}

    def of(kind: str):
        if kind not in made:
            workdir = tmp_path_factory.mktemp("trained") / kind
            assert runs.run(_tiny(kind, corpus, train__steps=20, evals__validation__every=20), workdir) == 0
            made[kind] = workdir
        return made[kind]

    return of


def _tiny(kind: str, corpus, **changes):
    return runs.tiny(kind, text=corpus, **dict(KINDS[kind]), **PLAIN, **changes)


def _grown(kind: str, corpus, workdir, extra, **changes):
    return _tiny(kind, corpus, **{"init": f"ckpt:{workdir}", "tokenizer__extra": extra, "model__vocab_size": 280, **changes})


def _set_up(cfg, devices: int = 1):
    return run.setup(cfg, devices=jax.devices()[:devices])


@pytest.mark.parametrize("kind", KINDS)
def test_tables_grow_and_old_predictions_stay(kind, corpus, extra, trained):
    """272 rows become 280: old pieces keep theirs, new ones have the means, and without new pieces in the text the old logits are what they were."""
    workdir = trained(kind)
    this = _set_up(_grown(kind, corpus, workdir, extra))
    params, told = weights.start(this)
    before, saved = weights.load(f"ckpt:{workdir}", devices=jax.devices()[:1])
    old, new = before.tokenizer.vocab_size, this.tokenizer.vocab_size
    assert new == old + len(NEW) and f"grew from {old} to {new} pieces" in told
    flat, kept = tree.paths(params), tree.paths(saved)
    for path, leaf in flat.items():
        if path not in TABLES[kind]:
            np.testing.assert_array_equal(leaf, kept[path], err_msg=path)
            continue
        rows, earlier = (np.moveaxis(np.asarray(x), TABLES[kind][path], 0) for x in (leaf, kept[path]))
        assert len(rows) == 280 and len(earlier) == 272
        np.testing.assert_array_equal(rows[:old], earlier[:old], err_msg=path)
        for piece, row in zip(NEW, rows[old:new]):
            np.testing.assert_allclose(row, earlier[before.tokenizer.encode(piece)].mean(0), atol=1e-6, err_msg=f"{path}: {piece}")
        padding = np.broadcast_to(earlier[:old].mean(0), (280 - max(new, 272), *rows.shape[1:]))
        np.testing.assert_allclose(rows[new:], np.concatenate([earlier[new:], padding]), atol=1e-6)

    batch = next(before.validation(16))

    def logits(made, values):
        def of(values, batch):
            hidden = made.model.hidden(values, batch, mask=made.objective.mask).hidden_BLD
            return made.model.logits(values, hidden, head=made.objective.heads[0])[..., :old]

        return zoo.jit(of)(values, batch)

    np.testing.assert_allclose(logits(this, params), logits(before, saved), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_the_old_loss(kind, corpus, extra, trained, tmp_path):
    """Nats a byte at the first step are nearer to the trained model's than to an untrained one's, and fall further."""
    workdir = trained(kind)
    options = {"train__steps": 8, "evals__validation__every": 1, "optimizer__learning_rate": 3e-3}
    assert runs.run(_grown(kind, corpus, workdir, extra, **options), tmp_path) == 0

    def bits(folder) -> list[float]:
        return [row["validation/bits_per_byte"] for row in map(json.loads, runs.metrics(folder).splitlines()) if "validation/bits_per_byte" in row]

    trained_bits, grown_bits = bits(workdir)[-1], bits(tmp_path)
    scratch = _set_up(_tiny(kind, corpus, tokenizer__extra=extra, model__vocab_size=280))
    untrained = scratch.evaluate("validation", scratch.init_params())["validation/bits_per_byte"]
    assert abs(grown_bits[0] - trained_bits) < 0.5 * abs(grown_bits[0] - untrained), (trained_bits, grown_bits, untrained)
    assert grown_bits[-1] < grown_bits[0]
    resumed = runs.run(_grown(kind, corpus, workdir, extra, **options), tmp_path)
    assert resumed == 0, "a workdir with a grown tokenizer is continued like any other"


def test_tables_grow_on_devices_that_share_them(corpus, extra, trained):
    """263 pieces have no divisor in common with the devices, 280 rows have."""
    workdir = trained("mlm")
    alone = weights.start(_set_up(_grown("mlm", corpus, workdir, extra)))[0]
    spread = _set_up(_grown("mlm", corpus, workdir, extra, mesh__fsdp=2, mesh__tensor=2), devices=8)
    shared = weights.start(spread)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), shared, alone)
    jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding or pytest.fail(f"{leaf.sharding}"), shared, spread.abstract_params)


def test_a_vocabulary_grows_again(corpus, extra, trained, tmp_path):
    """From a checkpoint whose own tokenizer was extended: new pieces are split by it, added pieces included."""
    assert runs.run(_grown("concat", corpus, trained("concat"), extra, train__steps=2), tmp_path / "run") == 0
    (tmp_path / "more.txt").write_text("which every", encoding="utf-8")
    again = _tiny(
        "concat", corpus, init=f"ckpt:{tmp_path / 'run'}", tokenizer__path=tmp_path / "run" / "tokenizer", tokenizer__extra=tmp_path / "more.txt",
        model__vocab_size=None,
    )  # fmt: skip
    this = _set_up(again)
    rows = np.asarray(weights.start(this)[0]["token_embed"]["embedding"])
    old = this.tokenizer.vocab_size - 1
    assert len(rows) == old + 1 == 263 + len(NEW) + 1
    np.testing.assert_allclose(rows[-1], (rows[263] + rows[264]) / 2, atol=1e-6)  # "which" and " every"


def test_other_tokenizers_stay_refused(corpus, extra, trained):
    workdir = trained("concat")
    for changes in ({"tokenizer__sentinels": 1}, {"tokenizer__kind": "chars"}):
        cfg = _grown("concat", corpus, workdir, extra, **changes)
        with pytest.raises(ConfigError, match="(?s)made with another tokenizer.*--config.tokenizer.extra"):
            weights.start(_set_up(cfg))
    shrunk = _tiny("concat", corpus, init=f"ckpt:{workdir}", model__width=32, tokenizer__extra=extra, model__vocab_size=280)
    with pytest.raises(ConfigError, match="does not fit"):
        weights.start(_set_up(shrunk))


def test_a_directory_grows_too(corpus, extra, trained, tmp_path):
    """As the checkpoint that it was made from, though its tokenizer has no fingerprint."""
    workdir = trained("concat")
    assert convert.convert(f"ckpt:{workdir}", f"hf:{tmp_path / 'hf'}")
    expected = weights.start(_set_up(_grown("concat", corpus, workdir, extra)))[0]
    params, told = weights.start(_set_up(_grown("concat", corpus, workdir, extra, init=f"hf:{tmp_path / 'hf'}")))
    assert specs.is_directory(f"hf:{tmp_path}") and "The vocabulary grew" in told
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)


def test_a_directory_whose_tables_have_grown_is_not_grown_once_more(corpus, extra, trained, tmp_path):
    """It has no tokenizer that says what its last rows are: new means would throw away trained ones."""
    grown = _grown("concat", corpus, trained("concat"), extra, train__steps=2, model__vocab_size=None)
    assert runs.run(grown, tmp_path / "run") == 0
    assert convert.convert(f"ckpt:{tmp_path / 'run'}", f"hf:{tmp_path / 'hf'}")
    again = _grown("concat", corpus, trained("concat"), extra, init=f"hf:{tmp_path / 'hf'}", model__vocab_size=None)
    with pytest.raises(ConfigError, match="may be trained.*--tokenizer="):
        weights.start(_set_up(again))


def test_every_table_of_pieces_is_known():
    """What AXES says of a parameter decides whether it grows."""
    lengths = {"L": zoo.LENGTH, "I": zoo.INPUTS}
    made = [jax.eval_shape(functools.partial(zoo.model(family).init, lengths=lengths), jax.random.key(0)) for family in zoo.CONFIGS]
    found = {path for shapes in made for path in tree.paths(shapes) if growth.dimension(path) is not None}
    assert {"token_embed/embedding", "lm_head/kernel", "mlm_head/bias"} <= found
    assert all("vocab" in parallel.axes_words(path) for path in found)

"""Metrics of written text, 0 to 100 as they are published, by the libraries that published figures come from (extra `metrics`)."""

import importlib.util
from collections.abc import Sequence

from ptm.fields import ConfigError
from ptm.metrics.spans import chinese_units

LIBRARIES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}
References = Sequence[str | Sequence[str]]  # one or several right texts a record


def require(metric: str) -> None:
    """Raises ConfigError if a metric needs a library that is not installed."""
    module = LIBRARIES[metric] if metric in LIBRARIES else None
    if module is not None and importlib.util.find_spec(module) is None:
        raise ConfigError(f"the metric {metric} needs the package {module.replace('_', '-')}: pip install 'ptm[metrics]'.")


def _texts(references: References) -> list[list[str]]:
    return [[reference] if isinstance(reference, str) else list(reference) for reference in references]


def _by_position(references: References) -> list[list[str | None]]:
    """The first right text of each record, then the second one, ...; None where a record has fewer."""
    texts = _texts(references)
    return [[those[n] if n < len(those) else None for those in texts] for n in range(max(map(len, texts)))]


def bleu(predictions: Sequence[str], references: References, *, option: str | None = None) -> dict[str, float]:
    """{bleu}: BLEU of the corpus as sacrebleu computes it (Post 2018); `option` is one of its tokenizers, 13a by default, zh for Chinese, char."""
    require("bleu")
    import sacrebleu  # an extra: only this metric and chrf need it

    allowed = sorted(set(sacrebleu.BLEU.TOKENIZERS) - {None})
    if option is not None and option not in allowed:
        raise ConfigError(f"metric bleu:{option}; allowed: bleu and bleu:TOKENIZER with one of {', '.join(allowed)}.")
    return {"bleu": sacrebleu.BLEU(tokenize=option or "13a").corpus_score(list(predictions), _by_position(references)).score}


def chrf(predictions: Sequence[str], references: References, *, option: str | None = None) -> dict[str, float]:
    """{chrf}: F2 of the corpus's character n-grams (Popovic 2015); `option` is the length of word n-grams that count too, 2 for chrF++."""
    require("chrf")
    import sacrebleu  # an extra: only this metric and bleu need it

    if option not in (None, "0", "1", "2"):
        raise ConfigError(f"metric chrf:{option}; allowed: chrf, chrf:1 (chrF+) and chrf:2 (chrF++).")
    return {"chrf": sacrebleu.CHRF(word_order=int(option or 0)).corpus_score(list(predictions), _by_position(references)).score}


class _Units:
    """Tokens for languages that set no spaces: Chinese characters and other words."""

    def tokenize(self, text: str) -> list[str]:
        return chinese_units(text)


def rouge(predictions: Sequence[str], references: References, *, option: str | None = None) -> dict[str, float]:
    """{rouge1, rouge2, rougeL, rougeLsum}: mean F1 over records (Lin 2004), the best over a record's references; words are stemmed, English alone.

    Lsum takes each line as a sentence. `option` characters counts Chinese characters and other words as they are.
    """
    require("rouge")
    from rouge_score import rouge_scorer  # an extra: only this metric needs it

    if option not in (None, "characters"):
        raise ConfigError(f"metric rouge:{option}; allowed: rouge (English words, stemmed) and rouge:characters (Chinese).")
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True, tokenizer=None if option is None else _Units())
    scored = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, _texts(references))]
    return {kind: 100 * sum(row[kind].fmeasure for row in scored) / len(scored) for kind in kinds}

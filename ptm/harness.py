"""Models of this project under lm-evaluation-harness (Gao et al. 2021; the extra `harness`): its command line, with our models as the kind `ptm`.

    python -m ptm.harness --model ptm --model_args pretrained=ckpt:DIR --tasks NAME,... --include_path FOLDER --output_path results

`pretrained` is any spec of a model (ckpt:DIR[@STEP|@best|@ema|@avgN], hf:DIR, hub:ORG/NAME); `length` and `stride` are the windows in which long texts are
read, as those of the eval perplexity, `max_gen_toks` is the longest answer of a task that sets none, `seed` that of draws; rows of a batch are --batch_size.
All else is the harness's own. From Python, `lm_eval.simple_evaluate(PtmLM(pretrained="ckpt:DIR"), tasks=...)`.

A task of your own needs no network: FOLDER/NAME.yaml with `task: NAME`, `dataset_path: json`, `dataset_kwargs: {data_files: {test: /path/test.jsonl}}`,
`test_split: test`, `output_type: multiple_choice`, and `doc_to_text`, `doc_to_choice`, `doc_to_target` as templates of the records' fields.

Left-to-right models and encoder-decoders are asked; these have nothing to say of a text without a context. Numbers are those of our own evals on the same
texts: a first token that no token stands before (objective.boundaries=false) is not scored.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptm import fields, parallel, weights
from ptm.data.conversation import reply_prompt
from ptm.evals import scoring
from ptm.fields import ConfigError
from ptm.generate.options import Options
from ptm.generate.text import complete

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    told = f"ptm.harness needs lm-evaluation-harness ({missing}): install the extra harness (in a checkout: pip install -e '.[harness]')."
    raise (SystemExit(f"ptm: {told}") if __name__ == "__main__" else ModuleNotFoundError(told, name=missing.name)) from None

BATCH_SIZE, ANSWER = 16, 256
# The names that tasks use -> those of our options.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GENERATION = {
    **dict.fromkeys(LENGTHS, "max_new_tokens"), "min_new_tokens": "min_new_tokens", "temperature": "temperature", "top_k": "top_k", "top_p": "top_p",
    "min_p": "min_p", "repetition_penalty": "repetition_penalty", "no_repeat_ngram_size": "no_repeat_ngram", "num_beams": "beams",
    "length_penalty": "length_penalty", "early_stopping": "early_stopping",
}  # fmt: skip
DRAWING = ("temperature", "top_k", "top_p", "min_p")  # mean nothing without do_sample


@register_model("ptm")
class PtmLM(LM):
    """A model by its spec. Raises ConfigError for one that models no text from left to right."""

    def __init__(
        self, pretrained: str, batch_size: int | str | None = None, length: int | None = None, stride: int | None = None, max_gen_toks: int | None = None,
        seed: int = 0, device: str | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        """`device` and `max_batch_size` are given by the harness, which means PyTorch's: devices are JAX's (JAX_PLATFORMS), and batches have one size."""
        super().__init__()
        if not (batch_size in (None, "auto") or str(batch_size).isdecimal() and int(batch_size) > 0):
            raise ConfigError(f"batch_size={batch_size}; allowed: 1 or more rows, or auto, which is {BATCH_SIZE}.")
        self._spec, self._length, self._stride, self._seed = pretrained, length, stride, seed
        self._run, self._params = weights.load(pretrained)
        self.batch_size = BATCH_SIZE if batch_size in (None, "auto") else int(batch_size)
        parallel.check_batch(self._run.layout, self.batch_size, "batch_size")
        if isinstance(scoring.scorer_of(self._run, name="lm-evaluation-harness", length=length, stride=stride), scoring.OneMasked):
            raise ConfigError(
                f"lm-evaluation-harness asks how texts go on, and {self._run.model.config.name} of {pretrained} fills blanks: its pseudo-log-likelihoods are "
                "no such probabilities. Use `ptm evaluate` with the evals pseudo_perplexity, minimal_pairs, cloze or choice."
            )
        positions = self._run.model.config.max_length
        self._longest = (ANSWER if positions is None else min(ANSWER, max(1, positions // 2))) if max_gen_toks is None else max_gen_toks

    # What the harness asks.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-likelihood of the continuation, nats, and whether each of its tokens is the likeliest."""
        found = self._scored([request.args for request in requests])
        return self._told("loglikelihood", requests, ((scored.total, bool(scored.greedy.all())) for scored in found), quiet=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, nats, each token scored once."""
        found = self._scored([request.args[0] for request in requests])
        return self._told("loglikelihood_rolling", requests, (scored.total for scored in found), quiet=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What each prompt goes on with, up to a text at which its task says that it ends."""
        alike: dict[Options, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(self._options(request.args[1]), []).append(number)
        order = [number for numbers in alike.values() for number in numbers]
        written = (text for options, numbers in alike.items() for text in self._written(options, [requests[number].args[0] for number in numbers]))
        told = self._told("generate_until", [requests[number] for number in order], written, quiet=disable_tqdm)
        return [text for _, text in sorted(zip(order, told))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as those of our training are written; without the prompt its last turn is one that the model goes on with."""
        if add_generation_prompt:
            return reply_prompt(chat_history)
        return f"{reply_prompt(chat_history[:-1])} {chat_history[-1]['content']}"

    @property
    def tokenizer_name(self) -> str:
        """What prompts of the harness's cache depend on."""
        return f"ptm-{self._run.tokenizer.fingerprint}"

    def get_model_info(self) -> dict[str, Any]:
        """What is told of the model beside the results."""
        return {"model_name": self._spec, "model_dtype": self._run.config.compute.dtype}

    # How it is answered.

    def _told(self, kind: str, requests: Sequence[Instance], answers: Iterable[Any], *, quiet: bool) -> list[Any]:
        """The answers as they come, with their progress, each kept in the harness's cache if it has one."""
        found = []
        for request, answer in zip(requests, tqdm(answers, total=len(requests), desc=kind, disable=quiet), strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
            found.append(answer)
        return found

    def _scored(self, texts: Sequence[scoring.Text]) -> Iterator[scoring.Scored]:
        return scoring.log_likelihoods(self._run, self._params, texts, batch_size=self.batch_size, length=self._length, stride=self._stride)

    def _written(self, options: Options, prompts: Sequence[str]) -> Iterator[str]:
        run = self._run
        made = complete(run.model, self._params, run.tokenizer, prompts, options=options, batch_size=self.batch_size, frame=run.prompt_frame)
        return (best.text for best, *_ in made)

    def _options(self, given: Mapping[str, Any]) -> Options:
        """Our options for a task's generation_kwargs. Raises ConfigError for those that we do not know."""
        settings = {name: value for name, value in given.items() if value is not None}
        until, sampled = settings.pop("until", ()), settings.pop("do_sample", None)
        hints = fields.annotations(Options)
        for name in settings:
            if name not in GENERATION:
                allowed = ", ".join(["until", "do_sample", *GENERATION])
                raise ConfigError(f"generation_kwargs has {name}={settings[name]!r}; allowed: {allowed}.{fields.nearest(name, GENERATION)}")
        if sampled is None:
            sampled = "temperature" in settings and settings["temperature"] > 0
        kept = {"temperature": 1.0, **settings} if sampled else {name: value for name, value in settings.items() if name not in DRAWING}
        lengths = [kept.pop(name) for name in LENGTHS if name in kept]
        made = {GENERATION[name]: fields.coerce(value, hints[GENERATION[name]], f"generation_kwargs.{name}") for name, value in kept.items()}
        stop = tuple(text for text in ((until,) if isinstance(until, str) else until) if text)
        options = Options(**made, max_new_tokens=int([*lengths, self._longest][0]), stop=stop, seed=self._seed, too_long="cut")
        fields.check(options, "generation_kwargs")
        return options


def main() -> int:
    """The harness's command line; returns the exit code."""
    try:
        cli_evaluate()
    except ConfigError as error:
        print(f"ptm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

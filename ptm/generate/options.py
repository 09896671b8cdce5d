"""How text is made from a model's distributions: the keys that a user sets."""

import dataclasses

from ptm.fields import ConfigError, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of generation. Greedy unless `temperature` (sampling) or `beams` (beam search) is set."""

    max_new_tokens: int = field(64, low=1, unit="tokens", doc="Longest continuation; the end token counts.")
    min_new_tokens: int = field(0, low=0, unit="tokens", doc="Tokens before the end token is allowed.")
    temperature: float = field(0.0, low=0.0, doc="Logits are divided by it before a token is drawn; 0 = the likeliest token.")
    top_k: int | None = field(None, low=1, unit="pieces", doc="Draw from the k likeliest pieces (Fan et al. 2018); None = all.")
    top_p: float = field(1.0, low=0.0, high=1.0, doc="Draw from the fewest pieces that have this probability together (Holtzman et al. 2020); 1 = all.")
    min_p: float = field(0.0, low=0.0, high=1.0, doc="Draw from pieces with this share of the likeliest one's probability (Nguyen et al. 2024); 0 = all.")
    repetition_penalty: float = field(1.0, low=0.01, doc="Logits of pieces that were there are divided by it, negative ones multiplied (Keskar et al. 2019).")
    no_repeat_ngram: int | None = field(None, low=1, unit="tokens", doc="No sequence of n tokens comes twice (Paulus et al. 2018); None = it may.")
    beams: int = field(1, low=1, doc="Continuations that are followed at once; 1 = no beam search.")
    length_penalty: float = field(1.0, doc="Scores are log-probabilities divided by length to this power; above 0 favours long texts.")
    early_stopping: bool = field(False, doc="Beam search ends with the first `beams` finished texts, even where a better one may follow.")
    n_best: int = field(1, low=1, doc="Texts for each prompt: the best of the beams, or as many draws.")
    stop: tuple[str, ...] = field((), doc="Texts at which a continuation ends; it is cut before the first one.")
    seed: int = field(0, low=0, high=2**31 - 1, doc="Seed of draws; those for a prompt depend on it and on the prompt's number alone.")
    too_long: str = field("refuse", choices=("refuse", "cut"), doc="A prompt that leaves no room: an error, or cut (of decoders at its beginning).")

    def check(self, where: str) -> None:
        """Refuses what contradicts itself."""
        at = f"{where}." if where else ""
        if self.beams > 1 and self.temperature:
            given = f"{at}beams={self.beams} looks for the likeliest text and {at}temperature={self.temperature} draws one"
            raise ConfigError(f"{given}; set beams=1 or temperature=0.")
        drawing = {"top_k": self.top_k is not None, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        if not self.temperature and any(drawing.values()):
            given = ", ".join(f"{at}{key}={getattr(self, key)}" for key, used in drawing.items() if used)
            raise ConfigError(f"{given} has no meaning where nothing is drawn; set {at}temperature above 0, or leave it out.")
        if self.top_p == 0:
            raise ConfigError(f"{at}top_p=0.0 leaves no piece to draw; allowed: above 0 to 1. The likeliest piece alone: temperature=0.")
        if self.early_stopping and self.beams == 1:
            raise ConfigError(f"{at}early_stopping=true needs beam search; set {at}beams above 1, or leave it out.")
        most = self.beams if self.beams > 1 else self.n_best if self.temperature else 1
        if self.n_best > most:
            raise ConfigError(
                f"{at}n_best={self.n_best} exceeds the {most} text{'s' if most > 1 else ''} that there {'are' if most > 1 else 'is'}; "
                f"set {at}beams={self.n_best} or more, or draw with {at}temperature above 0."
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(f"{at}min_new_tokens={self.min_new_tokens} exceeds {at}max_new_tokens={self.max_new_tokens}.")
        if "" in self.stop:
            raise ConfigError(f"{at}stop holds an empty text, at which every continuation ends; take it out.")

    def on_device(self) -> "Options":
        """The options that a compiled search depends on; all others at their defaults, so that they compile nothing anew."""
        defaults = Options()
        hosts = ("max_new_tokens", "stop", "seed", "too_long")
        return dataclasses.replace(self, **{key: getattr(defaults, key) for key in hosts}, min_new_tokens=self.min_new_tokens)

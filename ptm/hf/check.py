"""The reference library's own implementation of a directory against ours: logits and hidden states of one batch."""

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptm.fields import ConfigError
from ptm.hf import transfer
from ptm.hf.tables import Architecture, Family
from ptm.models import Model
from ptm.nn.heads import split_head

TOLERANCE = 2e-5  # of the largest value of the reference, or of 1 where that is larger
ROWS, LENGTH = 4, 24
PAD, EOS = 0, 1  # of the batch alone; a model gives them no meaning of their own
OF_ROWS = ("pooled", "pair", "classify")  # heads whose output is of a row, not of its positions
PADDED_LEFT = ("xlnet",)  # model types of which the reference takes the last position of a row for the end of its text
MASKS = {"decoder": "causal", "encoder": "full", "encoder_decoder": "causal"}


class Difference(NamedTuple):
    """The largest absolute difference of one output, and what is allowed."""

    name: str
    largest: float
    allowed: float

    @property
    def exceeds(self) -> bool:
        return not self.largest <= self.allowed


def inputs(config: Any, *, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A batch of ours with rows of unequal length, padded on the right, and the lengths of its rows.

    Every row ends in EOS, which like PAD stands nowhere else; where positions begin after that of the padding piece, the two change places,
    since the reference tells padding by its id. The decoder of an encoder-decoder reads PAD and the input without its end.
    """
    rng = np.random.default_rng(seed)
    pad, eos = (EOS, PAD) if hasattr(config, "position_offset") and config.position_offset else (PAD, EOS)
    length = LENGTH if config.max_length is None else min(LENGTH, config.max_length)
    lengths = np.array([length, *rng.integers(2, length + 1, ROWS - 1)])
    real = np.arange(length) < lengths[:, None]
    tokens = rng.integers(2, config.vocab_size, (ROWS, length))
    tokens[np.arange(ROWS), lengths - 1] = eos
    tokens = np.where(real, tokens, pad).astype(np.int32)
    positions = np.where(real, np.arange(length), 0).astype(np.int32)
    batch = {"tokens_BL": tokens, "segments_BL": real.astype(np.int32), "positions_BL": positions}
    if hasattr(config, "num_types"):
        batch["types_BL"] = np.where(real, rng.integers(0, config.num_types, (ROWS, length)), 0).astype(np.int32)
    if config.kind == "encoder_decoder":
        batch |= {"inputs_BI": tokens, "input_segments_BI": batch["segments_BL"], "input_positions_BI": positions}
        batch["tokens_BL"] = np.where(real, np.roll(tokens, 1, axis=1), PAD).astype(np.int32)
        batch["tokens_BL"][:, 0] = PAD
    return batch, lengths


def outputs(model: Model, params: Any, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """Logits of all heads and all hidden states of a batch, by name."""
    config = model.config
    last = config.kind == "encoder_decoder" or config.summary == "last"
    last_B = jnp.sum(batch["segments_BL"], axis=1) - 1 if last else jnp.zeros(len(batch["tokens_BL"]), jnp.int32)
    found: dict[str, jax.Array] = {}
    if config.kind == "encoder_decoder":
        encoded = model.encode(params, batch, states=True)
        hidden = model.decode(params, batch, encoded, states=True)
        found |= {f"encoder state {n}": state for n, state in enumerate(encoded.states_NBLD)}
    else:
        hidden = model.hidden(params, batch, mask=MASKS[config.kind], states=True)
    found |= {f"state {n}": state for n, state in enumerate(hidden.states_NBLD)}
    for head in model.module.heads:
        name = split_head(head)[0]
        chosen = jnp.take_along_axis(hidden.hidden_BLD, last_B[:, None, None], axis=1)[:, 0] if name in OF_ROWS else hidden.hidden_BLD
        found[name] = model.logits(params, chosen, head=head)
    return found


def ours(model: Model, params: Any, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """`outputs` as arrays of numpy."""
    return jax.tree.map(np.asarray, jax.jit(lambda params, batch: outputs(model, params, batch))(params, batch))


def load_reference(folder: Path, architecture: Architecture) -> Any:
    """The reference's model of a directory, of the class that our table names (whatever config.json says), in float32."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise ConfigError("--check runs the reference library beside ours: install the extra parity (in a checkout: pip install -e '.[parity]'), or leave --check out.")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # heavy, and only needed to compare
    import transformers

    return getattr(transformers, architecture.name).from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).eval()


def reference_outputs(reference: Any, architecture: Architecture, config: Any, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """What `outputs` gives, of the reference's model, as tensors of torch."""
    import torch  # as above

    padding_B = torch.from_numpy(np.sum(batch["segments_BL"] == 0, axis=1) * (reference.config.model_type in PADDED_LEFT))

    def turned(x: Any, by_B: Any) -> Any:
        return x[torch.arange(len(x))[:, None], (torch.arange(x.shape[1]) + by_B[:, None]) % x.shape[1]] if padding_B.any() else x

    paired = config.kind == "encoder_decoder"
    reference.config.pad_token_id, reference.config.eos_token_id = PAD, EOS
    side = {"inputs_BI": "input_ids", "input_segments_BI": "attention_mask", "tokens_BL": "decoder_input_ids"}
    names = side if paired else {"tokens_BL": "input_ids", "segments_BL": "attention_mask", "types_BL": "token_type_ids"}
    given = {name: turned(torch.from_numpy(batch[ours].astype(np.int64)), -padding_B) for ours, name in names.items() if ours in batch}

    def run(given: dict[str, Any]) -> dict[str, Any]:
        out = reference(**given, output_hidden_states=True)
        found = {f"state {n}": state for n, state in enumerate(out.decoder_hidden_states if paired else out.hidden_states)}
        if paired:
            found |= {f"encoder state {n}": state for n, state in enumerate(out.encoder_hidden_states)}
        for head, attributes in architecture.outputs.items():
            parts = [out[attribute] for attribute in attributes.split()]
            found[head] = parts[0] if len(parts) == 1 else torch.stack(parts, dim=-1)
        return found

    # XLNet that looks to the left alone takes a mask of padding only with batches of one row.
    size = 1 if hasattr(config, "attn_type") and config.attn_type == "uni" else len(padding_B)
    parts = [run({name: value[n : n + size] for name, value in given.items()}) for n in range(0, len(padding_B), size)]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: value if name in OF_ROWS else turned(value, padding_B) for name, value in found.items()}


def theirs(reference: Any, architecture: Architecture, config: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`reference_outputs` as arrays of numpy."""
    return {name: value.detach().numpy() for name, value in reference_outputs(reference, architecture, config, batch).items()}


def differences(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], lengths: np.ndarray) -> list[Difference]:
    """Largest differences at real positions of everything that both gave, hidden states first."""
    found = []
    for name in sorted(expected, key=lambda name: (" " not in name, len(name), name)):
        a, b = actual[name], expected[name]
        if a.shape != b.shape:
            raise ConfigError(f"{name}: ours has the shape {a.shape}, the reference's {b.shape}.")
        if name not in OF_ROWS:
            real = np.arange(b.shape[1]) < lengths[:, None]
            a, b = a[real], b[real]
        found.append(Difference(name, float(np.max(np.abs(a - b))), TOLERANCE * max(1.0, float(np.max(np.abs(b))))))
    return found


def compare(family: Family, model: Model, params: Any, folder: Path, *, seed: int = 0) -> list[Difference]:
    """Differences between our model and the reference's of a directory that holds the same parameters."""
    architecture = transfer.architecture_for(family, model.module.heads)
    batch, lengths = inputs(model.config, seed=seed)
    expected = theirs(load_reference(folder, architecture), architecture, model.config, batch)
    return differences(ours(model, params, batch), expected, lengths)

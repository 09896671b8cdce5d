"""ptm: pretrain, fine-tune, evaluate and compare Transformers in JAX."""

__version__ = "0.1.0"


def load(spec: str):
    """(run, parameters) of `ckpt:DIR[@STEP|@best|@ema|@avgN]`, `hf:DIR` or `hub:ORG/NAME[@REVISION]`: `run.model`, `run.tokenizer`, `run.objective`, ready for a notebook."""
    from ptm import weights  # imported here: `import ptm` alone must not load JAX

    return weights.load(spec)

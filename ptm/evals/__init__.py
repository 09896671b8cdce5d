"""The evaluators, each with its Config; all work on the same Run."""

from ptm.evals import loss

EVALS = {"loss": loss}

"""A GPT-2-style character model and its trainer in PyTorch: the peer that `ptm`'s small-model speed and loss are compared with.

The recipe is the one nanoGPT's README gives for a laptop CPU (https://github.com/karpathy/nanoGPT, "I only have a macbook"), which reports a validation loss
near 1.88; the code is written from that description.

* Data: tinyshakespeare, its 65 characters in sorted order as tokens; the first int(0.9 * n) characters train, the rest validate.
* Model: 4 pre-norm blocks, 4 heads, width 128, context 64, exact GELU, learned positions, tied embeddings, no biases (LayerNorm included), no dropout:
  804,096 parameters. Weights start normal(0, 0.02), the two projections into the residual stream at 0.02 / sqrt(2 * layers).
* Training: 2,000 steps of 12 windows at uniformly random offsets, float32. AdamW, betas 0.9 and 0.99, weight decay 0.1 on matrices (embeddings included),
  gradient norm clipped at 1.0, learning rate 1e-3: 100 warm-up steps, then cosine to 1e-4 at the last step.
* Evaluation: mean nats per character over the whole validation text, in windows of 64 that do not overlap; the last, shorter window counts too.

Needs torch and numpy, and a C++ compiler for --compile (the default where one is found). Run:

    PTM_DATA=DIR python benchmarks/peers/torch_gpt.py --seeds 0,1,2     # trains; one JSON line a seed
    PTM_DATA=DIR python benchmarks/peers/torch_gpt.py --bench 200       # times 200 steps by phase, no evaluation
    python benchmarks/peers/torch_gpt.py --bench 200 --tokens IDS.npy --config '{"vocab_size": 8192, "width": 256}'     # other tokens and sizes

where DIR/lm/tinyshakespeare/input.txt is the text. A step's time is wall clock around batch making, forward, backward, clipping and optimizer; what is reported
is the median over the steps after the first 20, which hold compilation. On two AVX-512 cores, torch 2.13.0: 25 to 27 ms a step, validation loss 1.896,
1.906, 1.910 for seeds 0, 1, 2; --no-compile is within about 4 % of that, because about 60 % of a step is library matrix products.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import shutil
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

PHASES = ("data", "forward", "backward", "clip", "optimizer")
WARMUP_TIMED_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and hyperparameters; the defaults are the recipe in this file's docstring."""

    vocab_size: int = 65
    num_layers: int = 4
    num_heads: int = 4
    width: int = 128
    context: int = 64
    batch_size: int = 12
    steps: int = 2000
    warmup_steps: int = 100
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    init_std: float = 0.02


class Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward layer, [B, L, D] to [B, L, D]."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.attention_norm(x_BLD)).unflatten(-1, (3, self.num_heads, -1))
        query_BHLK, key_BHLK, value_BHLK = heads.permute(2, 0, 3, 1, 4)
        mixed_BHLK = F.scaled_dot_product_attention(query_BHLK, key_BHLK, value_BHLK, is_causal=True)
        x_BLD = x_BLD + self.attention_out(mixed_BHLK.transpose(1, 2).flatten(2))
        return x_BLD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BLD))))


class GPT(nn.Module):
    """Decoder-only language model; called with tokens and targets [B, L] it returns the cross-entropy in nats, averaged (or summed) over B and L."""

    def __init__(self, config: Config):
        super().__init__()
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.position_embed = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                into_residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(weight, std=config.init_std / (math.sqrt(2 * config.num_layers) if into_residual else 1))

    def forward(self, tokens_BL: torch.Tensor, targets_BL: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        x_BLD = self.token_embed(tokens_BL) + self.position_embed.weight[: tokens_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits_BLV = F.linear(self.final_norm(x_BLD), self.token_embed.weight)
        return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction=reduction)


def load_tokens(path: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(train, validation), each int64 [n], of the ids in a file, or of the characters of tinyshakespeare under $PTM_DATA."""
    if path:
        tokens = torch.from_numpy(np.load(path).astype(np.int64))
        return tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
    text = pathlib.Path(os.environ["PTM_DATA"], "lm", "tinyshakespeare", "input.txt").read_text(encoding="utf-8")
    ids = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[character] for character in text])
    return tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]


def random_batch(tokens: torch.Tensor, *, config: Config, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws `batch_size` windows at uniformly random offsets: (tokens, targets), each [B, L]."""
    offsets_B = torch.randint(len(tokens) - config.context, (config.batch_size,), generator=generator)
    window_BL = tokens[offsets_B[:, None] + torch.arange(config.context + 1)]
    return window_BL[:, :-1], window_BL[:, 1:]


def learning_rate(step: int, *, config: Config) -> float:
    """Learning rate of the 0-based `step`: linear warm-up, then cosine to `final_learning_rate`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.final_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.final_learning_rate)


def make_optimizer(model: GPT, *, config: Config, implementation: str) -> torch.optim.AdamW:
    """AdamW that decays matrices only; `implementation` is torch's 'fused', 'foreach' or 'loop'."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    chosen = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[implementation]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, **chosen)


def train(model: GPT, tokens: torch.Tensor, *, config: Config, steps: int, seed: int, compiled: bool, implementation: str) -> np.ndarray:
    """Trains `model` in place for `steps` steps of the schedule and returns the seconds of each phase, [steps, len(PHASES)]."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, config=config, implementation=implementation)
    parameters = list(model.parameters())
    loss_of = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    seconds = np.empty((steps, len(PHASES)))
    for step in range(steps):
        clock = [time.perf_counter()]
        tokens_BL, targets_BL = random_batch(tokens, config=config, generator=generator)
        clock.append(time.perf_counter())
        loss = loss_of(tokens_BL, targets_BL)
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        clock.append(time.perf_counter())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config=config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.append(time.perf_counter())
        seconds[step] = np.diff(clock)
        if step == 0:
            print("First step done", flush=True)
    return seconds


@torch.no_grad()
def evaluate(model: GPT, tokens: torch.Tensor, *, context: int, rows: int = 128) -> float:
    """Mean nats per character over `tokens` [n]: its n - 1 predictions in windows of `context` that do not overlap, each counted once."""
    full = (len(tokens) - 1) // context * context
    windows = list(zip(tokens[:full].view(-1, context).split(rows), tokens[1 : full + 1].view(-1, context).split(rows), strict=True))
    if full < len(tokens) - 1:
        windows.append((tokens[None, full:-1], tokens[None, full + 1 :]))
    return sum(model(tokens_BL, targets_BL, reduction="sum").item() for tokens_BL, targets_BL in windows) / (len(tokens) - 1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="PyTorch peer: nanoGPT's CPU recipe on tinyshakespeare.", allow_abbrev=False)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0], help="comma-separated; run one after the other")
    parser.add_argument("--steps", type=int, default=Config.steps, help="training steps, also the length of the schedule")
    parser.add_argument("--bench", type=int, metavar="N", help="only time N steps (after 20 more) of each seed: no evaluation")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=bool(shutil.which("g++") or shutil.which("c++")), help="use torch.compile")
    parser.add_argument("--optimizer", choices=("fused", "foreach", "loop"), default="fused", help="implementation of AdamW")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of torch")
    parser.add_argument("--tokens", metavar="FILE.npy", help="token ids of a text, instead of tinyshakespeare's characters")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help="fields of Config that differ from the recipe's")
    parser.add_argument("--json", action="store_true", help="JSON lines alone: without it a progress line goes to stderr before each seed")
    arguments = parser.parse_args(argv)
    if arguments.steps <= max(WARMUP_TIMED_STEPS, Config.warmup_steps):
        parser.error(f"--steps={arguments.steps}: the schedule's warm-up takes {Config.warmup_steps} steps; give more")
    if "PTM_DATA" not in os.environ and not arguments.tokens:
        parser.error("PTM_DATA is not set: point it at the folder that holds lm/tinyshakespeare/input.txt")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Trains or times each seed and prints one JSON line a seed."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    train_tokens, validation_tokens = load_tokens(arguments.tokens)
    config = Config(steps=arguments.steps, **arguments.config)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for seed in arguments.seeds:
        if not arguments.json:
            print(f"seed {seed}: compile={arguments.compile} optimizer={arguments.optimizer} threads={arguments.threads}", file=sys.stderr)
        start = time.perf_counter()
        torch.manual_seed(seed)
        model = GPT(config)
        steps = arguments.bench + WARMUP_TIMED_STEPS if arguments.bench else config.steps
        seconds = train(model, train_tokens, config=config, steps=steps, seed=seed, compiled=arguments.compile, implementation=arguments.optimizer)
        timed = seconds[WARMUP_TIMED_STEPS:]
        row = {"seed": seed}
        if arguments.bench:
            row["phase_ms"] = {phase: round(1e3 * float(value), 4) for phase, value in zip(PHASES, np.median(timed, axis=0), strict=True)}
        else:
            row["val_loss"] = round(evaluate(model, validation_tokens, context=config.context), 5)
        row |= {
            "step_ms": round(1e3 * float(np.median(timed.sum(axis=1))), 4),
            "seconds": round(time.perf_counter() - start, 2),
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": steps,
            "compile": arguments.compile,
            "optimizer": arguments.optimizer,
            "threads": arguments.threads,
            "versions": versions,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Pretraining steps in PyTorch: plain GPT-2, BERT and T5 models, the peers that `ptm`'s step on a GPU is compared with (benchmarks/gpu.py).

    python benchmarks/peers/torch_pretrain.py --batches FILE.npz --model '{"family": "gpt", ...}' --steps 50

What such a loop does best: torch.compile of model and loss as one graph of fixed shapes, scaled_dot_product_attention by its flash kernel, without any
mask (a T5's bias, which that kernel does not take, by the others that are fused), products in bfloat16 by autocast, float32 parameters, fused AdamW, the
gradient norm clipped, pinned batches that are copied while a step runs, logits at the predicted positions alone, and no wait within the timed steps. Written
from the papers: Radford et al. 2019, Devlin et al. 2019, Raffel et al. 2020. FILE holds arrays [batches, rows, ...] named as ptm names them; rows are taken to
be full. Prints a JSON line.
"""

import argparse
import contextlib
import json
import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Batch = dict[str, torch.Tensor]


class Attention(nn.Module):
    """Multi-head attention of `x` to itself, or to a memory if `cross`; a T5's has no biases, no scale, and adds a bias of its positions."""

    def __init__(self, width: int, heads: int, *, bias: bool, cross: bool = False, scale: float | None = None):
        super().__init__()
        self.heads, self.scale, self.cross = heads, scale, cross
        # One product for all that reads the same.
        self.q, self.kv = nn.Linear(width, width if cross else 3 * width, bias=bias), nn.Linear(width, 2 * width, bias=bias) if cross else None
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self, x_BLD: torch.Tensor, *, memory_BTD: torch.Tensor | None = None, causal: bool = False, bias_1HLT: torch.Tensor | None = None
    ) -> torch.Tensor:
        read = [self.q(x_BLD), *self.kv(memory_BTD).chunk(2, -1)] if self.cross else self.q(x_BLD).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in read)
        if bias_1HLT is not None:
            bias_1HLT = bias_1HLT.to(query.dtype).expand(query.shape[0], -1, -1, -1)
        mixed_BHLK = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_1HLT, is_causal=causal, scale=self.scale)
        return self.out(mixed_BHLK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str, *, bias: bool):
        super().__init__()
        self.into, self.out, self.activation = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.into(x)
        return self.out(F.relu(hidden) if self.activation == "relu" else F.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Layer(nn.Module):
    """Self-attention, attention to a memory if `cross`, and feed-forward, with norms before (`prenorm`) or after each."""

    def __init__(
        self, c: dict[str, Any], *, norm: type[nn.Module], prenorm: bool, bias: bool, activation: str, cross: bool = False, scale: float | None = None
    ):
        super().__init__()
        width, self.prenorm = c["width"], prenorm
        self.attention = Attention(width, c["num_heads"], bias=bias, scale=scale)
        self.cross = Attention(width, c["num_heads"], bias=bias, cross=True, scale=scale) if cross else None
        self.mlp = MLP(width, c["mlp_width"], activation, bias=bias)
        self.norms = nn.ModuleList(norm(width, eps=c["norm_eps"]) for _ in range(3 if cross else 2))

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        parts = [lambda y: self.attention(y, **options), *([lambda y: self.cross(y, memory_BTD=memory)] if self.cross is not None else []), self.mlp]
        for part, norm in zip(parts, self.norms, strict=True):
            x = x + part(norm(x)) if self.prenorm else norm(x + part(x))
        return x


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return (nats * weights.flatten()).sum() / weights.sum()


def draw(model: nn.Module, std: float) -> None:
    """Matrices and tables from a normal distribution; vectors keep what their modules start with, biases 0."""
    for name, values in model.named_parameters():
        if values.dim() > 1:
            nn.init.normal_(values, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(values)


class GPT(nn.Module):
    """GPT-2: pre-norm, learned positions, tied table; the loss is that of all positions."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(c["vocab_size"], c["width"]), nn.Embedding(c["max_length"], c["width"])
        self.layers = nn.ModuleList(Layer(c, norm=nn.LayerNorm, prenorm=True, bias=True, activation="gelu_tanh") for _ in range(c["num_layers"]))
        self.norm = nn.LayerNorm(c["width"], eps=c["norm_eps"])
        draw(self, 0.02)
        for layer in self.layers:
            for out in (layer.attention.out, layer.mlp.out):
                nn.init.normal_(out.weight, std=0.02 / math.sqrt(2 * c["num_layers"]))

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.tokens(batch["tokens_BL"]) + self.positions.weight[: batch["tokens_BL"].shape[1]]
        for layer in self.layers:
            x = layer(x, causal=True)
        return cross_entropy(F.linear(self.norm(x), self.tokens.weight), batch["targets_BL"], batch["weights_BL"])


class BERT(nn.Module):
    """BERT: post-norm, three tables, and the head of masked language modelling at the listed positions."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        width = c["width"]
        self.tokens, self.positions, self.types = (nn.Embedding(size, width) for size in (c["vocab_size"], c["max_length"], c["num_types"]))
        self.embed_norm = nn.LayerNorm(width, eps=c["norm_eps"])
        self.layers = nn.ModuleList(Layer(c, norm=nn.LayerNorm, prenorm=False, bias=True, activation="gelu") for _ in range(c["num_layers"]))
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=c["norm_eps"])
        self.bias = nn.Parameter(torch.zeros(c["vocab_size"]))
        draw(self, 0.02)

    def forward(self, batch: Batch) -> torch.Tensor:
        tokens, index = batch["tokens_BL"], batch["target_index_BS"]
        length = tokens.shape[1]
        x = self.embed_norm(self.tokens(tokens) + self.positions.weight[:length] + self.types.weight[0])
        for layer in self.layers:
            x = layer(x)
        there, index = index < length, index.clamp(max=length - 1)
        x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
        logits = F.linear(self.norm(F.gelu(self.dense(x))), self.tokens.weight, self.bias)
        return cross_entropy(logits, batch["targets_BL"].gather(1, index), batch["weights_BL"].gather(1, index) * there)


class Bias(nn.Module):
    """T5's bias [1, H, L, L] of the distance between key and query."""

    def __init__(self, c: dict[str, Any], length: int, *, bidirectional: bool):
        super().__init__()
        self.table, self.causal = nn.Embedding(c["num_buckets"], c["num_heads"]), not bidirectional
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        buckets, start = c["num_buckets"], torch.zeros_like(distance)
        if bidirectional:
            buckets, start = buckets // 2, (distance > 0) * (buckets // 2)
        distance = distance.abs() if bidirectional else (-distance).clamp(min=0)
        exact = buckets // 2
        far = exact + (torch.log(distance.clamp(min=1) / exact) / math.log(c["max_distance"] / exact) * (buckets - exact)).long()
        self.register_buffer("bucket", start + torch.where(distance < exact, distance, far.clamp(max=buckets - 1)))
        self.register_buffer("hidden", torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else torch.zeros(1, 1, dtype=torch.bool))

    def forward(self) -> torch.Tensor:
        bias = self.table(self.bucket).permute(2, 0, 1)[None]
        return bias.masked_fill(self.hidden, float("-inf")) if self.causal else bias


class T5(nn.Module):
    """T5 1.0: pre-norm with RMS norms, no biases, tied table with its projection scaled by 1/sqrt(width)."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.tokens, self.width = nn.Embedding(c["vocab_size"], c["width"]), c["width"]
        options = {"norm": nn.RMSNorm, "prenorm": True, "bias": False, "activation": "relu", "scale": 1.0}
        self.encoder = nn.ModuleList(Layer(c, **options) for _ in range(c["num_layers"]))
        self.decoder = nn.ModuleList(Layer(c, **options, cross=True) for _ in range(c["num_layers"]))
        self.encoder_bias, self.decoder_bias = Bias(c, c["inputs"], bidirectional=True), Bias(c, c["length"], bidirectional=False)
        self.encoder_norm, self.decoder_norm = (nn.RMSNorm(c["width"], eps=c["norm_eps"]) for _ in range(2))
        draw(self, c["width"] ** -0.5)
        nn.init.normal_(self.tokens.weight, std=1.0)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.q.weight[: c["width"]], std=c["width"] ** -0.5 * (c["width"] // c["num_heads"]) ** -0.5)
            if isinstance(module, MLP):
                nn.init.normal_(module.out.weight, std=c["mlp_width"] ** -0.5)

    def forward(self, batch: Batch) -> torch.Tensor:
        memory, bias = self.tokens(batch["inputs_BI"]), self.encoder_bias()
        for layer in self.encoder:
            memory = layer(memory, bias_1HLT=bias)
        memory = self.encoder_norm(memory)
        x, bias = self.tokens(batch["tokens_BL"]), self.decoder_bias()
        for layer in self.decoder:
            x = layer(x, memory, bias_1HLT=bias)
        logits = F.linear(self.decoder_norm(x) * self.width**-0.5, self.tokens.weight)
        return cross_entropy(logits, batch["targets_BL"], batch["weights_BL"])


MODELS = {"gpt": GPT, "bert": BERT, "t5": T5}
FUSED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def kernels_of(step: Any) -> list[str]:
    """Names of the kernels on the device that a step runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sorted({event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA})


def main() -> None:
    """Trains for some steps and prints how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", required=True, help="arrays of the batches, npz")
    parser.add_argument("--model", type=json.loads, required=True, help="family and shape, JSON")
    parser.add_argument("--steps", type=int, default=50, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before these")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="of AdamW, constant")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    flags = parser.parse_args()
    on_gpu, c = torch.cuda.is_available(), flags.model
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = MODELS[c["family"]](c).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=flags.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loss_of = torch.compile(model, fullgraph=True, dynamic=False) if flags.compile else model
    arrays = {name: torch.from_numpy(values if values.dtype == np.float32 else values.astype(np.int64)) for name, values in np.load(flags.batches).items()}
    arrays = {name: values.pin_memory() if on_gpu else values for name, values in arrays.items()}
    count = len(arrays["tokens_BL"])
    losses, number = [], 0

    def step() -> None:
        nonlocal number
        batch = {name: values[number % count].to(device, non_blocking=True) for name, values in arrays.items()}
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        number += 1

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    backends = [SDPBackend.FLASH_ATTENTION] if c["family"] != "t5" else FUSED
    with sdpa_kernel(backends) if on_gpu else contextlib.nullcontext():
        for _ in range(flags.warmup):
            step()
        wait()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        start = time.perf_counter()
        for _ in range(flags.steps):
            step()
        wait()
        seconds = time.perf_counter() - start
        recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        kernels = kernels_of(step) if on_gpu else []
    print(json.dumps({
        "step_ms": 1e3 * seconds / flags.steps, "first_loss": float(losses[0]), "last_loss": float(losses[-1]),
        "parameters": sum(p.numel() for p in parameters),
        "attention": [name for name in kernels if any(word in name.lower() for word in ("flash", "fmha", "attention", "sdpa"))], "recompiled": recompiled,
        "compiled": flags.compile, "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "version": torch.__version__,
    }))  # fmt: skip


if __name__ == "__main__":
    main()

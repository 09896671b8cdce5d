"""Times torch.save and torch.load of a GPT and its AdamW beside training steps: the peer of checkpoints.py. Prints one JSON line.

    PTM_DATA=DIR python benchmarks/peers/torch_checkpoint.py --folder DIR --steps 20 --config '{"num_layers": 12, "width": 512}'
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch_gpt
from torch import nn

WARMUP = 3


def main() -> None:
    """Trains, saves while training, saves again, restores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the file is written")
    parser.add_argument("--steps", type=int, default=20, help="steps without, and steps after a save")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help="fields of torch_gpt.Config that differ from the recipe's")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads of torch")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    config, generator = torch_gpt.Config(**flags.config), torch.Generator().manual_seed(0)
    tokens, _ = torch_gpt.load_tokens(None)
    model = torch_gpt.GPT(config)
    optimizer, parameters = torch_gpt.make_optimizer(model, config=config, implementation="fused"), list(model.parameters())
    times = []

    def train(count: int) -> None:
        for _ in range(count):
            start = time.perf_counter()
            model(*torch_gpt.random_batch(tokens, config=config, generator=generator)).backward()
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)

    def save(name: str) -> float:
        start = time.perf_counter()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, flags.folder / name)
        return time.perf_counter() - start

    train(WARMUP + flags.steps)
    step, start = statistics.median(times[WARMUP:]), time.perf_counter()
    call = save("1.pt")
    train(flags.steps)
    stall = time.perf_counter() - start - flags.steps * step
    told = {"save": save("2.pt"), "call": call, "stall": stall}
    start = time.perf_counter()
    read = torch.load(flags.folder / "2.pt", weights_only=True)
    model.load_state_dict(read["model"])
    optimizer.load_state_dict(read["optimizer"])
    told |= {"restore": time.perf_counter() - start, "bytes": (flags.folder / "2.pt").stat().st_size, "step_ms": 1e3 * step}
    print(json.dumps(told))


if __name__ == "__main__":
    main()

"""Times the reference library's `generate` for a directory: the peer of generation.py. Prints one JSON line.

    python benchmarks/peers/hf_generate.py DIRECTORY '[[1, 1], [8, 4]]' --prompt 32 --new 64 --threads 2
"""

import argparse
import json
import time

import numpy as np
import torch
import transformers


def main() -> None:
    """Seconds of generation and the texts, for each pair of rows and beams, as {"cases": [...]}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("cases", type=json.loads)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel.from_pretrained(flags.folder, dtype=torch.float32, local_files_only=True).eval()
    results = []
    for rows, beams in flags.cases:
        prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, flags.prompt))
        ids = torch.from_numpy(prompts)
        options = {"do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        model.generate(ids, max_new_tokens=4, **options)
        began = time.perf_counter()
        out = model.generate(ids, max_new_tokens=flags.new, **options)
        results.append({"seconds": time.perf_counter() - began, "texts": out[:, flags.prompt :].tolist()})
    print(json.dumps({"cases": results}))


if __name__ == "__main__":
    main()

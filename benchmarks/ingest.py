"""Reading a text: our ingest beside a prefill by transformers, same weights, same dtype, one run, alternating.

Ours runs the layers below the memory with a window and trains the memory; theirs runs the whole body with full
attention. Prints medians, the ratio, and the machine's measured bfloat16 ceiling.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from machine import ceiling, seconds
from titans.backbone import find_default_body
from titans.checkpoint import load
from transformers import AutoModelForCausalLM

TEXT = Path(__file__).parents[1] / "examples" / "sherlock-holmes.txt"


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2_048, 8_192])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    loaded = load(device=torch.device("cpu"))
    body = find_default_body()
    peer = AutoModelForCausalLM.from_pretrained(body.parent, gguf_file=body.name, dtype=loaded.model.dtype)
    peer.train(mode=False)
    every = torch.tensor([loaded.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[: max(args.lengths)]])
    limit = ceiling(torch.bfloat16) / 1e12
    print(f"{loaded.model.dtype}, {torch.get_num_threads()} threads, {limit:.2f} TFLOP/s bfloat16 product")
    print(f"{'tokens':>8} {'ours, tokens/s':>16} {'transformers':>14} {'ratio':>7}")
    for length in args.lengths:
        tokens = every[:, :length]
        ours, theirs = [], []
        for _ in range(args.repeats + 1):
            ours.append(seconds(partial(loaded.model.ingest, tokens, loaded.model.new_state())))
            theirs.append(seconds(partial(peer, tokens, logits_to_keep=1)))
        a, b = (length / statistics.median(times[1:]) for times in (ours, theirs))
        print(f"{length:>8,} {a:>16,.0f} {b:>14,.0f} {a / b:>6.1f}x")


if __name__ == "__main__":
    main()

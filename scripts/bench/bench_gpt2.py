"""GPT-2 124M with its BPE, trained for given seconds on one text, as the arena trains our models.

    python scripts/bench/bench_gpt2.py --train english_train.txt --valid english_valid.txt
    python scripts/bench/arena.py --arms megabyte_132m megabyte_in_action_132m --run-seconds 300 \\
        --train english_train.txt --valid english_valid.txt --out seed_table.jsonl    # its rivals

Prints one JSON object: parameters, training speed in KB/s, peak memory, evaluation loss and bits
per byte. GPT-2 is transformers' `GPT2LMHeadModel`, eager, without dropout, bfloat16 autocast, fused
AdamW with our betas and decay, `--gpt2-rate` with warm-up and cosine as ours; its byte-level BPE of
50,257 entries is trained with `tokenizers` on the first `--bpe-bytes` of the same text and kept in
`--tokenizer`. Every byte of the validation text is counted once: its tokens are cut into windows of
the model's context less one, each begun with <|endoftext|>, from which the first token is
predicted, and their nats in all are divided by the bytes of the text.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

END = "<|endoftext|>"
CHUNK = 1 << 16  # characters that are encoded together
WARMUP = 200
IN_FLIGHT = 4


def pieces(path: str, size: int) -> Iterator[str]:
    """The first `size` bytes of a text in pieces that together are the text."""
    text = Path(path).read_bytes()[:size].decode("utf-8", errors="strict" if size < 0 else "ignore")
    return (text[i : i + CHUNK] for i in range(0, len(text), CHUNK))


def tokenizer_for(path: Path, text: str, size: int, entries: int) -> Any:
    """The byte-level BPE in `path`, trained on the first `size` bytes of `text` if need be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=entries, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(pieces(text, size), trainer)
        tokenizer.save(str(path))
    return Tokenizer.from_file(str(path))


def tokens(tokenizer: Any, path: str) -> np.ndarray:
    """All of a text as ids; that they stand for exactly that text is checked."""
    text = list(pieces(path, -1))
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(text)]
    if tokenizer.decode_batch(encoded, skip_special_tokens=False) != text:
        raise ValueError(f"{path}: the tokenizer does not give it back")
    return np.concatenate([np.array(ids, np.int32) for ids in encoded])


def windows(ids: np.ndarray, length: int, end: int) -> np.ndarray:
    """Rows of `end` and `length - 1` ids each, int64; the last is filled up with -100."""
    rows = -(-len(ids) // (length - 1))
    padded = np.full(rows * (length - 1), -100, np.int64)
    padded[: len(ids)] = ids
    return np.concatenate([np.full((rows, 1), end), padded.reshape(rows, -1)], axis=1)


def nats(model: Any, ids: Any, reduction: str) -> Any:
    """The nats of all ids but the first of each row, -100 left out; a sum or a mean."""
    import torch

    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids.clamp(min=0), use_cache=False).logits
    wide = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(wide, ids[:, 1:].reshape(-1), reduction=reduction)


def train(
    model: Any, rows: np.ndarray, seconds: float, batch: int, rate: float
) -> tuple[int, float]:
    """Trains on shuffled rows for so many seconds after the first step: steps, and seconds used."""
    import torch

    device = model.device
    decays = [[p for p in model.parameters() if (p.ndim > 1) is yes] for yes in (True, False)]
    groups = [{"params": decays[0]}, {"params": decays[1], "weight_decay": 0.0}]
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, rate, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    source, order = np.random.default_rng(0), np.zeros(0, int)
    count, start, ahead = 0, 0.0, deque()
    while not count or time.perf_counter() - start < seconds:
        if len(order) < batch:
            order = source.permutation(len(rows))
        ids, order = torch.from_numpy(rows[order[:batch]]).to(device), order[batch:]
        done = (time.perf_counter() - start) / seconds if count else 0.0
        falling = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(falling, (count + 1) / WARMUP)
        nats(model, ids, "mean").backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count += 1
        if fused:
            ahead.append(torch.cuda.Event())
            ahead[-1].record()
            if len(ahead) > IN_FLIGHT or count == 1:
                ahead.popleft().synchronize()
        start = start or time.perf_counter()  # the first step is a warm-up, and no time
    if fused:
        torch.cuda.synchronize()
    return count, time.perf_counter() - start


def gpt2(args: argparse.Namespace) -> dict[str, Any]:
    """The row of GPT-2."""
    import torch
    import transformers
    from transformers import GPT2Config, GPT2LMHeadModel

    begin = time.perf_counter()
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(**no_dropout | json.loads(args.gpt2_config))
    bpe = tokenizer_for(args.tokenizer, args.train, args.bpe_bytes, config.vocab_size)
    end, length, batch = bpe.token_to_id(END), config.n_positions, args.gpt2_batch
    training, valid = tokens(bpe, args.train), tokens(bpe, args.valid)
    sizes = [Path(path).stat().st_size for path in (args.train, args.valid)]
    prepared = time.perf_counter() - begin
    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(config)
    model = model.to("cuda" if cuda else "cpu").train()
    whole = len(training) // (length - 1) * (length - 1)
    rows = windows(training[:whole], length, end)
    count, seconds = train(model, rows, args.seconds, batch, args.gpt2_rate)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    model.eval()
    with torch.inference_mode():
        parts = torch.from_numpy(windows(valid, length, end)).to(model.device).split(batch)
        total = math.fsum(nats(model, part, "sum").item() for part in parts)
    speed = count * batch * (length - 1) * sizes[0] / len(training) / seconds
    return {
        "row": "gpt2",
        "parameters": sum(p.numel() for p in model.parameters()),
        "kilobytes_per_second": round(speed / 1e3, 1),
        "peak_gib": round(peak, 2),
        "evaluation_loss": round(total / len(valid), 4),
        "loss_in": "nats a token",
        "bits_per_byte": round(total / sizes[1] / math.log(2), 4),
        "held_out_bytes": sizes[1],
        "bytes_per_token": round(sizes[1] / len(valid), 3),
        "steps": count,
        "seconds": round(seconds, 1),
        "batch_size": batch,
        "window": length,
        "learning_rate": args.gpt2_rate,
        "bpe_bytes": min(args.bpe_bytes, sizes[0]),
        "preparing_seconds": round(prepared, 1),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", default="english_train.txt", help="text to train on")
    parser.add_argument("--valid", default="english_valid.txt", help="text to evaluate on")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--gpt2-config", default="{}", metavar="JSON", help="fields of GPT2Config")
    parser.add_argument("--gpt2-batch", type=int, default=16)
    parser.add_argument("--gpt2-rate", type=float, default=6e-4)
    parser.add_argument("--bpe-bytes", type=int, default=32_000_000)
    parser.add_argument("--tokenizer", type=Path, default=Path("gpt2_tokenizer.json"))
    args = parser.parse_args()
    print(json.dumps(gpt2(args) | {"command": shlex.join(["python", *sys.argv])}), flush=True)


if __name__ == "__main__":
    main()

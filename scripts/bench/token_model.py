"""A token model to make byte models of: a BPE and a Llama of about 40 million parameters.

    python scripts/bench/token_model.py --train english_train.txt --valid english_valid.txt \\
        --out donor --seconds 300

transformers trains it for so many seconds. OUT is what `save_pretrained` writes, with
`tokenizer.json` and `measured.json`: its size, bytes, seconds and held-out bits per byte. OUT
appears complete or not at all. Until then OUT.work holds the tokenizer, the tokens and, every
`_SAVED_EVERY` seconds, the state of training. The same command continues from there; if another
process works on it, the command waits for that. `--tiny` is for trying it on a CPU.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bytelm.files import replace_file, replacing

SIZES: dict[str, Any] = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8}
SIZES |= {"num_attention_heads": 10, "num_key_value_heads": 5}
TINY_SIZES: dict[str, Any] = dict.fromkeys(SIZES, 2) | {"hidden_size": 16, "intermediate_size": 24}
_ROWS, _LENGTH = 64, 512
"""Tokens of a step: rows, and the length of each with its beginning."""
_TOKENIZER_BYTES, _HELD_OUT_BYTES = 2 * 10**7, 2 * 10**6
_BEGIN = "<s>"
_SAVED_EVERY, _TOLD_EVERY = 30.0, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8000, help="size of the vocabulary")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    work = asked.out.with_name(f"{asked.out.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    with locked(work, waits=True):  # for one whose parent was killed, say
        if not asked.out.exists():
            make(asked, work)
    print((asked.out / "measured.json").read_text(), end="", flush=True)


@contextmanager
def locked(folder: Path, waits: bool) -> Iterator[None]:
    """Keeps other processes out of a folder. If one is there, waits for it or ends the program."""
    with open(folder / "lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waits:
                text = f"{folder}: another process works there; wait for it, or end it"
                print(text, file=sys.stderr)
                sys.exit(2)
            print(f"waiting for the process that works in {folder}", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def make(asked: argparse.Namespace, work: Path) -> None:
    """Trains tokenizer and token model, and writes OUT."""
    import torch
    import transformers

    size = 300 if asked.tiny else asked.tokens
    tokenizer = open_tokenizer(asked.train, size, work / "tokenizer.json")
    tokens, text_bytes = open_tokens(tokenizer, asked.train, work / "tokens.npy")
    begin = tokenizer.token_to_id(_BEGIN)
    rows, length = (4, 32) if asked.tiny else (_ROWS, _LENGTH)
    config = transformers.LlamaConfig(
        **(TINY_SIZES if asked.tiny else SIZES),
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=begin,
        eos_token_id=begin,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(device)
    ids = torch.from_numpy(tokens.astype(np.int64))
    training = Training(model, ids, (rows, length), begin)
    training.run(asked.seconds, work / "state.pt")
    held_out = asked.valid.read_bytes()[: 20_000 if asked.tiny else _HELD_OUT_BYTES]
    per_token = text_bytes / len(tokens)
    measured = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": training.step,
        "bytes": round(training.step * rows * (length - 1) * per_token),
        "bytes_per_token": per_token,
        "seconds": training.used,
        "bits": token_bits(model, tokenized(tokenizer, held_out), begin, length) / len(held_out),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    beside = work / "finished"
    shutil.rmtree(beside, ignore_errors=True)
    model.float().save_pretrained(beside)
    tokenizer.save(str(beside / "tokenizer.json"))
    (beside / "measured.json").write_text(json.dumps(measured) + "\n")
    os.replace(beside, asked.out)


# ---- tokens ---------------------------------------------------------------------------------


def open_tokenizer(paths: list[Path], size: int, file: Path) -> Any:
    """The byte-level BPE in `file`, or else one trained on `_TOKENIZER_BYTES` of the text."""
    import tokenizers

    if file.exists():
        return tokenizers.Tokenizer.from_file(str(file))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_BEGIN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = beginnings(paths, _TOKENIZER_BYTES).decode(errors="replace")
    tokenizer.train_from_iterator(text.splitlines(True), trainer)
    replace_file(file, tokenizer.to_str().encode())
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens of {len(text)} characters", flush=True)
    return tokenizer


def open_tokens(tokenizer: Any, paths: list[Path], file: Path) -> tuple[np.ndarray, int]:
    """The text's tokens, from `file` if they are there, and its bytes."""
    if not file.exists():
        text = b"\n".join(path.read_bytes() for path in paths)
        with replacing(file) as sink:
            np.save(sink, np.array(tokenized(tokenizer, text), np.uint32))
    tokens, text_bytes = np.load(file), sum(path.stat().st_size + 1 for path in paths) - 1
    print(f"text: {text_bytes} bytes, {len(tokens)} tokens", flush=True)
    return tokens, text_bytes


def beginnings(paths: list[Path], size: int) -> bytes:
    """Whole lines of texts, about so many bytes in all, as many of each."""
    texts = []
    for path in paths:
        with path.open("rb") as file:
            text = file.read(size // len(paths))
            texts.append(text + file.readline())
    return b"\n".join(texts)


def tokenized(tokenizer: Any, text: bytes) -> list[int]:
    lines, ids = text.decode(errors="replace").splitlines(True), list[int]()
    for start in range(0, len(lines), 10_000):  # an encoding is much larger than its ids
        for encoding in tokenizer.encode_batch_fast(lines[start : start + 10_000]):
            ids.extend(encoding.ids)
    return ids


# ---- the model ------------------------------------------------------------------------------


class Training:
    """A token model's training: its steps and seconds so far, and how it continues."""

    def __init__(self, model: Any, ids: Any, shape: tuple[int, int], begin: int) -> None:
        import torch

        self.model, self.step, self.used = model, 0, 0.0
        self._ids, (self._rows, self._length), self._begin = ids, shape, begin
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
        )
        self._source = torch.Generator().manual_seed(0)

    def run(self, seconds: float, file: Path) -> None:
        """Trains until so many seconds are used, from the state in `file` if there is one.

        The learning rate follows the share that is used: it rises over 2 % and falls along a
        cosine to 5 %. Saving does not count.
        """
        if file.exists():
            self._load(file)
            print(f"continuing at step {self.step}, {self.used:.0f} s", flush=True)
        begun, saved, told = time.monotonic() - self.used, self.used, self.used
        while self.used < seconds:
            part = self.used / seconds
            rate = min(1.0, part / 0.02 + 0.01) * (0.05 + 0.475 * (1 + math.cos(math.pi * part)))
            loss = self._take_step(1e-3 * rate)
            if self.step % 10 == 0 or self.model.device.type == "cpu":
                value = loss.item()  # waits for the device
                self.used = time.monotonic() - begun
                if self.used >= told + _TOLD_EVERY or self.used >= seconds:
                    told, where = self.used, f"{self.used:.0f} of {seconds:.0f} s"
                    print(f"step {self.step}, {where}: loss {value:.4f}", flush=True)
                if self.used >= saved + _SAVED_EVERY or self.used >= seconds:
                    self._save(file)
                    saved, begun = self.used, time.monotonic() - self.used

    def _take_step(self, rate: float) -> Any:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = rate
        device, size = self.model.device, self._length - 1
        starts = torch.randint(len(self._ids) - size, (self._rows,), generator=self._source)
        batch = torch.stack([self._ids[start : start + size] for start in starts.tolist()])
        batch = torch.cat([torch.full((self._rows, 1), self._begin), batch], dim=1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = self.model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def _save(self, file: Path) -> None:
        import torch

        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        state |= {"source": self._source.get_state(), "step": self.step, "used": self.used}
        with replacing(file) as sink:
            torch.save(state, sink)

    def _load(self, file: Path) -> None:
        import torch

        state = torch.load(file, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._source.set_state(state["source"])
        self.step, self.used = state["step"], state["used"]


def token_bits(model: Any, ids: list[int], begin: int, length: int) -> float:
    """Bits of a text, in windows that each begin anew."""
    import torch

    nats, model = 0.0, model.eval()
    *whole, last = torch.tensor(ids).split(length - 1)
    groups = [torch.stack(whole[i : i + 16]) for i in range(0, len(whole), 16)]
    for group in [*groups, last[None]]:
        rows = torch.cat([torch.full((len(group), 1), begin), group], dim=1).to(model.device)
        with torch.no_grad():
            logits = model(rows, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy
        nats += float(loss(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return nats / math.log(2)


if __name__ == "__main__":
    main()

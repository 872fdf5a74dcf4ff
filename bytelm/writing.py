"""The texts that generation writes, on the host: what may be given out, and why each one ended."""

from collections.abc import Sequence

import numpy as np

from bytelm.config import ByteVocab
from bytelm.generation.completion import Completion
from bytelm.generation.stops import StopScanner
from bytelm.sampling import require_sampled


class Texts:
    """The texts of a batch, one for each prompt; what arrays hold beyond them is not read."""

    def __init__(
        self, prompts: Sequence[bytes], max_new_bytes: int, stop: Sequence[bytes], vocab: ByteVocab
    ) -> None:
        self._vocab = vocab
        self._starts = [len(prompt) for prompt in prompts]
        self._ends = [start + max_new_bytes for start in self._starts]
        self._read = list(self._starts)
        self._ended = [False] * len(prompts)
        self._scanners = [StopScanner(stop) for _ in prompts]
        self.met = [False] * len(prompts)
        """Whether a stop text was met in each."""
        self._texts = [b""] * len(prompts)

    @property
    def done(self) -> bool:
        """Whether every text is complete."""
        return all(self._ended)

    def read(self, ids: np.ndarray, index: np.ndarray, done: np.ndarray) -> list[bytes]:
        """What of each text is new and certain.

        Its prompt and bytes are `ids` [B, L] up to `index` [B]; nothing follows where `done` [B].
        """
        return [self._piece(row, ids[row], index[row], done[row]) for row in range(len(self.met))]

    def _piece(self, row: int, ids: np.ndarray, index: int, done: bool) -> bytes:
        if self._ended[row]:
            return b""
        end = min(int(index), self._ends[row])
        fresh = written_bytes(ids[self._read[row] : end], self._vocab)
        self._read[row] = max(end, self._read[row])
        piece, self.met[row] = self._scanners[row].feed(fresh)
        if done and not self.met[row]:
            piece += self._scanners[row].finish()
        self._ended[row] = bool(done) or self.met[row]
        self._texts[row] += piece
        return piece

    def completions(
        self,
        ids: np.ndarray,
        log_probs: np.ndarray,
        rounds: np.ndarray,
        accepted: np.ndarray,
        drafted: int,
    ) -> list[Completion]:
        """The texts, once all are complete; `log_probs` is [B, L], or [B, 0] for none.

        `rounds` and `accepted` are [B]; each round drafted `drafted` bytes.
        """
        found = []
        for row, (start, text) in enumerate(zip(self._starts, self._texts, strict=True)):
            written = ids[row, start : self._ends[row]]
            at_eos = len(text) < len(written) and written[len(text)] == self._vocab.eos_id
            end = "stop" if self.met[row] else "eos" if at_eos else "length"
            kept = log_probs[row, start : start + len(text)] if log_probs.shape[1] else None
            counts = int(rounds[row]), int(rounds[row]) * drafted, int(accepted[row])
            found.append(Completion(text, kept, end, *counts))
        return found


def written_bytes(ids: np.ndarray, vocab: ByteVocab) -> bytes:
    """The bytes up to end-of-sequence; raises `ValueError` where logits were not finite."""
    ended = np.flatnonzero(ids == vocab.eos_id)
    kept = ids[: ended[0]] if ended.size else ids
    require_sampled(kept.tolist(), vocab)
    return (kept - vocab.offset).astype(np.uint8).tobytes()

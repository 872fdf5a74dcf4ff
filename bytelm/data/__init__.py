"""Bytes on disk become windows of ids: corpora, prepared files, split, windows, shuffle."""

from bytelm.data.corpus import MAGIC, Corpus, SourceFile, memory_corpus, open_corpus
from bytelm.data.prepared import Prepared, prepare
from bytelm.data.split import split
from bytelm.data.windows import Windows, evaluation_batches, scored_windows

__all__ = [
    "MAGIC",
    "Corpus",
    "Prepared",
    "SourceFile",
    "Windows",
    "evaluation_batches",
    "memory_corpus",
    "open_corpus",
    "prepare",
    "scored_windows",
    "split",
]

"""Bytes on disk become windows of ids: forms of text, corpora, split, windows, shuffle."""

from bytelm.data.corpus import Corpus, SourceFile, memory_corpus, open_corpus
from bytelm.data.packing import prepare
from bytelm.data.prepared import MAGIC, Prepared
from bytelm.data.split import FEWEST_DOCUMENTS, split
from bytelm.data.windows import Windows, evaluation_batches, scored_windows

__all__ = [
    "FEWEST_DOCUMENTS",
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

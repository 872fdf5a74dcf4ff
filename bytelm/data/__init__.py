"""Bytes on disk become windows of ids: forms of text, corpora, split, windows, mixture, shuffle."""

from bytelm.data.batches import Batch, TrainingRows, evaluation_batches
from bytelm.data.corpus import Corpus, SourceFile, memory_corpus, open_corpus
from bytelm.data.mixture import Mixture
from bytelm.data.packing import prepare
from bytelm.data.prepared import MAGIC, Prepared
from bytelm.data.sources import named_paths
from bytelm.data.split import FEWEST_DOCUMENTS, split
from bytelm.data.windows import Windows, scored_windows

__all__ = [
    "FEWEST_DOCUMENTS",
    "MAGIC",
    "Batch",
    "Corpus",
    "Mixture",
    "Prepared",
    "SourceFile",
    "TrainingRows",
    "Windows",
    "evaluation_batches",
    "memory_corpus",
    "named_paths",
    "open_corpus",
    "prepare",
    "scored_windows",
    "split",
]

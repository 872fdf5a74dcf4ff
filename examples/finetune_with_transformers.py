"""Fine-tuning an export in PyTorch with transformers' Trainer.

    python examples/finetune_with_transformers.py exports/example --data README.md

What the Trainer saves is an export again: `bytelm import`, `bytelm parity` and both packages'
`from_pretrained` read it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

import bytelm_torch
from bytelm.data import Windows, open_corpus
from bytelm_torch import hf

parser = argparse.ArgumentParser(description="Fine-tunes an export in PyTorch.")
parser.add_argument("export", type=Path, help="a folder that `bytelm export` wrote")
parser.add_argument("--data", type=Path, nargs="+", default=[Path("README.md")])
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--length", type=int, default=128, help="bytes in a row")
parser.add_argument("--out", type=Path, default=Path("exports/finetuned"))
options = parser.parse_args()

native = bytelm_torch.from_pretrained(options.export)
corpus = open_corpus(options.data)
before = bytelm_torch.evaluate(native, corpus, options.length).bits_per_byte

# Labels of -100 count for nothing: the padding that fills the last row.
windows = Windows(corpus, native.config.vocab, options.length, append_eos=True)
ids = torch.from_numpy(np.stack([windows[i] for i in range(len(windows))])).long()
labels = ids.masked_fill(ids == native.config.vocab.pad_id, -100)
rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]

model = hf.from_native(native)  # the same parameters behind the interface of transformers
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    train_dataset=rows,
)
trainer.train()
model.save_pretrained(options.out)

after = bytelm_torch.from_pretrained(options.out)
result = bytelm_torch.evaluate(after, corpus, options.length)
print(f"{before:.3f} bits per byte before, {result.bits_per_byte:.3f} after: wrote {options.out}")

"""What `standalone.py` runs in an environment with torch and transformers alone: see there."""

import importlib.util
import sys
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

MOST = 1e-6
"""The largest difference of logits in float32."""


def load(folder: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def made(model: Any, inputs: Any, row: int, known: Any, **options: Any) -> bytes:
    """The bytes by which row `row` of `inputs` is continued."""
    start, eos = inputs["input_ids"].shape[1], model.config.eos_token_id
    options |= {"max_new_tokens": int(known["new"]), "do_sample": False}
    found = model.generate(**inputs, **options)[row, start:].tolist()
    found = found[: found.index(eos)] if eos in found else found
    return bytes(i - int(known["offset"]) for i in found)


def check_generation(folder: str, model: Any, tokenizer: Any, known: Any) -> int:
    """Compares bytes; how many there were."""
    texts = [str(text) for text in known["texts"]]
    want = [known[f"made{i}"].tobytes() for i in range(len(texts))]
    for text, expected in zip(texts, want, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        ids = inputs.input_ids[0].tolist()
        assert ids == [byte + int(known["offset"]) for byte in text.encode()], f"ids of {text!r}"
        assert tokenizer.decode(ids) == text, f"text of {text!r}"
        for cached in (True, False):
            again = made(model, inputs, 0, known, use_cache=cached)
            assert again == expected, f"use_cache={cached}: bytes differ"
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    for row, expected in enumerate(want):
        assert made(model, inputs, row, known) == expected, "bytes of a padded batch differ"
    write = pipeline("text-generation", model=folder, trust_remote_code=True)
    options = {"max_new_tokens": int(known["new"]), "do_sample": False}
    text = write(texts[0], return_full_text=False, **options)[0]["generated_text"]
    assert text == want[0].decode("utf-8", "replace"), "pipeline: text differs"
    return sum(map(len, want))


def check_training(model: Any, tokenizer: Any, known: Any, place: str) -> float:
    """A step of Trainer, then saving and loading what it made; the loss."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    rows: Any = [{"input_ids": row} for row in known["ids"].tolist()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(place, save_strategy="no", **options, **quiet),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    loss = trainer.train().training_loss
    same = [name for name, p in model.named_parameters() if torch.equal(before[name], p.detach())]
    assert np.isfinite(loss) and len(same) < len(before) / 2, f"Trainer: {len(same)} unchanged"
    trainer.save_model(f"{place}/saved")
    tokenizer.save_pretrained(f"{place}/saved")
    again, tokens = load(f"{place}/saved")  # the code went along
    ids = torch.from_numpy(known["ids"])
    assert torch.equal(logits_of(again, ids), logits_of(model, ids)), "saved and loaded: differs"
    expected = [byte + int(known["offset"]) for byte in b"<eos>"]
    assert tokens("<eos>").input_ids == expected, "saved tokenizer: <eos> became a special id"
    return loss


def check(folder: str) -> str:
    """One line about a folder; raises what is wrong."""
    known = np.load(f"{folder}.npz")
    model, tokenizer = load(folder)
    ids = torch.from_numpy(known["ids"])
    error = float((logits_of(model, ids) - torch.from_numpy(known["logits"])).abs().max())
    assert error <= MOST, f"logits differ by {error:.1e}"
    count = check_generation(folder, model, tokenizer, known)
    with tempfile.TemporaryDirectory() as place:
        loss = check_training(model, tokenizer, known, place)
    return f"logits within {error:.1e}, {count} bytes, loss {loss:.3f}"


def main() -> int:
    for name in ("bytelm", "bytelm_torch", "bytelm_jax", "jax", "flax", "jaxtyping"):
        assert importlib.util.find_spec(name) is None, f"{name} is installed here"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"python {sys.version.split()[0]}, {versions}", flush=True)
    bad = 0
    for folder in sys.argv[1:]:
        try:
            line = f"good: {check(folder)}"
        except Exception as error:
            bad += 1
            line = f"BAD: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{folder.rpartition('/')[2]}: {line}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

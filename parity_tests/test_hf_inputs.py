"""The wrapper for transformers honours what it is given, or refuses it by name."""

import functools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import bytelm_torch
from bytelm import tolerances
from bytelm.sampling import SamplerConfig
from bytelm.tokenizer import ByteTokenizer
from bytelm_torch.inference.generate import generate
from bytelm_torch.interop import transformers as hf
from parity_tests.tiny_models import CONFIGS

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 0, 0, 1, 1, 1, 0],
        [0, 0, 1, 0, 1, 1, 0, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
"""Holes, padding on either side and on both, a row of one byte and one of none."""


@functools.cache
def wrapped(name: str) -> Any:
    torch.manual_seed(0)
    return hf.from_native(bytelm_torch.build_model(CONFIGS[name]).eval())


def ids_for(model: Any, rows: int = len(MASK), columns: int = 10) -> Tensor:
    """Bytes everywhere, in what is masked, too."""
    source = torch.Generator().manual_seed(1)
    return (
        torch.randint(97, 122, (rows, columns), generator=source)
        + model.config.to_native().vocab.offset
    )


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm()) <= tolerances.OTHER_PLACE["float32"] * float(theirs.norm())


def alone(model: Any, ids: Tensor) -> Tensor:
    """[T + 1, V]: what may follow none of the ids [T], the first, and so on."""
    return model.model(torch.nn.functional.pad(ids[None], (0, 1), value=9))[0]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_mask_leaves_out_counts_nowhere(name: str) -> None:
    model = wrapped(name)
    ids, real = ids_for(model), MASK.bool()
    whole = model(ids, MASK).logits
    first = model(ids, MASK.float(), use_cache=True)
    for row in range(len(ids)):
        expected = alone(model, ids[row, real[row]])
        assert_close(whole[row], expected[real[row].cumsum(dim=0)])
        assert_close(first.logits[row, 0], expected[-1])
    labels = ids.masked_fill(~real, -100)
    balance = model(ids, MASK, labels=torch.full_like(ids, -100)).loss
    loss = model(ids, MASK, labels=labels).loss - balance
    nats, count = 0.0, 0
    for row in range(len(ids)):
        scored = [i for i in range(1, 10) if real[row, i]]
        logs = alone(model, ids[row, real[row]]).log_softmax(dim=-1)
        place = real[row].cumsum(dim=0) - 1
        nats -= sum(float(logs[place[i], ids[row, i]]) for i in scored)
        count += len(scored)
    assert float(loss) == pytest.approx(nats / count, rel=tolerances.OTHER_PLACE["float32"])
    vocab = CONFIGS[name].vocab
    prompts = [bytes((ids[row, real[row]] - vocab.offset).tolist()) for row in range(len(ids))]
    expected = generate(model.model, prompts, 7, SamplerConfig(sampler="greedy"))
    for cached in (True, False):
        made = model.generate(
            ids, attention_mask=MASK, max_new_tokens=7, do_sample=False, use_cache=cached
        )
        assert [ByteTokenizer(vocab).to_bytes(row.numpy()) for row in made[:, 10:]] == expected


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_turn_behind_a_row_that_ended_early(name: str) -> None:
    model = wrapped(name)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    ids = ids_for(model, rows=3, columns=6)
    first = model.generate(ids, max_new_tokens=5, **options)
    # Row 1 is said to have ended three bytes early, row 2 all five.
    mask = torch.ones_like(first.sequences)
    mask[1, -3:], mask[2, -5:] = 0, 0
    both = torch.cat([first.sequences, ids_for(model, rows=3, columns=4).flip(1)], dim=1)
    whole = torch.nn.functional.pad(mask, (0, 4), value=1)
    fresh = model.generate(both, attention_mask=whole, max_new_tokens=6, **options)
    past = first.past_key_values
    again = model.generate(
        both, attention_mask=whole, past_key_values=past, max_new_tokens=6, **options
    )
    assert torch.equal(again.sequences, fresh.sequences)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_past_is_read_whatever_use_cache_says(name: str) -> None:
    model = wrapped(name)
    ids, new = ids_for(model), ids_for(model).flip(1)[:, :3]
    real, more = MASK, torch.tensor([[1, 0, 1]]).expand(len(MASK), 3)
    mask = torch.cat([real, more], dim=1)
    for use in (None, False, True):
        past = model(ids, real, use_cache=True).past_key_values
        output = model(new, mask, past_key_values=past, use_cache=use)
        assert output.past_key_values is past and past.get_seq_length() == 13
        whole = model(torch.cat([ids, new], dim=1), mask).logits[:, 10:]
        assert_close(output.logits, whole)
    with pytest.raises(ValueError, match=r"^labels: a loss has no cache; "):
        model(new, past_key_values=past, labels=new)
    with pytest.raises(ValueError, match=r"^past_key_values=DynamicCache: give the cache of an e"):
        model(new, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"^input_ids: 2 rows; the cache has 6"):
        model(new[:2], past_key_values=past)
    with pytest.raises(ValueError, match=r"^attention_mask: shape \(6, 3\); expected \(6, 16\)"):
        model(new, more, past_key_values=past)
    assert past.get_seq_length() == 13


@torch.no_grad()
def test_positions_are_those_of_one_text_a_row() -> None:
    model = wrapped("entropy")
    ids, real = ids_for(model), MASK.bool()
    positions = (MASK.cumsum(dim=1) - 1).masked_fill(~real, 0)
    expected = model(ids, MASK).logits
    assert torch.equal(model(ids, MASK, position_ids=positions).logits, expected)
    rows = torch.arange(10)[None]
    assert torch.equal(model(ids, position_ids=rows).logits, model(ids).logits)
    past = model(ids, MASK, position_ids=positions, use_cache=True).past_key_values
    mask = torch.nn.functional.pad(MASK, (0, 1), value=1)
    model(ids[:, :1], mask, position_ids=MASK.sum(dim=1, keepdim=True), past_key_values=past)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]).expand(len(ids), 10)
    problem = "position_ids: 0 in row 0, column 4, where the id is number 4 of its row; "
    for options in ({}, {"use_cache": True}, {"labels": ids}):
        with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
            model(ids, position_ids=packed, **options)
    with pytest.raises(ValueError, match=r"^position_ids: shape \(1, 3\); expected \(6, 10\)"):
        model(ids, position_ids=rows[:, :3])


@torch.no_grad()
def test_what_nobody_reads_is_refused() -> None:
    model = wrapped("megabyte")
    ids = ids_for(model)
    model(ids, inputs_embeds=None, output_attentions=False)
    for name, value in (
        ("inputs_embeds", torch.zeros(1, 2, 3)),
        ("output_hidden_states", True),
        ("cu_seq_lens_q", torch.tensor([0, 4, 10])),
        ("atention_mask", MASK),
    ):
        with pytest.raises(ValueError, match=f"^{name}: these models have no such argument; "):
            model(ids, **{name: value})
    for given in (ids > 3, ids.float()):
        for options in ({}, {"use_cache": True}):
            with pytest.raises(ValueError, match=r"^ids: dtype (bool|float32); give integers"):
                model(given, **options)
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"^ids: dtype float32; give integers"):
        model(ids[:, :1].float(), past_key_values=past)
    with pytest.raises(ValueError, match=r"^ids: 512 is outside the vocabulary; "):
        model(torch.full_like(ids, 512), past_key_values=past)
    narrow = model(ids.to(torch.uint8)[:, :1], past_key_values=past).logits
    assert torch.equal(narrow, model(ids, use_cache=True).past_key_values.extend(ids[:, :1]))
    for mask, problem in (
        (MASK[:, 1:], r"shape \(6, 9\); expected \(6, 10\)"),
        (MASK[:, None], r"shape \(6, 1, 10\); expected \(6, 10\)"),
        ((1 - MASK) * torch.finfo(torch.float32).min, "must hold 0 for padding and 1 for ids"),
    ):
        for options in ({}, {"use_cache": True}):
            with pytest.raises(ValueError, match=f"^attention_mask: {problem}"):
                model(ids, mask, **options)
    with pytest.raises(ValueError, match=r"^labels: shape \(6, 9\); expected \(6, 10\)"):
        model(ids, labels=ids[:, 1:])
    for given in (None, [1, 2]):
        kind = type(given).__name__
        with pytest.raises(ValueError, match=rf"^input_ids={kind}: give a tensor of ids"):
            model(given)
    assert isinstance(model(ids, return_dict=False), tuple)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile imports such
def test_of_a_compiled_model_what_is_inside_is_wrapped(tmp_path: Any) -> None:
    native = wrapped("entropy").model
    hf.from_native(torch.compile(native)).save_pretrained(tmp_path)
    again = bytelm_torch.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in native.state_dict().items())


@torch.no_grad()
def test_padding_takes_no_room() -> None:
    model = wrapped("megabyte")
    limit, ids = 32, ids_for(model, rows=2, columns=40)
    mask = torch.zeros_like(ids)
    mask[0, 29:39], mask[1, 3:13] = 1, 1
    for options in ({}, {"use_cache": True}):
        logits = model(ids, mask, **options).logits
        for row, start in enumerate((29, 3)):
            expected = alone(model, ids[row, start : start + 10])
            assert_close(logits[row, -1], expected[-1])
    made = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    assert made.shape == (2, 49)
    mask[0, :33] = 1
    for options in ({}, {"use_cache": True}, {"labels": ids}):
        with pytest.raises(ValueError, match=rf"max_length={limit}"):
            model(ids, mask, **options)


@torch.no_grad()
def test_a_row_as_long_as_the_model_allows_has_logits_for_all_its_labels() -> None:
    model = wrapped("megabyte")
    ids = ids_for(model, rows=2, columns=32)
    output = model(ids, labels=ids)
    assert output.logits.shape == (2, 32, 512)
    assert_close(output.logits[:, :-1], model.model(ids)[:, 1:])
    assert output.logits[:, -1].isnan().all()
    nats = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert float(output.loss) == pytest.approx(float(nats), rel=tolerances.LOGITS["float32"])
    mask = torch.ones_like(ids)
    mask[1, 5:9] = 0
    logits = model(ids, mask, labels=ids).logits
    assert logits.shape == (2, 32, 512) and logits[1].isfinite().all()
    with pytest.raises(ValueError, match=r"^max_length=32: no room to predict what follows 32 ids"):
        model(ids)


@torch.no_grad()
@pytest.mark.parametrize("name", [*CONFIGS, "space"])
def test_cached_logits_under_autocast(name: str) -> None:
    if name == "space":
        torch.manual_seed(0)
        config: Any = CONFIGS["blt"]
        native = bytelm_torch.build_model(replace(config, patcher="space")).eval()
        model = hf.from_native(native)
    else:
        model = wrapped(name)
    ids = ids_for(model, rows=2, columns=14)
    ids[0, 2::4] = ord(" ") + model.config.to_native().vocab.offset
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model(ids).logits[:, 4:].log_softmax(dim=-1)
        past = model(ids[:, :4], use_cache=True).past_key_values
        steps = model(ids[:, 4:], past_key_values=past).logits.log_softmax(dim=-1)
    assert whole.dtype == steps.dtype == torch.float32
    nats = (whole.exp() * (whole - steps)).sum(dim=-1).mean()
    assert float(nats) <= tolerances.BF16_MEAN_KL


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_in_part_is_refused(name: str, tmp_path: Any) -> None:
    wrapped(name).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    first, value = sorted(whole.items())[0]
    for damaged, problem in (
        ({n: v for n, v in whole.items() if n != first}, f"{first}: missing; "),
        (whole | {"more": value.clone()}, "more: unexpected; "),
        (whole | {first: value[:1].clone()}, rf"{first}: shape \(1,.*\); expected \("),
        (whole | {first: value * torch.nan}, f"{first}: holds NaN or infinity; "),
    ):
        save_file(damaged, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: {problem}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(whole, file, {"format": "pt"})
    auto: Any = AutoModelForCausalLM
    _, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with pytest.raises(ValueError, match=rf"^{first}: holds NaN or infinity; "):
        wrapped(name).load_state_dict(whole | {first: value * torch.inf})

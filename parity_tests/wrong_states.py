"""State dicts of MEGABYTE that are wrong, each in its own way."""

from __future__ import annotations

from typing import Any

import torch


def missing(state: dict[str, Any]) -> None:
    del state["l_transformer.layers.1.1.4.bias"]


def unknown(state: dict[str, Any]) -> None:
    state["l_transformer.layers.1.0.rotary.freqs"] = torch.zeros(4)


def gap(state: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith("g_transformer.layers.1.")]:
        state[name.replace("layers.1.", "layers.7.")] = state.pop(name)


def half_prefixed(state: dict[str, Any]) -> None:
    state["inner_model.to_logits.bias"] = state.pop("to_logits.bias")


def one_layer_differs(state: dict[str, Any]) -> None:
    state["g_transformer.layers.1.0.to_kv.weight"] = torch.zeros(8, 32)


def other_head_width(state: dict[str, Any]) -> None:
    state["l_transformer.layers.0.0.to_q.weight"] = torch.zeros(12, 16)
    state["l_transformer.layers.0.0.to_kv.weight"] = torch.zeros(8, 16)


def odd_rows(state: dict[str, Any]) -> None:
    state["l_transformer.layers.0.0.to_kv.weight"] = torch.zeros(15, 16)


def torn_width(state: dict[str, Any]) -> None:
    state["g_embedder.weight"] = torch.zeros(300, 7)


def not_a_matrix(state: dict[str, Any]) -> None:
    state["gl_linear.1.weight"] = torch.zeros(16)


def no_embedding(state: dict[str, Any]) -> None:
    del state["g_embedder.weight"]


def integer(state: dict[str, Any]) -> None:
    state["to_logits.bias"] = torch.zeros(300, dtype=torch.int64)


def eight_bits(state: dict[str, Any]) -> None:
    state["to_logits.bias"] = torch.zeros(300).to(torch.float8_e4m3fn)


def complex_numbers(state: dict[str, Any]) -> None:
    state["to_logits.bias"] = torch.zeros(300, dtype=torch.complex64)


def not_a_tensor(state: dict[str, Any]) -> None:
    state["to_logits.bias"] = [0.0] * 300


def pretending(state: dict[str, Any]) -> None:
    state["to_logits.bias"] = torch.zeros(1).expand(300)


def sparse(state: dict[str, Any]) -> None:
    state["to_logits.bias"] = torch.zeros(300).to_sparse()


def spoiled(state: dict[str, Any]) -> None:
    state["to_logits.bias"] = torch.full((300,), torch.nan)


def numbered(state: dict[Any, Any]) -> None:
    state[7] = torch.zeros(1)

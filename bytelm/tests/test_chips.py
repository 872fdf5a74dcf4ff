"""The table of accelerators, asked by the names that devices report."""

import pytest

from bytelm.chips import CHIPS, chip_of, find_chip, peak_flops, unknown_peak


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        # libtpu 0.0.42.1, by `jax.experimental.topologies`
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"),
        ("TPU7x", "v7"),
        # further names that JAX knows (`jax._src.pallas.mosaic.tpu_info`)
        ("TPU v5e", "v5e"), ("TPU v5p", "v5p"), ("TPU v6e", "v6e"),
        # NVIDIA's drivers
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)  # fmt: skip
def test_a_device_is_known_by_the_name_that_it_reports(reported, name):
    chip = chip_of(reported)
    assert chip is not None and chip.name == name
    assert peak_flops(reported) == chip.peak and not unknown_peak(reported)
    assert chip.platform == ("tpu" if reported.startswith("TPU") else "gpu")


@pytest.mark.parametrize(
    "reported",
    ["TPU v3", "TPU v4 lite", "TPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"],
)  # fmt: skip
def test_less_than_a_known_chip_is_unknown(reported):
    assert chip_of(reported) is None and unknown_peak(reported)


def test_an_unknown_device_says_so_in_words():
    assert peak_flops("NVIDIA T4") is None
    (line,) = unknown_peak("NVIDIA T4")
    assert "no mfu is reported" in line and "'NVIDIA T4'" in line and "RTX 4090" in line
    assert not unknown_peak("cpu")


@pytest.mark.parametrize(
    ("asked", "name"),
    [("v5e", "v5e"), ("TPU v5e", "v5e"), ("TPU v5p", "v5p"), ("TPU v4", "v4"), ("tpu7x", "v7"),
     ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("h100", "H100"), ("4090", "RTX 4090")],
)  # fmt: skip
def test_a_chip_is_found_by_every_name_that_people_give_it(asked, name):
    assert find_chip(asked).name == name


def test_each_chip_has_one_name():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert len({chip.reported for chip in CHIPS}) == len(CHIPS)
    for name in ("Z80", "", "TPU", "v"):
        with pytest.raises(ValueError, match="unknown; choose one of H100"):
            find_chip(name)

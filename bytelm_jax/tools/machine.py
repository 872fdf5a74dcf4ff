"""The machine that a dry run assumes; needs no JAX, so that a command line is parsed quickly."""

import math
from typing import NamedTuple

from bytelm.chips import CHIPS, find_chip

LINK_GBYTES = 50.0
"""Gigabytes per second from device to device: 400 Gbit/s InfiniBand for each GPU."""


class Machine(NamedTuple):
    """The assumptions of the time estimate: a chip, its utilisation, the link between chips."""

    chip: str = CHIPS[0].name
    mfu: float = 0.4
    link_gbytes: float = LINK_GBYTES

    def check(self) -> None:
        """Raises `ValueError` for an unknown chip and for impossible utilisations and speeds."""
        find_chip(self.chip)
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu}: must be above 0 and at most 1")
        if not 0 < self.link_gbytes < math.inf:
            raise ValueError(f"link_gbytes={self.link_gbytes}: must be a number above 0")

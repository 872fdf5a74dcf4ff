"""Generation: sampling and cached decoding."""

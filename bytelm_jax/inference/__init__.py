"""Generation: sampling, cached decoding, compiled programs."""

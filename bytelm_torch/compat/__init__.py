"""The names of three earlier projects, for their examples: `bytropix`, `lfbyte`, `megabyte`.

Only import lines change. The models are this library's; weights of the originals are another
matter, for `bytelm import`.
"""

"""The one tolerance table. No test holds a number of its own.

A bound is relative, ‖a − b‖ / ‖b‖, unless its name says otherwise. What is exact is compared with
equality. float64 is the verdict; float32 runs at the highest matmul precision.
The first two bounds are those of `bytelm parity`.
"""

LOGITS = {"float64": 1e-12, "float32": 1e-5}
"""Layers, logits and loss of the twins; integers and booleans must be equal."""

GRADIENTS = {"float64": 1e-10, "float32": 5e-5}
"""Every gradient of the twins."""

OTHER_PLACE = {"float64": 1e-12, "float32": 1e-5}
"""The same values at another place: rows in another order, another batch size, bucket or length.

Where a value stands in an array decides which code computes it: on some processors a BLAS has other
kernels for the last rows of a matrix, the last elements of an array that fill no vector get scalar
code, threads cut at other places, and XLA tiles by shape. So exactness at another place is a
property of a library and a processor, not of the model. What keeps its shape and place is compared
with equality: a changed future and changed neighbours move nothing.
"""

GELU_SHARE = 4e-5
"""Relative error of the normal distribution by which a 16-bit GELU multiplies: a fiftieth of
bfloat16's rounding."""

BF16_LINEAR = 2**-7
"""A linear layer behind a norm in bfloat16, from float64's: two roundings of a number."""

AFTER_200_STEPS = 1e-8
"""Parameters after 200 optimizer steps in float64, same bytes."""

BF16_MEAN_KL = 1e-3
"""Mean KL divergence (nats per byte) of bfloat16 logits from float32 logits."""

BF16_TOP1 = 0.99
"""Least share of positions at which bfloat16 and float32 agree on the likeliest byte."""

DEVICES_AFTER_5_STEPS = 1e-5
"""One device against eight, and jit against shard_map, in float32."""

GOLDEN_LOSS = 1e-5
"""The recorded list of 20 losses, relative, at the pinned versions."""

BF16_LOSS = 1e-2
"""The loss under torch's autocast to bfloat16, relative to float32's."""

PEAK_MEMORY = 0.2
"""A dry run's estimate of the peak memory of one H100, relative to the measured peak."""

STANDALONE_LOGITS = 1e-6
"""Logits of the code that is exported beside a model, and of the model, in float32."""

STANDALONE_LOGITS = 1e-6
"""Logits of the code that is exported beside a model, and of the model, in float32."""

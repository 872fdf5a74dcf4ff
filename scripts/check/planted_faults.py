"""Plants one fault after another into the torch twin: does `bytelm parity` name the right layer?

    python scripts/check/planted_faults.py  # a table: fault, the layer named, right, exit code

Exits 1 when a fault goes unnoticed or another layer is named. The faults: `parity_tests/faults.py`.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from parity_tests.faults import FAULTS, MODELS, Bench, named


def main() -> int:
    """Prints the table."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in MODELS:
            print(f"no fault | {name} | {bench.run(name, None)}", flush=True)
        for what, name, expected, plant in FAULTS:
            code, line = bench.run(name, plant)
            right = code == 1 and named(line) == expected
            wrong += not right
            print(f"{what} | {name} | {named(line)} | {'right' if right else 'WRONG'} | {code}")
    print(f"{len(FAULTS) - wrong} of {len(FAULTS)} named rightly")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

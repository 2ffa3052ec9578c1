"""Convert a checkpoint to several schemes and score them side by side, in one pass over the text.

python examples/compare_schemes.py [SOURCE]
"""

import sys

import v4quant

source = sys.argv[1] if len(sys.argv) > 1 else "builtin:tiny-v4"
outs = []
for scheme in ("int4-g128", "int3-g128", "q3_k"):
    outs.append(v4quant.quantize(source, f"compared-{scheme}", scheme=scheme).output)

first, *others = outs
found = v4quant.evaluate(
    first, reference=source, candidates=others, corpus="builtin:heldout", tokens=256, weights=False
)
for row in found.candidates:
    made = row.candidate
    print(f"{made.scheme:10} {made.bytes:>12,} B  {row.distance.kl_mean:.2e}")

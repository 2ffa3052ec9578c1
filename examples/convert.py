"""Convert a checkpoint to 4-bit integers, verify it, and say what it cost.

python examples/convert.py [SOURCE [OUT]]
"""

import sys

import v4quant

source, out = (*sys.argv[1:], *("builtin:tiny-v4", "int4")[len(sys.argv) - 1 :])
done = v4quant.quantize(source, out, scheme="int4-g32", progress=v4quant.BarProgress())
check = v4quant.verify(out, source=source)
cost = v4quant.evaluate(out, reference=source, corpus="builtin:heldout", tokens=256)

print(f"{done.bytes_in / 1e9:.2f} GB -> {done.bytes_out / 1e9:.2f} GB in {done.seconds:.0f} s")
print("verified" if check.ok else "DIFFERS from its manifest")
print(f"KL {cost.distance.kl_mean:.2e} nats per token, floor {cost.floor.kl_mean:.2e}")

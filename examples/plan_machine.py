"""Which files of a release a machine can serve, and the command that makes the best one.

python examples/plan_machine.py [RELEASE [MACHINE [RAM]]]
"""

import sys

import v4quant

release, machine, ram = (*sys.argv[1:], *("flash", "2x3090", "128GB")[len(sys.argv) - 1 :])
found = v4quant.plan(release, machine=machine, ram=ram)
for candidate in found.answer.candidates:
    print(f"{candidate.scheme:10} {candidate.size / 1e9:7.1f} GB in {candidate.engine}")
for line in found.commands[0].make if found.commands else found.answer.remedies:
    print(line)

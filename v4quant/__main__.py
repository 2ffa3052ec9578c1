"""`python -m v4quant` is the same as the `v4quant` command."""

from v4quant.cli import main

main()

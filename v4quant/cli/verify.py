"""`v4quant verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from v4quant.cli import _exit, _output
from v4quant.cli._source import SOURCE
from v4quant.kernel_check import check_kernels
from v4quant.source import Source
from v4quant.verify import verify as verify_checkpoint


@click.command(epilog="Example: v4quant verify out --source DeepSeek-V4-Flash --kernels")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--source", type=SOURCE, help="Compare every value with this.")
@click.option("--kernels", is_flag=True, help="Run the Triton kernels on sampled tensors of OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify(
    ctx: click.Context, out: Path, source: Source | None, kernels: bool, as_json: bool
) -> None:
    """Check a converted checkpoint OUT: hashes, structure, exactness. Exit code 3: a difference."""
    progress = _output.TerminalProgress()
    result = verify_checkpoint(out, source, progress)
    checks = check_kernels(out, progress) if kernels else []
    failed = bool(result.findings) or not all(c.ok for c in checks)
    if as_json:
        _output.emit({**asdict(result), "kernels": [asdict(c) for c in checks], "ok": not failed})
    else:
        if not result.findings:
            _output.data(f"{result.files} files match their SHA-256")
        if source is not None and not result.findings:
            _output.data(
                f"{result.compared} modules compared with the source; {result.exact} hold exactly "
                "its values, the others the error the manifest states"
            )
        for check in checks:
            verdict = "ok" if check.ok else "DIFFERS"
            _output.data(
                f"kernel {check.name} ({check.scheme}): largest error {check.max_abs_error:.3g}, "
                f"bound {check.bound:.3g}: {verdict}"
            )
        for finding in result.findings:
            _output.data(f"{finding.where}: {finding.problem}")
        _output.data("FAILED" if failed else "All checks passed.")
    if failed:
        ctx.exit(_exit.DIFFERENT)

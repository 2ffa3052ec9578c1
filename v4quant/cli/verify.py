"""`v4quant verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import v4quant
from v4quant.cli import _exit, _output
from v4quant.cli._types import ADAPTER, SOURCE, Choice
from v4quant.sizes import human_bytes
from v4quant_formats.engines import ENGINES, GPUS

if TYPE_CHECKING:
    from v4quant import Verification
    from v4quant_formats.preflight import Preflight


@click.command(epilog="Example: v4quant verify out --source DeepSeek-V4-Flash --kernels")
@click.argument("out", type=SOURCE)
@click.option("--source", type=SOURCE, help="Compare every value with this.")
@click.option("--adapter", type=ADAPTER, help="With --source: the adapter merged into it.")
@click.option(
    "--same-as",
    type=SOURCE,
    help="Another conversion, a folder or repository, whose files must have the same digests.",
)
@click.option("--kernels", is_flag=True, help="Run the Triton kernels on sampled tensors of OUT.")
@click.option(
    "--engine",
    type=Choice(list(ENGINES)),
    help="Predict from headers whether this engine loads OUT; anybody's checkpoint will do.",
)
@click.option("--gpu", type=Choice(list(GPUS)), help="With --engine: GPUs it must run on.")
@click.option(
    "--tp", type=click.IntRange(1, 64), default=1, show_default=True, help="With --engine: GPUs."
)
@click.option(
    "--context",
    type=click.IntRange(1, 2**24),
    default=8192,
    show_default=True,
    help="With --engine: tokens to hold in the KV cache.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify(
    ctx: click.Context,
    out: str,
    source: str | None,
    adapter: str | None,
    same_as: str | None,
    kernels: bool,
    engine: str | None,
    gpu: str | None,
    tp: int,
    context: int,
    as_json: bool,
) -> None:
    """Check a converted checkpoint OUT: hashes, structure, exactness. Exit code 3: a difference.

    OUT may be a repository, hf://owner/name: the digests of its listing are then compared, and with
    --source or --kernels its shards are read.

    With --engine only headers, config.json and NVFP4's scalars are read, and exit code 3 means that
    the engine would not load it, or would load it wrongly; add --source for the rest.
    """
    found = v4quant.verify(
        out,
        source=source,
        adapter=adapter,
        same_as=same_as,
        kernels=kernels,
        engine=engine,
        gpu=gpu,
        tp=tp,
        context=context,
        progress=_output.TerminalProgress(),
    )
    if as_json:
        _output.emit(found.as_dict())
    else:
        _show(found, source is not None)
        if same_as is not None and found.ok:
            _output.data(f"Every file has the digest that {same_as} lists.")
    if not found.ok:
        ctx.exit(_exit.DIFFERENT)


def _show(found: Verification, compared: bool) -> None:
    if found.preflight is not None:
        _show_preflight(found.preflight)
    result = found.values
    if result is None:
        return
    if not result.findings:
        _output.data(f"{result.files} files match their SHA-256")
    if compared and not result.findings:
        _output.data(
            f"{result.compared} modules compared with the source; {result.exact} hold exactly "
            "its values, the others the error the manifest states"
        )
    for check in found.kernels:
        verdict = "ok" if check.ok else "DIFFERS"
        _output.data(
            f"kernel {check.name} ({check.scheme}): largest error {check.max_abs_error:.3g}, "
            f"bound {check.bound:.3g}: {verdict}"
        )
    for finding in result.findings:
        _output.data(f"{finding.where}: {finding.problem}")
    _output.data("All checks passed." if found.ok else "FAILED")


def _show_preflight(found: Preflight) -> None:
    for finding in found.findings:
        more = f" (and {finding.count - 1:,} more)" if finding.count > 1 else ""
        _output.data(f"{finding.severity}: {finding.tensor}{more}: {finding.problem}")
        if finding.severity != "note":
            _output.data(f"  remedy: {finding.remedy}")
    if found.memory is not None:
        memory = found.memory
        rows = [
            ("GPUs", ", ".join(_gpu(g) for g in found.gpus) or "none"),
            ("splits over", " or ".join(map(str, found.splits)) + " GPUs" if found.splits else "-"),
            (
                f"memory of one of {memory.tp}",
                f"{human_bytes(memory.weights)} weights, "
                f"{human_bytes(memory.kv_cache)} KV cache of {memory.context:,} tokens, "
                "and a few GB the engine needs itself",
            ),
        ]
        if memory.tables:
            size = human_bytes(memory.tables)
            rows.append(("host memory or disk", f"{size} of Engram tables, read by rows"))
        _output.data(_output.table(rows))
    title = ENGINES[found.engine].title
    _output.data(f"{title} should load it." if found.loads else f"{title} would NOT load it.")


def _gpu(name: str) -> str:
    return f"{name} ({GPUS[name]})" if name in GPUS else name

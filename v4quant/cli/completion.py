"""`v4quant completion`: what makes a shell complete commands, options, schemes and folders."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from v4quant.cli import _output
from v4quant.cli._types import Choice

SHELLS = ("bash", "zsh", "fish")


@click.command(epilog='Example: eval "$(v4quant completion bash)"    (in ~/.bashrc)')
@click.argument("shell", type=Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete v4quant's command lines.

    bash and zsh: eval "$(v4quant completion bash)" in ~/.bashrc or ~/.zshrc. fish: v4quant
    completion fish > ~/.config/fish/completions/v4quant.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows every shell of SHELLS"
    _output.exact(kind(ctx.find_root().command, {}, "v4quant", "_V4QUANT_COMPLETE").source())

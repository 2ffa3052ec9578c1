"""Kernels as Triton specialises them: by integers that are 1 or multiples of 16, and by addresses.

Triton makes an integer argument of 1 a compile-time constant, which is not a tensor and has no
methods, and remembers which integers and addresses are multiples of 16. The interpreter does
neither. So every kernel is taken to Triton's first intermediate form once for each integer that is
1, once with all of them 1, once with all of them multiples of 16, and once with addresses that are
none. That is where such a kernel fails, and it takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

ALIGNED = [["tt.divisibility", 16]]
OPTIONS = {"num_warps", "num_stages"}


@dataclass(frozen=True)
class Special:
    """What is known of a launch's arguments: integers that are 1, and multiples of 16."""

    name: str = ""
    ones: tuple[str, ...] = ()
    aligned_integers: bool = False
    aligned_pointers: bool = True


@dataclass(frozen=True)
class Launch:
    """A kernel with the types of its arguments, the constants among them, and options."""

    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    special: Special = field(default_factory=Special)

    @property
    def integers(self) -> list[str]:
        """Arguments that Triton would look at: integers that the kernel does not keep it from."""
        kept = {p.name for p in self.function.params if p.do_not_specialize}
        return [n for n, kind in self.types.items() if kind in {"i32", "i64"} and n not in kept]

    @property
    def options(self) -> dict[str, Any]:
        """Triton's own launch options."""
        return {k: v for k, v in self.constants.items() if k in OPTIONS}

    def source(self) -> ASTSource:
        """What Triton compiles for such a launch."""
        ones = dict.fromkeys(self.special.ones, 1)
        constants = {k: v for k, v in self.constants.items() if k not in OPTIONS} | ones
        types = {n: "constexpr" if n in ones else kind for n, kind in self.types.items()}
        attributes = {
            (i,): ALIGNED
            for i, (name, kind) in enumerate(types.items())
            if (kind.startswith("*") and self.special.aligned_pointers)
            or (name in self.integers and self.special.aligned_integers)
        }
        return ASTSource(fn=self.function, signature=types, constexprs=constants, attrs=attributes)


def specials(launch: Launch) -> Iterator[Special]:
    """Every way to look at a launch that the plain compilation does not take."""
    for name in launch.integers:
        yield Special(f"{name}=1", (name,))
    if launch.integers:
        yield Special("all integers 1", tuple(launch.integers))
        yield Special("integers of 16", aligned_integers=True)
    yield Special("addresses not of 16", aligned_pointers=False)


def first_form(launch: Launch, arch: int) -> str:
    """Triton's first intermediate form of a launch, optimised and inlined (TTIR).

    Raises what Triton raises for a kernel that does not compile.
    """
    return lowered(launch.source(), launch.options, arch)


def lowered(source: ASTSource, chosen: Mapping[str, Any], arch: int) -> str:
    """TTIR of a source under launch options. Raises what Triton raises."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(chosen))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    module = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    return str(stages["ttir"](module, dict(options.__dict__)))

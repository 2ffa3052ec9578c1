"""Whether a kernel's addresses and masks can leave 32 bits, proven on Triton's first form (TTIR).

Every integer of the kernel gets an interval: program numbers from the grid, arguments from the
sizes of a launch, loaded numbers from what their tensor may hold. An operation whose interval
leaves its type *wraps*. That is no fault in itself (decoding words does it on purpose), only where
the number goes on into an address or a mask, and those places are what `wrapped_addresses` lists.
What is not understood has the interval of its type, so anything computed from it wraps and the
proof fails instead of passing by ignorance. Numbers that a loop carries grow by at most as much in
each pass as in the first, which a second pass over the whole interval checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from intervals import EXACT, Value, fitted, limits

NAME = r"%[\w$.\-]+(?:#\d+)?"
_SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi",
         "arith.index_cast", "tt.split")  # fmt: skip
_JOIN = ("arith.select", "tt.join", "tt.cat")


@dataclass
class Node:
    """An operation and the regions it holds."""

    text: str
    regions: list[list[Node]] = field(default_factory=list)
    end: str = ""


@dataclass(frozen=True)
class Loop:
    """How a loop begins, and by what it ends.

    first: what it begins with, under the names `entry`; the body has it under the names `body`. Of
    a `while`, `forward` says what its condition hands to each, `counter` is the name of the one
    that stays below `bound`, if there is such a one. Of a `for`, passes is how often it runs.
    """

    entry: list[str]
    first: list[Value]
    body: list[str]
    forward: Mapping[str, str] = field(default_factory=dict)
    counter: str | None = None
    bound: str | None = None
    passes: int | None = None


def wrapped_addresses(
    form: str, arguments: Mapping[str, int], grid: Sequence[int], data: Mapping[str, Value]
) -> list[str]:
    """Addresses and masks that wrapped numbers reach, each with the operation that may wrap.

    arguments: every integer argument. data: what loads from an argument's tensor may give, by its
    name; anything of the element's type otherwise. Raises KeyError for an integer that is missing.
    """
    analysis = _Analysis(grid, data)
    body = parse(form, arguments, analysis.values)
    analysis.run(body)
    return sorted(analysis.problems)


def parse(form: str, arguments: Mapping[str, int], values: dict[str, Value]) -> list[Node]:
    """The tree of a kernel's operations; its arguments are put among `values`."""
    lines = iter(form.splitlines())
    for line in lines:
        if "tt.func" in line:
            for name, kind in re.findall(r"(%\w+): (\S+?)[ ,)]", line):
                if kind.startswith("!tt.ptr"):
                    values[name] = Value(0, 0, base=name[1:])
                elif re.fullmatch(r"i\d+", kind):
                    values[name] = Value(arguments[name[1:]], arguments[name[1:]])
            return _block(lines)[0]
    raise ValueError("no kernel in this text")


def _block(lines: Iterator[str]) -> tuple[list[Node], str]:
    """Operations up to the bracket that closes the region, and that line."""
    found: list[Node] = []
    for line in lines:
        text = re.sub(r"\s+loc\(.*$", "", line).strip() if "^bb" not in line else line.strip()
        if text.startswith("}"):
            return found, text
        if not text or text.startswith("#"):
            continue
        node = Node(text)
        closing = text
        while closing.endswith("{"):
            region, closing = _block(lines)
            node.regions.append(region)
        node.end = closing
        found.append(node)
    return found, ""


class _Analysis:
    """One walk over a kernel, in the order in which values are defined."""

    def __init__(self, grid: Sequence[int], data: Mapping[str, Value]) -> None:
        self.grid, self.data = grid, data
        self.values: dict[str, Value] = {}
        self.problems: set[str] = set()

    def run(self, nodes: list[Node]) -> list[Value]:
        """Walk a region; what its last operation hands on."""
        handed: list[Value] = []
        for node in nodes:
            text = node.text
            if text.startswith("^"):
                for name, kind in re.findall(r"(%\w+): (\S+?)(?:[,)]|$)", text):
                    self.values.setdefault(name, limits(kind))
            elif re.match(r"(scf\.yield|scf\.condition)", text):
                operands = re.sub(r"scf\.condition\(.*?\)", "", text)
                handed = [self.values[n] for n in re.findall(NAME, operands)]
            elif "scf.while" in text:
                self.loop(node, self._while(node))
            elif "scf.for" in text:
                self.loop(node, self._for(node))
            elif "scf.if" in text:
                self._if(node)
            else:
                self.step(node)
        return handed

    def define(self, text: str, results: Sequence[Value]) -> None:
        """Give an operation's results their names."""
        head = re.match(r"(%[\w$.\-]+)(?::(\d+))?(?:, %[\w$.\-]+)* = ", text)
        if head is None:
            return
        names = [head.group(1)]
        if head.group(2):
            names = [f"{names[0]}#{i}" for i in range(int(head.group(2)))]
        elif "," in head.group():
            names = re.findall(NAME, head.group())
            results = list(results) * (len(names) if len(results) == 1 else 1)
        for name, value in zip(names, results, strict=True):
            self.values[name] = value

    def step(self, node: Node) -> None:
        """An operation without loops."""
        text = node.text
        found = re.search(r"(?:= )?\"?((?:tt|arith|math)\.[\w.]+)\"?", text)
        if found is None:
            return
        operation, kind = found.group(1), (node.end or text).rsplit(" ", 1)[-1]
        right = text.split(" = ", 1)[-1].split(" : ")[0]
        inputs = [self.values[n] for n in re.findall(NAME, right) if n in self.values]
        if operation in {"tt.load", "tt.store"}:
            self._access(text, operation, kind, inputs)
        elif operation == "tt.addptr":
            self._report(text, inputs[1])
            self.define(text, [replace(inputs[0], wrapped=None)])
        else:
            self.define(text, [self._result(node, operation, kind, inputs)])

    def _access(self, text: str, operation: str, kind: str, inputs: list[Value]) -> None:
        masks = inputs[1:2] if operation == "tt.load" else inputs[2:3]
        for mask in masks:
            self._report(text, mask)
        if operation == "tt.load":
            element = re.sub(r"!tt\.ptr<(\w+)>", r"\1", kind)
            self.define(text, [self.data.get(inputs[0].base or "", limits(element))])

    def _report(self, text: str, value: Value) -> None:
        if value.wrapped:
            self.problems.add(f"{value.wrapped}  ->  {text}")

    def _result(self, node: Node, operation: str, kind: str, inputs: list[Value]) -> Value:
        text, every = node.text, limits(kind)
        wrapped = next((v.wrapped for v in inputs if v.wrapped), None)
        if operation in {"arith.constant", "tt.get_program_id", "tt.make_range", "tt.histogram"}:
            return self._origin(operation, text, every)
        if operation in {"tt.reduce", "tt.scan"}:
            return self._fold(node, inputs[0], wrapped, every)
        if operation == "arith.cmpi":
            return Value(0, 1, wrapped)
        if operation == "arith.trunci":
            return fitted(inputs[0], every, text)
        if operation == "arith.extui" and inputs[0].low >= 0:
            return inputs[0]
        if not inputs:
            return every
        if operation in _SAME:
            return inputs[0]
        if operation in _JOIN:
            chosen = inputs[1:] if operation == "arith.select" else inputs
            result = chosen[0]
            for other in chosen[1:]:
                result = result.joined(other)
            return replace(result, wrapped=result.wrapped or wrapped)
        exact = EXACT.get(operation)
        if exact is None or len(inputs) < 2:
            return replace(every, wrapped=wrapped)
        low, high = exact(*inputs[:2], every)
        return fitted(Value(low, high, wrapped), every, text)

    def _origin(self, operation: str, text: str, every: Value) -> Value:
        """What depends on no other interval."""
        if operation == "arith.constant":
            number = re.search(r"(?:dense<|constant )(-?\d+)\b(?!\.)", text)
            if "constant true" in text or "dense<true>" in text:
                return Value(1, 1)
            return Value(int(number[1]), int(number[1])) if number else every
        if operation == "tt.get_program_id":
            axis = "xyz".index(re.search(r"program_id (\w)", text)[1])  # type: ignore[index]
            return Value(0, self.grid[axis] - 1)
        if operation == "tt.histogram":
            return Value(0, _elements(text))
        end, start = (int(n) for n in re.findall(r"= (\d+) : i32", text))
        return Value(start, end - 1)

    def _fold(self, node: Node, value: Value, wrapped: str | None, every: Value) -> Value:
        """A reduction or a running sum, by what its region does with two elements."""
        inside = " ".join(n.text for n in node.regions[0])
        if re.search(r"arith\.(max|min)", inside):
            return value
        if "arith.addi" in inside:
            count = _elements(node.end)
            low, high = min(value.low, value.low * count), max(value.high, value.high * count)
            return fitted(Value(low, high, wrapped), every, node.text)
        return replace(every, wrapped=wrapped)

    def _if(self, node: Node) -> None:
        branches = [self.run(region) for region in node.regions]
        if branches[0]:
            pairs = zip(*branches, strict=True)
            self.define(node.text, [a.joined(b) for a, b in pairs])

    def _while(self, node: Node) -> Loop:
        pairs = re.findall(rf"({NAME}) = ({NAME})", node.text.split("scf.while", 1)[1])
        condition = node.regions[0][-1].text
        tested = re.search(r"condition\((%[\w\-]+)\)", condition)
        compared = next(
            (n.text for n in node.regions[0] if tested and n.text.startswith(f"{tested[1]} = ")), ""
        )
        less = re.search(rf"cmpi slt, ({NAME}), ({NAME})", compared)
        handed = re.findall(NAME, condition.split(")", 1)[1])
        body = re.findall(r"(%\w+): \S+", node.regions[1][0].text)
        forward = dict(zip(body, handed, strict=True))
        counter = next((b for b, h in forward.items() if less and h == less[1]), None)
        bound = less[2] if less and counter else None
        first = [self.values[start] for _, start in pairs]
        return Loop([name for name, _ in pairs], first, body, forward, counter, bound)

    def _for(self, node: Node) -> Loop:
        head = re.search(rf"scf\.for ({NAME}) = ({NAME}) to ({NAME}) step ({NAME})", node.text)
        assert head is not None, node.text
        low, high, step = (self.values[n] for n in head.groups()[1:])
        self.values[head[1]] = replace(low, high=max(low.low, high.high - 1))
        passes = max(0, -(-(high.high - low.low) // max(1, step.low)))
        carried = re.search(r"iter_args\((.*?)\)", node.text)
        pairs = re.findall(rf"({NAME}) = ({NAME})", carried[1]) if carried else []
        names = [name for name, _ in pairs]
        return Loop(names, [self.values[start] for _, start in pairs], names, passes=passes)

    def one_pass(
        self, node: Node, loop: Loop, entering: list[Value]
    ) -> tuple[list[Value], list[Value]]:
        """(what the body was given, what it hands on)."""
        self.values.update(zip(loop.entry, entering, strict=True))
        if loop.forward:
            self.run(node.regions[0])
            for name in loop.body:
                value = self.values[loop.forward[name]]
                if name == loop.counter and loop.bound:
                    most = self.values[loop.bound].high - 1
                    value = replace(value, high=max(value.low, min(value.high, most)))
                self.values[name] = value
        return [self.values[name] for name in loop.body], self.run(node.regions[-1])

    def passes(self, loop: Loop, inside: list[Value], handed: list[Value]) -> int | None:
        """The most passes there can be; None if nothing says so."""
        if loop.counter is None or loop.bound is None:
            return loop.passes
        at = loop.body.index(loop.counter)
        pace = handed[at].low - inside[at].low
        distance = self.values[loop.bound].high - loop.first[at].low
        return max(0, -(-distance // pace)) if pace > 0 else None

    def loop(self, node: Node, loop: Loop) -> None:
        """Widen what a loop carries to all its passes, check that, and define its results."""
        inside, handed = self.one_pass(node, loop, loop.first)
        if not handed:
            return
        passes = self.passes(loop, inside, handed)
        growth = [
            (max(0, i.low - h.low), max(0, h.high - i.high))
            for i, h in zip(inside, handed, strict=True)
        ]
        widened = []
        for value, hand, (down, up) in zip(loop.first, handed, growth, strict=True):
            mark = value.wrapped or hand.wrapped
            if passes is None and (down or up):
                mark = mark or f"a loop of unknown length: {node.text}"
            turns = passes or 0
            low, high = value.low - down * turns, value.high + up * turns
            widened.append(Value(low, high, mark, value.base))
        inside, handed = self.one_pass(node, loop, widened)
        results = []
        for value, inner, hand, (down, up) in zip(widened, inside, handed, growth, strict=True):
            faster = hand.high - inner.high > up or inner.low - hand.low > down
            mark = f"growth that speeds up: {node.text}" if faster else None
            marked = value.wrapped or hand.wrapped or mark
            results.append(replace(value.joined(hand), wrapped=marked))
        if any(r.wrapped and not w.wrapped for r, w in zip(results, widened, strict=True)):
            marked_too = zip(widened, results, strict=True)
            self.one_pass(node, loop, [replace(w, wrapped=r.wrapped) for w, r in marked_too])
        self.define(node.text, results)


def _elements(text: str) -> int:
    """Of the first tensor whose type stands in the text, more than any if there is none."""
    shape = re.search(r"tensor<([\dx]+)xi\d", text)
    return prod(int(n) for n in shape[1].split("x")) if shape else 1 << 31

"""One exception per rule a file can break, so that a caller (and a test) can tell them apart."""

from __future__ import annotations

from v4quant_kernels.errors import V4QuantError


class FormatError(V4QuantError):
    """A file breaks a rule of its format; the message starts with the file's name."""


class NotSafetensors(FormatError):
    """The file is something else (a pickle, a zip, an LFS pointer, an HTML page)."""


class HeaderTooLarge(FormatError):
    """The header, or the number of values in it, is above the limit."""


class HeaderTruncated(FormatError):
    """The file is too short to hold the header it announces."""


class InvalidHeaderJson(FormatError):
    """The header is not a JSON object of the required form."""


class DuplicateTensor(FormatError):
    """A name occurs twice in one header, or in two shards."""


class UnknownDtype(FormatError):
    """A dtype that the safetensors format does not define, or that torch cannot hold."""


class InvalidShape(FormatError):
    """A shape that is not a list of non-negative integers, or overflows."""


class InvalidOffsets(FormatError):
    """Offsets are negative, reversed, overlapping, gapped or beyond the end of the file."""


class SizeMismatch(FormatError):
    """Shape times dtype differs from the bytes the offsets span."""


class InvalidIndex(FormatError):
    """model.safetensors.index.json is not of the required form."""


class UnsafePath(FormatError):
    """A file name that could lead outside the checkpoint's folder."""


class MissingShard(FormatError):
    """The index names a file that is not there."""


class MissingTensor(FormatError):
    """A tensor that the index, the model or a partner tensor requires is absent."""


class UnexpectedTensor(FormatError):
    """A shard holds a tensor that the index does not name, or the model does not know."""


class WrongDtype(FormatError):
    """A tensor's dtype or shape does not fit its partner or its role."""


class ImplausibleScales(WrongDtype):
    """Scales that make no weights: stored as reciprocals, or damaged."""


class SourceChanged(FormatError):
    """A file changed after it was opened."""


class NotGguf(FormatError):
    """The file is not a GGUF file, or of a version or byte order that is not read."""


class WrongMetadata(FormatError):
    """A key of a GGUF file, or what one would be made from, is missing or contradicts another."""


class UnknownTokenizer(FormatError):
    """A tokenizer.json that llama.cpp could not carry out."""


class UnsupportedPair(V4QuantError):
    """A scheme, a format and an engine that do not go together, or that cannot be written."""


class OutputError(V4QuantError):
    """The output folder cannot take the checkpoint (not empty, not writable, full, locked)."""


def is_library_failure(error: BaseException) -> bool:
    """Whether a library gave up: by an exception, or by a panic of its Rust code, which is none,
    and whose class is private."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"

"""What a conversion cannot carry besides weights, said before it begins.

A tokenizer, a chat template, the numbers of special tokens: weights convert without them, every
check of weights passes, and the result answers nothing. Nobody can make up what the source does not
have, so it is named, with the option that supplies it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from v4quant.conversion.plan import Plan
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.gguf.carried import carried_fields
from v4quant_formats.gguf.vocabulary import lacks
from v4quant_formats.sidecars import (
    CHAT_TEMPLATE,
    TOKENIZER,
    find_sidecars,
    place_of,
    travelling,
)

_LOG = logging.getLogger(__name__)
_SETTINGS = "tokenizer_config.json"
# What else people keep beside weights that says what text means, and no release of V4 has.
_OTHERS = ("tokenizer.model", "tiktoken.model", "chat_template.json", "additional_chat_templates")


def warn_of_lost_words(plan: Plan) -> None:
    """Tell, as one warning, what the output will lack before it reads and writes text."""
    checkpoint = plan.checkpoint
    if plan.recipe.layout.index:
        missing = list(_of_folder(checkpoint))
    else:
        said = {f.key: f.value for f in carried_fields(checkpoint)}
        rows = int(plan.config.vocab_size)
        missing = [lack.problem for lack in lacks(said, rows)]
    missing += _left_behind(checkpoint)
    if missing:
        remedy = "; --tokenizer gives a tokenizer.json with what lies beside it"
        _LOG.warning("the output will not be complete: %s%s", "; ".join(missing), remedy)


def _of_folder(checkpoint: Checkpoint) -> Iterator[str]:
    """What a folder of safetensors will lack. Not a chat template: engines know V4's encoding, and
    the releases have no template either."""
    names = travelling(checkpoint)
    if TOKENIZER not in names:
        yield "no tokenizer (tokenizer.json), so engines read token ids only, or stop"
        return
    if _SETTINGS not in names:
        yield f"no {_SETTINGS}, without which transformers does not know the special tokens"


def _left_behind(checkpoint: Checkpoint) -> Iterator[str]:
    """Files that are there and do not travel."""
    there = set(find_sidecars(checkpoint.path))
    for name in (TOKENIZER, _SETTINGS, CHAT_TEMPLATE):
        path = checkpoint.path / name
        if path.exists() and name not in there and place_of(checkpoint, name) == path:
            yield f"{name} is not carried (a link out of the folder, or larger than any such file)"
    for name in _OTHERS:
        if (checkpoint.path / name).exists():
            yield f"{name} is not carried"

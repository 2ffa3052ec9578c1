"""Containers: tensors as planned, configs engines parse, values other libraries decode alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import decompress_pack_quantized  # noqa: F401

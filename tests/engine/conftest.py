"""Tiny models of every family that the CUDA kernels take: heads of 64."""

from __future__ import annotations

import pytest
import torch

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

"""Foretoken for models that transformers has loaded: a decoding loop for their `generate`.

model.generate(**inputs, custom_generate=foretoken.hf.generate)
"""

from __future__ import annotations

from foretoken.hf.engines import forget
from foretoken.hf.generate import generate

__all__ = ["forget", "generate"]

"""Foretoken for models that transformers has loaded: a decoding loop for their `generate`.

model.generate(**inputs, custom_generate=foretoken.hf.generate)
"""

from __future__ import annotations

from foretoken.hf.engines import forget
from foretoken.hf.generate import generate
from foretoken.models.looped import register

register()  # looped models are then loaded like all others

__all__ = ["forget", "generate"]

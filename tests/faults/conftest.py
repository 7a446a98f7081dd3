"""The small glyph runs of the end-to-end tests, and what fault tests share."""

from __future__ import annotations

from tests.e2e.conftest import cli, config_file, glyphs

__all__ = ["cli", "config_file", "glyphs"]

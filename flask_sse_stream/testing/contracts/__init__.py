"""What every broker and every transport must do: suites that the tests of each implementation inherit.

They need pytest, and those of replay Hypothesis.
"""

from __future__ import annotations

try:
    import pytest
except ImportError as _error:
    raise ImportError("flask_sse_stream.testing.contracts needs pytest: pip install pytest") from _error

# Before its modules are imported, so that their assertions say what they saw.
for _module in ("broker", "transport", "replay", "jobs", "threads", "greenlets"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")

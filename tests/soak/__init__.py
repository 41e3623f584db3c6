"""Long tests of what must never be lost or accepted: `make soak`; see __main__.py."""

"""A cluster as discrete events, for docs/scale.md; run it with ``script/scale``."""

"""The Jupyter side: what a front end talks to.  ``launch`` is the entry."""

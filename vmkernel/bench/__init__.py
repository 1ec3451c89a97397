"""Kernels measured side by side: plain ipykernel, and ours in its microVM, in one run.

What ``vmkernel bench`` and ``script/bench`` share.  Black box: jupyter_client starts the kernels,
as any front end does, and /proc tells their memory.  It never fails on a figure: one that could not
be taken is shown as such, with the reason.

``rig``       a place of the benchmark's own, and the pool in it
``subject``   one kernel, seen as a front end sees it
``memory``    what its processes take
``blocks``    what is done, block by block
``figures``   samples, ratios, goals;  ``report`` shows them
``machine``   where they were taken;  ``measure`` is a whole run

Between the floors of the command and the host: it starts kernels as programs, and knows no VM.
"""

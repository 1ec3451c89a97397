"""Kernels that wait for a front end: wrapper and VM are there before anybody asks (docs/pool.md).

``launcher`` is the process that a front end starts; ``server`` has the members, each a fork of it
(``member``); ``request`` is what a launcher hands over, ``client`` how kernels and commands talk to
the server.  Floor 5, beside ``kernel``, whose life a member leads once it was handed over.
"""

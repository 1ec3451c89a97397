"""What runs inside the VM.  Imports :mod:`vmkernel.protocol` and nothing else of vmkernel.

Not part of the image: the template builder packs this package into the initramfs, so a
new version of vmkernel needs a new template, never a new image.
"""

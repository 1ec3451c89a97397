"""Guest images: recipes, the building of images from them, and the store they lie in.

Floor 2. Names are imported from the modules: `recipe`, `store` (cheap to import, on the kernel's
start path) and `builder` (not).
"""

"""What host and guest say to each other; the only part of vmkernel that both import."""

"""The command ``vmkernel``, one module per subcommand. Floor 5."""

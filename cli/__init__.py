"""The splitserve command, one file per subcommand."""

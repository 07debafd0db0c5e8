"""The command line: each command is also a plain function of the lab."""

"""The command line: one file per command, each a set of annotated arguments and one library call."""

"""The command line: `fedsafe COMMAND`, one module of this folder a command."""

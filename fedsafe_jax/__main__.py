"""The command line as a module: `python -m fedsafe_jax COMMAND`."""

from fedsafe_jax.cli.startup import main

if __name__ == "__main__":
    main()

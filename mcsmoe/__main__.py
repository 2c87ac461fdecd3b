"""``python -m mcsmoe`` is the command line."""

from mcsmoe.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m kvsurgeon`: the command line."""

from kvsurgeon.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m grokctl`."""

from grokctl.cli.app import main

if __name__ == "__main__":
    main()

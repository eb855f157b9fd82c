"""`python -m grokctl`."""

from grokctl.cli import main

if __name__ == "__main__":
    main()

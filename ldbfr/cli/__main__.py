"""`python -m ldbfr.cli`, and torchrun's way to start a command."""

from ldbfr.cli import main

if __name__ == "__main__":
    main()

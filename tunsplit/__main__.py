"""`python -m tunsplit` is the command `tunsplit`."""

from tunsplit.cli import main

if __name__ == "__main__":
    main(prog_name="tunsplit")

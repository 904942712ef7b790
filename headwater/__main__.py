"""`python -m headwater` is the command `headwater`."""

from headwater.cli import console

if __name__ == "__main__":
    console()

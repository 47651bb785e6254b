"""`python -m fusco`: the same as the command `fusco`."""

from fusco.cli import app

if __name__ == "__main__":
    app()

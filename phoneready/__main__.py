"""`python -m phoneready`."""

from phoneready.main import run

if __name__ == "__main__":
    run()

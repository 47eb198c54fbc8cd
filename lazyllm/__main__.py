"""`python -m lazyllm`."""

from lazyllm.cli import main

if __name__ == "__main__":
    main()

"""`python -m lazyllm`."""

from lazyllm.cli.main import main

if __name__ == "__main__":
    main()

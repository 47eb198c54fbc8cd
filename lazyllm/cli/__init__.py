"""The command line, and what it writes to and reads from a terminal."""

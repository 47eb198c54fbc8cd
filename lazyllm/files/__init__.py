"""What is read from files and written to them: lines that survive a kill, fields, prompts."""

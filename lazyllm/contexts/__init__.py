"""What outlives a call: documents that wait, conversations, and beginnings that prompts share."""

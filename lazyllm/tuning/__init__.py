"""From a target, speed or fidelity, to a schedule for one model on a user's own prompts."""

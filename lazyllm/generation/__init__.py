"""One generation: its options, its reply as it comes, its times, and its result."""

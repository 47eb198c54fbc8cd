"""lazyllm."""

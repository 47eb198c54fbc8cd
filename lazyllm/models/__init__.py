"""How lazyllm runs inside a Hugging Face decoder; the algorithm is `stack.py`."""

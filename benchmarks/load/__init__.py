"""What `serve.py` is made of: plans of requests, clients that ask, verdicts on answers, and servers as processes."""

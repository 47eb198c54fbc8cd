"""One model for many: an engine that batches what comes in, and an HTTP server in front of it."""

"""Networks in use: one engine for Deep Elastic Networks and for converted models."""

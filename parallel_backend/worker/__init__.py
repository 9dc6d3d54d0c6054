"""What runs in a rank. Never imported by the host."""

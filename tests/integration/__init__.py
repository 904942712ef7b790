"""Real processes and real servers."""

"""The parts of generation that need no framework: constraints, stop texts, drafts and results."""

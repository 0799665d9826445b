"""Looking into a model: what its text attention does, and which tokens a word is."""
